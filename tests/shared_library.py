"""C that tests load into the processes under test, to let there happen what users' machines do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def shared_library(source: Path, folder: Path) -> Path:
    """A C file compiled into a folder."""
    library = folder / f"{source.stem}.so"
    compiler = [os.environ.get("CC", "cc"), "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler, "-o", library, source, "-ldl"], check=True)
    return library
