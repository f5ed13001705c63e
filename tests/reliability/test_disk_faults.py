"""A full disk, a quota and an input or output error at every write; a flipped byte in every file of a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling.checkpoint import list_checkpoints, newest_whole
from scaling.records import RunDirectory
from tests.ranks import end_all, run_ranks, start_ranks
from tests.reliability.small_runs import SMALL_RUN, run_of

ERRORS = {errno.ENOSPC: "full disk", errno.EDQUOT: "quota", errno.EIO: "input or output error"}


def break_disk(library: Path, what: str, folder: Path, faults: list[str], words: list[str]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.disk_faults", what, str(folder), *faults, "--", *words],
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("more", [[], ["deepspeed=zero2"]], ids=["plain", "zero2"])
def test_a_fault_at_any_call_of_a_save_leaves_the_checkpoint_before_and_says_so(
    tiny_run: list[str], tmp_path: Path, faulty_disk: Path, report, more: list[str]
):
    found = break_disk(faulty_disk, "saves", tmp_path, [*map(str, ERRORS)], [*tiny_run, *SMALL_RUN, *more])
    for error in ERRORS:
        *broken, whole = [row for row in found if row["error"] == error]
        assert (whole["fails"], whole["said"], whole["newest"]) == (0, None, 2)
        assert len(broken) >= whole["calls"] > 3
        for row in broken:
            if row["said"] is None:  # the second making of a folder that is there, which costs nothing
                assert row["failed"].startswith("mkdir "), f"{row['failed']} failed and nothing was said"
                assert (row["before"], row["newest"]) == (None, 2)
                continue
            assert "step-00000002 could not be written (" in row["said"]
            assert "the checkpoint before it is whole" in row["said"]
            # DeepSpeed's and torch's own writers keep to themselves which error it was
            assert more or ("check the file system" in row["said"]) == (error == errno.EIO), row["failed"]
            assert row["before"] is None
            # the folder's flush after the rename may be what failed
            assert row["newest"] == (2 if "step-00000002" in row["left"] else 1)
            assert set(row["left"]) <= {"step-00000001", "step-00000002"}, row["failed"]
    calls = {row["failed"].partition(" ")[0] for row in found}
    assert {"fsync", "mkdir", "rename"} <= calls
    assert any(call.startswith("write") for call in calls)
    untold = sum(row["said"] is None for row in found) - len(ERRORS)
    unsaid = f"all but {untold} (a folder made a second time: the save went through whole)" if untold else "all"
    report(
        f"disk saves {'zero2' if more else 'plain'}",
        f"A save {'by ZeRO stage 2' if more else 'of one process'} makes {whole['calls']} calls that write, create, "
        f"flush or rename; each failed in turn with {', '.join(ERRORS.values())}: of {len(found) - len(ERRORS)} broken "
        f"saves 0 harmed the checkpoint before, 0 left anything half-written, and {unsaid} were told in one line.",
    )


def test_a_fault_anywhere_in_a_run_ends_it_with_one_line_and_status_2(
    tiny_run: list[str], tmp_path: Path, faulty_disk: Path, full: bool, report
):
    """The whole run, as the command executes it: plan, lock, records, TensorBoard, checkpoints, model, scores."""
    words = [*tiny_run, *SMALL_RUN, "train.budget.steps=3", "execution.checkpoint_every=1"]
    (tmp_path / "whole").mkdir()
    (whole,) = break_disk(faulty_disk, "runs", tmp_path / "whole", ["whole:0:0:0"], words)
    assert whole["status"] == 0, whole["log"]
    numbers = list(range(1, whole["calls"] + 1, 2))
    if not full:
        numbers = sorted(random.Random(0).sample(numbers, 4))
    kinds = list(ERRORS)
    faults = [f"at-{at}:{at}:{kinds[at % 3]}:0" for at in numbers]
    faults += [f"from-{at}:{at}:{kinds[at % 2]}:1" for at in (numbers[::4] if full else numbers[1:2])]
    (tmp_path / "broken").mkdir()
    found = break_disk(faulty_disk, "runs", tmp_path / "broken", faults, words)
    num_recorded = num_harmless = 0
    for row in found:
        if not row["fails"]:  # TensorBoard's thread writes in larger or smaller pieces
            assert row["status"] == 0
            continue
        if row["failed"].startswith("mkdir ") and row["status"] == 0:  # a folder that is there is made again: no loss
            num_harmless += 1
            continue
        assert row["status"] == 2, f"{row['failed']}: status {row['status']}\n{row['log']}"
        errors = [line for line in row["log"].splitlines() if "error: run " in line or line.startswith("error: ")]
        assert len(errors) == 1, f"{row['failed']}\n{row['log']}"
        # TensorBoard's own thread may print what it met, and what that came of.
        assert "Traceback" not in row["log"] or "Exception in thread" in row["log"], f"{row['failed']}\n{row['log']}"
        runs = list((tmp_path / "broken" / row["name"]).glob("runs/*"))
        run = RunDirectory(runs[0]) if runs else None
        if run and (checkpoints := list_checkpoints(run.checkpoints)):
            assert all(checkpoint.damage() is None for checkpoint in checkpoints), row["failed"]
        if run and run.state()[0] == "failed":
            num_recorded += 1
            assert run.state()[1]["failure"] in ("bad config", "node failure")
        else:  # there was no record to write to yet, or it is what could not be written
            assert row["name"].startswith("from") or not run or not run.read_metrics() or "events" in row["failed"]
    assert num_recorded
    broken = sum(row["fails"] > 0 for row in found) - num_harmless
    report(
        "disk runs",
        f"A whole run of three steps makes {whole['calls']} such calls below its study; with one fault at every "
        f"second, or faults from every eighth on, {broken} runs all ended with status 2 and one line, every committed "
        f"checkpoint whole; {num_recorded} put it on record, the others had no record yet or no disk for it. Where the "
        f"making of a folder failed that was there already ({num_harmless} runs) the run finished.",
    )


@pytest.mark.parametrize(
    ("more", "broken", "statuses"),
    [([], 0, [2, 2]), (["deepspeed=zero2"], 0, [2, 76]), (["deepspeed=zero2"], 1, [76, 2])],
)
def test_a_rank_whose_disk_takes_no_more_ends_the_run_on_all_and_it_goes_on_where_there_is_room(
    tiny_run: list[str], tmp_path: Path, more: list[str], broken: int, statuses: list[int]
):
    """One rank of two may write no file over 64 kB from some step on."""

    def words(name: str) -> list[str]:
        return [*tiny_run, *SMALL_RUN, "train.budget.steps=30", f"study={tmp_path / name}", *more]

    try:
        whole = run_ranks(words("whole"), tmp_path, 2)
        ranks = start_ranks([*words("broken"), "execution.num_workers=0"], tmp_path, 2, command="execute")
        deadline = time.monotonic() + 120
        while not list((tmp_path / "broken").glob("runs/*/checkpoints/step-*")):
            assert time.monotonic() < deadline, ranks[0].said
            time.sleep(0.005)
        resource.prlimit(ranks[broken].pid, resource.RLIMIT_FSIZE, (65536, 65536))
        assert [rank.wait(90) for rank in ranks] == statuses, "\n".join(rank.said for rank in ranks)
        assert "could not be written (" in ranks[broken].said
        assert "Traceback" not in ranks[broken].said
        assert f"rank {broken}" in ranks[1 - broken].said
        run = run_of(tmp_path / "broken")
        assert run.state()[0] == "failed"
        assert "could not be written" in run.state()[1]["reason"]
        assert run_ranks(words("broken"), tmp_path, 2) == whole
    finally:
        end_all()


@pytest.mark.parametrize("more", [[], ["deepspeed=zero2"]], ids=["plain", "zero2"])
def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_found_and_the_one_before_is_used(
    tiny_run: list[str], tmp_path: Path, times, report, caplog, more: list[str]
):
    try:
        run_ranks([*tiny_run, *SMALL_RUN, "train.budget.steps=6", *more], tmp_path, 2)
    finally:
        end_all()
    folder = run_of(tmp_path / "study").checkpoints
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [3, 6]
    files = [path for path in sorted((folder / "step-00000006").rglob("*")) if path.is_file()]
    assert len(files) == (8 if more else 2), files
    rng, flips = random.Random(0), 0
    for path in files:
        whole = path.read_bytes()
        for _ in range(times(3, 100)):
            at = rng.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
            caplog.clear()
            checkpoint = newest_whole(folder)
            assert checkpoint is not None
            assert checkpoint.step == 3, f"byte {at} of {path}"
            assert "step-00000006 is damaged" in caplog.text
            flips += 1
        path.write_bytes(whole)
    assert newest_whole(folder).step == 6
    kind = "ZeRO stage 2 on two processes" if more else "a plain run"
    report(
        f"flipped bytes {'zero2' if more else 'plain'}",
        f"{flips} flipped bits in the {len(files)} files of a checkpoint of {kind}: each found, the one before used.",
    )
