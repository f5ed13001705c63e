"""A library that aborts a process that is torn down, as a process group's threads do whose other end has gone first."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = "#include <stdlib.h>\n__attribute__((destructor)) static void torn_down(void) { abort(); }\n"


def aborting_library(folder: Path) -> Path:
    """Compiled in the folder; a process that has loaded it ends with -6, whatever it had said."""
    source, library = folder / "aborting.c", folder / "aborting.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return library
