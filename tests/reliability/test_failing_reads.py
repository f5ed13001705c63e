"""A file system that fails to read, for a moment or for good: the system calls themselves fail (failing_reads.c)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.shards import ShardIndex
from tests.reliability.shards_under_test import write_shards
from tests.shared_library import shared_library

READ_ALL = """
import errno, hashlib, sys
from pathlib import Path
from scaling.shards import ShardIndex
from scaling.stream import CropDataset
index = ShardIndex.load(Path(sys.argv[1]))
dataset = CropDataset(index.root, index.clips("train"), 3000, 1)
batch = dataset.__getitems__(range(12))
print(hashlib.sha256(batch.noisy.numpy().tobytes() + batch.clean.numpy().tobytes()).hexdigest())
print(dataset.reader.num_retries, len(batch.replaced))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_library(Path(__file__).with_name("failing_reads.c"), tmp_path_factory.mktemp("failing-reads"))


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path / "shards", [2_500 + 601 * number for number in range(20)], shard_bytes=200_000)


def test_reads_that_fail_for_a_moment_are_tried_again_and_change_nothing(library: Path, index: ShardIndex, report):
    def read(errors: str, number: int = errno.EIO) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"READ_ERRORS": errors, "READ_ERRNO": str(number), "LD_PRELOAD": str(library)}
        words = [sys.executable, "-c", READ_ALL, str(index.root)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    whole, failing = (read(errors).stdout.split() for errors in ("0/1", "1/4"))
    assert whole[1:] == ["0", "0"]
    assert failing[0] == whole[0]
    assert int(failing[1]) >= 6, "reads did fail"
    assert failing[2] == "0", "nothing is replaced for a failure that passes"
    stale = read("1000/1000", errno.ESTALE)
    assert "UnreachableError" in stale.stderr
    assert "Stale file handle" in stale.stderr
    report(
        "transient",
        f"Every fourth `preadv` fails with EIO: {failing[1]} reads were tried again, the same samples came, nothing "
        "was replaced. A file system that goes on failing otherwise than by EIO or a missing file ends the run with a "
        "message; it is not taken for damage.",
    )


def test_verify_names_the_clip_that_cannot_be_read_and_goes_on_to_the_other_shards(library: Path, index: ShardIndex):
    shards, clip = [shard.name for shard in index.shards["train"]], index.clips("train")[2]
    assert clip.shard == shards[0] != shards[-1]
    lost = clip.noisy_offset + 1_000

    def verify(number: int) -> subprocess.CompletedProcess[str]:
        where = {"LOST_IN": str(index.root / shards[0]), "LOST_FROM": str(lost), "LOST_TO": str(lost + 512)}
        return subprocess.run(
            [sys.executable, "-m", "scaling.verify", "data=vbd", f"data.shards={index.root}"],
            env=os.environ | where | {"READ_ERRNO": str(number), "LD_PRELOAD": str(library)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )

    done = verify(errno.EIO)
    assert (done.returncode, done.stderr) == (1, "")
    first, *others, last = done.stdout.splitlines()
    assert first == f"{shards[0]}: clip {clip.id}: bytes damaged (Input/output error)"
    assert [line.split(", ")[0] for line in others] == [f"{name}: whole" for name in shards[1:]]
    assert last.startswith(f"1 of the shards at {index.root} are damaged: delete")
    stale = verify(errno.ESTALE)  # says nothing of the data
    assert (stale.returncode, stale.stderr.count("\n")) == (2, 1), stale.stderr
    assert f"{shards[0]} cannot be read ([Errno 116] Stale file handle), in 4 attempts: check the" in stale.stderr
