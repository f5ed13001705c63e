"""How a process of a run under srun ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# As a process group does whose other end has gone first: its threads abort a process that is torn down.
ABORTING = "#include <stdlib.h>\n__attribute__((destructor)) static void torn_down(void) { abort(); }\n"
RANK = """
import atexit, ctypes, sys
from launch.rank import end
ctypes.CDLL(sys.argv[1])
atexit.register(lambda: open(sys.argv[2], "w").write("said"))
print("to be flushed", end="")
{ending}
"""


def test_a_rank_ends_with_its_own_status_whatever_is_torn_down_after_it(tmp_path: Path):
    source, library = tmp_path / "aborting.c", tmp_path / "aborting.so"
    source.write_text(ABORTING)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)

    def status_of(ending: str) -> int:
        words = [sys.executable, "-c", RANK.format(ending=ending), library, tmp_path / "said"]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert ended.stdout == "to be flushed"
        assert (tmp_path / "said").read_text() == "said"
        (tmp_path / "said").unlink()
        return ended.returncode

    assert status_of("sys.exit(75)") == -6  # aborted: what a plain ending makes of it
    assert status_of("end(75)") == 75
