"""A process that dies or freezes ends the job within a stated time, with a message that names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ranks import Rank, end_all, start_ranks
from tests.reliability.small_runs import SMALL_RUN, num_rows, run_of

SILENCE, STEP = 5, 6  # seconds, of execution.silence_timeout and step_timeout
# What a rank may take beyond its timeouts: to look, to name who broke a collective, to let the others read it.
GRACE = 2 + 12 + 6
STATED = {"rank 0": SILENCE + GRACE, "rank 1": SILENCE + GRACE, "a loader worker": max(SILENCE, STEP) + GRACE}
FOR_A_LOADED_MACHINE = 30
HARMS = {signal.SIGKILL: "killed", signal.SIGSTOP: "frozen"}


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


def start(words: list[str], folder: Path, world_size: int) -> list[Rank]:
    """Ranks that are past their first steps."""
    ranks = start_ranks(words, folder, world_size, command="execute")
    deadline = time.monotonic() + 180
    while num_rows(folder / "study") < 4:
        is_in_vain = time.monotonic() > deadline or any(rank.process.exitcode is not None for rank in ranks)
        assert not is_in_vain, "\n".join(rank.said for rank in ranks)
        time.sleep(0.01)
    return ranks


def loader_worker(rank: Rank) -> psutil.Process:
    children = psutil.Process(rank.pid).children()
    return next(child for child in children if "resource_tracker" not in " ".join(child.cmdline()))


DEFECT = """
import sys
from scaling import train
from scaling.command import run_main
from scaling.engines.data_parallel import DataParallel
from scaling.stream import CropDataset

where = {"a step": (DataParallel, "optimise"), "a worker": (CropDataset, "__getitems__")}[sys.argv.pop(1)]
does = getattr(*where)

def fails(*arguments):
    does(*arguments)
    raise ZeroDivisionError("a defect")

setattr(*where, fails)
run_main(train.main, "")
"""


@pytest.mark.parametrize("where", ["a step", "a worker"])
def test_a_defect_ends_a_run_that_has_loader_workers(tiny_run: list[str], where: str):
    words = [*tiny_run, *SMALL_RUN, "execution.num_workers=2"]
    ended = subprocess.run(
        [sys.executable, "-c", DEFECT, where, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("ZeroDivisionError: a defect"), ended.stderr


def test_what_dies_or_freezes_is_named_and_ends_the_job_in_the_stated_time(
    tiny_run: list[str], tmp_path: Path, full: bool, report
):
    settings = [f"execution.silence_timeout={SILENCE}", f"execution.step_timeout={STEP}"]
    endless = ["train.budget.steps=100000", "execution.checkpoint_every=1000000", "execution.num_workers=1"]
    words = [*tiny_run, *SMALL_RUN, *endless, *settings]
    shared = "train.norm_batch=4"  # a norm batch over both processes: collectives inside the forward pass too
    cases = [
        (1, "a loader worker", signal.SIGSTOP, ""),
        (2, "rank 1", signal.SIGKILL, shared),
    ]
    if full:
        cases = [(1, "a loader worker", harm, "") for harm in HARMS]
        cases += [(2, victim, harm, more) for more in ("", shared) for victim in STATED for harm in HARMS]
        cases += [(4, "rank 2", signal.SIGKILL, "execution.micro_batch=1")]
    rows = []
    for number, (world_size, victim, harm, more) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = [*words, f"study={folder / 'study'}", *([more] if more else [])]
        ranks = start(own, folder, world_size)
        harmed = world_size - 1 if victim == "a loader worker" else int(victim[-1])
        name = victim if victim != "a loader worker" else str(loader_worker(ranks[harmed]).pid)
        pid = ranks[harmed].pid if victim != "a loader worker" else int(name)
        began = time.monotonic()
        os.kill(pid, harm)
        waited_for = [rank for at, rank in enumerate(ranks) if at != harmed or victim == "a loader worker"]
        statuses = [rank.wait(120) for rank in waited_for]
        seconds = time.monotonic() - began
        if harm == signal.SIGSTOP:
            os.kill(pid, signal.SIGKILL)
        assert 0 not in statuses
        assert seconds < STATED.get(victim, SILENCE + GRACE) + FOR_A_LOADED_MACHINE
        assert all(name in rank.said or f"rank {harmed}" in rank.said for rank in waited_for)
        state, event = run_of(folder / "study").state()
        assert (state, event["failure"]) == ("failed", "node failure"), event
        assert name in event["reason"], event
        rows.append((world_size, victim, HARMS[harm], "yes" if more == shared else "no", seconds))
    table = "\n".join(f"| {w} | {who} | {how} | {spans} | {seconds:.1f} |" for w, who, how, spans, seconds in rows)
    report(
        "no hangs",
        f"With `execution.silence_timeout={SILENCE}` and `step_timeout={STEP}`, seconds until every other process had "
        f"ended, naming the lost one on record:\n\n| processes | lost | how | norm over processes | seconds |\n"
        f"|--:|---|---|---|--:|\n{table}\n\nThe stated time is `silence_timeout` (for a loader worker the larger of "
        f"the two) and {GRACE} s more. The defaults are 60 and 1,800 s.",
    )
