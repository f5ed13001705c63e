"""A process takes the cores that were left to it, not the machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import scaling

ROOT = Path(scaling.__file__).parents[1]


def test_a_process_that_is_held_to_one_core_counts_one():
    one = min(os.sched_getaffinity(0))
    counted = subprocess.run(
        [sys.executable, "-c", "from scaling.cores import num_cores; print(num_cores())"],
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert counted.stdout == "1\n"


def test_nothing_that_trains_scores_or_launches_counts_cores_in_another_way():
    counting = {
        str(path.relative_to(ROOT))
        for room in ("scaling", "launch")
        for path in (ROOT / room).rglob("*.py")
        if any(word in path.read_text() for word in ("cpu_count", "sched_getaffinity"))
    }
    assert counting == {"scaling/cores.py"}
