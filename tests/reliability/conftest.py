"""Faults injected for real, few by default and many with --reliability=full (`make reliability`).

    def test_a_kill_changes_no_weight(times, report, ...):
        for _ in range(times(4, 200)):                       # 4 by default, 200 in full
            ...kill, count...
        report("kills", f"{kills} SIGKILLs: {different} runs differ")

`report` puts the sentence into the block of that name in docs/reliability.md, with the command
beside it; with the default counts it does nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

import scaling.remote
from scaling.shards import ShardIndex
from tests.benchmarks.page import RELIABILITY, measured_on, write_block
from tests.reliability.shards_in_store import NUM_CLIPS, Store, Upload
from tests.reliability.shards_under_test import write_shards
from tests.shared_library import shared_library


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--reliability") == "full"


@pytest.fixture(scope="session")
def times(full: bool) -> Callable[[int, int], int]:
    """times(quick, full): how often to do what a test does."""
    return lambda quick, many: many if full else quick


@pytest.fixture
def report(full: bool, request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """report(block, markdown): write a figure of docs/reliability.md, with the command that produces it."""

    def write(block: str, markdown: str) -> None:
        if full:
            test = request.node.nodeid.partition("[")[0]
            command = f"`python -m pytest {test} --reliability=full`"
            write_block(RELIABILITY, block, f"{markdown.strip()}\n\n{command}  \n{measured_on('torch')}")

    return write


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of faulty_disk.c, to be preloaded."""
    return shared_library(Path(__file__).with_name("faulty_disk.c"), tmp_path_factory.mktemp("faulty-disk"))


# --- shards in an object store -------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that runs, and the environment in which s3:// is there."""
    script = Path(__file__).with_name("object_store.py")
    errors = (tmp_path_factory.mktemp("store") / "stderr").open("w")
    with (
        subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=errors, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        address = server.stdout.readline().strip()
        for name, value in (
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        patch.setattr(scaling.remote, "FETCH_PAUSES", (0.1, 0.2, 0.4, 0.8))
        yield Store(address)
        s3fs.S3FileSystem.clear_instance_cache()  # they know the address, which the next module's store does not have
        server.terminate()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The shards in a local folder."""
    index = write_shards(tmp_path_factory.mktemp("local"), [6_000 + number for number in range(NUM_CLIPS)], 170_000)
    assert len(index.shards["train"]) >= 8
    return index


@pytest.fixture(scope="module")
def upload(store: Store, local: ShardIndex) -> Upload:
    """Puts the shards into a bucket of their own; its URL."""
    count = iter(range(1_000))

    def put() -> str:
        bucket = f"bucket{next(count)}"
        filesystem = s3fs.S3FileSystem()
        filesystem.mkdir(bucket)
        filesystem.put(f"{local.root}/", f"{bucket}/noise/", recursive=True)
        return f"s3://{bucket}/noise"

    return put
