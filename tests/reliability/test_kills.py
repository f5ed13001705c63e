"""SIGKILL at random moments: the resumed run is the run that nobody killed, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ranks import CONTEXT, Rank, end_all, start_ranks
from tests.reliability.killed_saves import kill_saves
from tests.reliability.small_runs import SMALL_RUN, loss_log, num_rows, run_of, weights_hash

PLACES = ("the whole job", "a rank", "a loader worker")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


def wait_for_a_moment(ranks: list[Rank], study: Path, rng: random.Random) -> bool:
    """Until a random moment of the run: of its start, of a step, a save or the scoring; whether it has made a step."""
    if rng.random() < 0.3:
        end, wanted = time.monotonic() + rng.uniform(0, 3), 10**6
    else:
        end, wanted = time.monotonic() + 120, rng.randint(1, 8)
    before = num_rows(study)
    while time.monotonic() < end and any(rank.process.is_alive() for rank in ranks):
        if num_rows(study) >= before + wanted:
            time.sleep(rng.uniform(0, 0.1))
            break
        time.sleep(0.002)
    return num_rows(study) > before


def workers_of(ranks: list[Rank]) -> list[psutil.Process]:
    found = []
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(rank.pid).children()
            found += [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    return found


def kill(ranks: list[Rank], place: str, others_end_by_themselves: bool, rng: random.Random) -> bool:
    """SIGKILL to one of the run's processes or to all; whether there was one to kill. None is left afterwards."""
    alive = [rank for rank in ranks if rank.process.is_alive()]
    workers = workers_of(alive)
    victims = {"the whole job": [rank.pid for rank in alive], "a rank": [], "a loader worker": []}
    if alive:
        victims["a rank"] = [rng.choice(alive).pid]
    if workers:
        victims["a loader worker"] = [rng.choice(workers).pid]
    killed = 0
    for pid in victims[place]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    if others_end_by_themselves:
        for rank in ranks:
            rank.wait(120)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
        rank.process.join()
    return killed > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_at_random_moments_change_no_loss_and_no_weight(
    tiny_run: list[str], tmp_path: Path, times, report, world_size: int
):
    def start(study: Path) -> list[Rank]:
        words = [*tiny_run, *SMALL_RUN, "train.budget.steps=60", "execution.num_workers=2"]
        words += ["execution.silence_timeout=60", f"study={study}"]  # the machine may be slow
        return start_ranks(words, tmp_path, world_size, command="execute")

    def finish(study: Path, ranks: list[Rank]) -> None:
        assert [rank.wait(300) for rank in ranks] == [0] * world_size, "\n".join(rank.said for rank in ranks)
        assert run_of(study).state()[0] == "finished"

    finish(tmp_path / "whole", start(tmp_path / "whole"))
    whole = run_of(tmp_path / "whole")
    rng, kills, runs = random.Random(world_size), Counter[str](), 0
    wanted = times(3, 100)
    while kills.total() < wanted:
        runs += 1
        study = tmp_path / f"killed-{runs}"
        while True:
            ranks = start(study)
            if kills.total() >= wanted:
                finish(study, ranks)
                break
            is_going = wait_for_a_moment(ranks, study, rng)
            if not any(rank.process.is_alive() for rank in ranks):
                finish(study, ranks)
                break
            place = rng.choice(PLACES)
            kills[place] += kill(ranks, place, is_going and rng.random() < 0.4, rng)
        assert loss_log(run_of(study)) == loss_log(whole)
        assert weights_hash(run_of(study)) == weights_hash(whole)
    places = ", ".join(f"{place} {kills[place]}" for place in PLACES)
    report(
        f"kills {world_size}",
        f"{kills.total()} SIGKILLs at random moments of {runs} runs on {world_size} process{'es' * (world_size > 1)} "
        f"with two loader workers each ({places}), each run resumed at once: 0 of {runs} differ from the run that "
        "nobody killed in a loss, a gradient norm or the hash of the final weights.",
    )


def test_kills_during_saves_leave_a_run_loadable_and_cost_one_interval_at_most(tmp_path: Path, times, report):
    result = tmp_path / "result.json"
    wanted = times(40, 1000)
    server = CONTEXT.Process(target=kill_saves, args=(tmp_path / "checkpoints", wanted, result))
    server.start()
    server.join(60 + wanted)
    if server.exitcode is None:
        server.kill()
    assert server.exitcode == 0
    found = json.loads(result.read_text())
    assert found["kills"] == wanted
    assert found["unloadable"] == 0
    assert found["most_lost"] <= 1
    assert found["half_written"] > wanted / 10, "hardly a kill met a save"
    report(
        "killed saves",
        f"{wanted:,} SIGKILLs to a process that does nothing but save, {found['mebibytes']:.1f} MiB in three files: "
        f"{found['half_written']} left a half-written folder, {found['unloadable']} a run that could not be loaded, "
        f"{found['lost']} lost a checkpoint that had been reported as saved. A kill costs the steps since the last "
        f"save, at most {found['most_lost']} interval of steps.",
    )
