"""Ends where no exception can reach: what hangs here is the storage, the store, the terminal."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from scaling import progress
from scaling.ports import free_port
from scaling.progress import ProgressDisplay

LAST_WORDS = """
import time
from scaling import liveness

liveness.SECONDS_FOR_LAST_WORDS = 2
deadline = liveness.Deadline(1, lambda what: time.sleep(3600))  # as a write to storage that does not answer
with deadline.running():
    time.sleep(3600)
"""

STORE = """
import sys, time
from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", int(sys.argv[1]), None, True, wait_for_workers=False)
print("up", flush=True)
time.sleep(3600)
"""

RANK_0 = """
import logging, sys, time
from torch.distributed import TCPStore
from scaling.liveness import Watch
from scaling.processes import _is_there

logging.basicConfig()
ask, look = (TCPStore("127.0.0.1", int(sys.argv[1]), None, False, wait_for_workers=False) for _ in range(2))
Watch(look, 0, 2, 6, 3600).start()
print("up", flush=True)
sys.stdin.readline()
print(_is_there(ask, "key", time.monotonic() + 1), flush=True)
time.sleep(3600)
"""


def test_last_words_that_do_not_return_keep_no_process():
    done = subprocess.run([sys.executable, "-c", LAST_WORDS], timeout=60, check=False)
    assert done.returncode == 76


def test_a_store_that_freezes_in_a_process_of_its_own_ends_rank_0_too():
    """As under torchrun, whose agent keeps it."""
    words = [str(free_port())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", STORE, *words], **pipes) as store:
        assert store.stdout.readline() == "up\n"
        with subprocess.Popen([sys.executable, "-c", RANK_0, *words], **pipes) as rank:
            try:
                assert rank.stdout.readline() == "up\n"
                os.kill(store.pid, signal.SIGSTOP)
                said, errors = rank.communicate("\n", timeout=60)
            finally:
                rank.kill()
                store.kill()
    assert rank.returncode == 76, errors
    assert said == "False\n"
    assert "rank 0, which keeps the store of the run, has given no answer" in errors


def test_a_terminal_that_has_gone_changes_nothing_in_how_a_run_ends(monkeypatch: pytest.MonkeyPatch):
    master, slave = os.openpty()
    terminal = io.TextIOWrapper(os.fdopen(slave, "wb", 0), write_through=True)
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=terminal, force_terminal=True))
    display = ProgressDisplay("run", 10)
    display.__enter__()
    assert display.bar is not None
    os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        terminal.write("x")
    display.__exit__(None, None, None)
