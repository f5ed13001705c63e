"""The project's commands as a user runs them: tests read their exit status and what they say.

Each is a process of its own, forked from the server of tests/ranks.py, which has imported torch already; importing it
anew would cost seconds of CPU time a command. What a user's interpreter does before that, tests of whole
sweeps and of kills see: they start `python -m`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.ranks import CONTEXT


def run_command(
    module: str, words: list[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """python -m MODULE WORDS; subprocess.TimeoutExpired, and an end to it, if it takes longer."""
    number = len(list(cwd.glob(".command-*.out")))
    out, err = (cwd / f".command-{number}.{kind}" for kind in ("out", "err"))
    process = CONTEXT.Process(target=_run, args=(module, words, cwd, dict(environment), out, err))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired([module, *words], timeout, out.read_text(), err.read_text())
    return subprocess.CompletedProcess([module, *words], process.exitcode, out.read_text(), err.read_text())


def _run(module: str, words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which torch reads when it is imported
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    sys.argv = [module, *words]
    command = importlib.import_module(module)
    command.run_main(command.main, command.__doc__ or "")
