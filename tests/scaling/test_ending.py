"""How a command or a job ends: with its own status and its last words, whatever is torn down after it."""

from __future__ import annotations

import os
import pstats
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared_library import shared_library

ENDING = """
import atexit, ctypes, sys
from scaling.ending import end, end_after, end_at_exit
ctypes.CDLL(sys.argv[1])
atexit.register(lambda: print("said", end=" "))

def fails(error):
    raise error

print("to be flushed", end=" ")
{ending}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_library(Path(__file__).parents[1] / "aborting.c", tmp_path_factory.mktemp("aborting"))


@pytest.mark.parametrize(
    ("ending", "status", "last_line"),
    [
        ("sys.exit(75)", -6, ""),  # what a plain ending makes of it
        ("end(75)", 75, ""),
        ("end_after(lambda: 76)", 76, ""),
        ("end_after(lambda: None)", 0, ""),
        ("end_after(lambda: sys.exit(2))", 2, ""),
        ("end_after(lambda: sys.exit('no'))", 1, "no"),
        ("end_after(lambda: fails(ValueError('a defect')))", 1, "ValueError: a defect"),
        ("end_after(lambda: fails(KeyboardInterrupt()))", 130, "KeyboardInterrupt"),
        ("end_at_exit(3)", 3, ""),
        ("end_at_exit(1); fails(ValueError('a defect'))", 1, "ValueError: a defect"),
    ],
)
def test_a_process_ends_with_its_own_status_whatever_is_torn_down_after_it(
    library: Path, ending: str, status: int, last_line: str
):
    words = [sys.executable, "-c", ENDING.format(ending=ending), library]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == status
    assert ended.stdout == "to be flushed said "
    assert (ended.stderr.splitlines() or [""])[-1] == last_line
    assert ended.stderr.startswith("Traceback") == (": " in last_line or last_line == "KeyboardInterrupt")


def test_a_command_under_a_profiler_leaves_it_its_last_word(tmp_path: Path):
    (tmp_path / "command.py").write_text("from scaling.ending import end_after\nend_after(lambda: 3)\n")
    words = [sys.executable, "-m", "cProfile", "-o", tmp_path / "profile", tmp_path / "command.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(words, env=environment, timeout=120, check=True)  # cProfile's own status
    assert pstats.Stats(str(tmp_path / "profile")).get_stats_profile().func_profiles


TRAIN = """
import ctypes, runpy, sys
import scaling.run

def fails(*_, **__):
    raise ZeroDivisionError("a defect")

ctypes.CDLL(sys.argv.pop(1))
if sys.argv.pop(1) == "a defect":
    scaling.run.execute = fails
runpy.run_module("scaling.train", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("world_size", "what", "status", "last_line"),
    [
        (2, "a defect", 1, "ZeroDivisionError: a defect"),
        (2, "a mistake", 2, "error: WORLD_SIZE = 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: "),
        (1, "a defect", 1, "ZeroDivisionError: a defect"),
    ],
)
def test_a_run_that_fails_is_not_held_up_by_what_is_torn_down(
    library: Path, tiny_run: list[str], world_size: int, what: str, status: int, last_line: str
):
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN, library, what, *tiny_run],
        env=os.environ | {"WORLD_SIZE": str(world_size)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(last_line)
