"""Worker processes that end with whoever started them."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from scaling.pool import spawned_pool

SCRIPT = """
from scaling.pool import spawned_pool

print("begun", flush=True)
with spawned_pool(2) as pool:
    print(list(pool.map(abs, [-1, -2, 3])))
"""


def test_a_script_that_nothing_guards_is_run_once_whoever_needs_workers(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["begun", "[1, 2, 3]"], done.stderr


def test_workers_that_ignore_signals_end_with_their_pool_when_one_of_them_was_killed():
    """Python's way out of a broken pool is to terminate what is left, and to wait for it."""
    with spawned_pool(2) as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
        workers = [*pool._processes.values()]
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + 20
        # Not by `is_alive`: the pool's own thread waits for them too, and who comes second is told that they live.
        while (
            left := [worker.pid for worker in workers if psutil.pid_exists(worker.pid)]
        ) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left
