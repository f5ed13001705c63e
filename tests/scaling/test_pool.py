"""Worker processes that end with whoever started them."""

import subprocess
import sys
from pathlib import Path

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
