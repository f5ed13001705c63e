"""C sources of this package as shared libraries, compiled on first use for this machine's processor.

The compiler is the system's (`cc`, or what the environment variable CC names). A library is kept in the user's cache
folder, under a name made of all that it depends on: several processes and machines may share the folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC")
HEADER = Path(__file__).with_name("vectors.h")


@lru_cache
def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The library made of a source; OSError or SubprocessError where it cannot be had."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, *FLAGS, *flags]
    content = source.read_bytes() + HEADER.read_bytes()
    content += repr((command, platform.machine(), _processor())).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bsrnn"
    target = folder / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed when whole: others may be compiling too
            built = Path(temporary) / target.name
            done = subprocess.run(
                [*command, str(source), "-o", str(built), "-lm"], capture_output=True, text=True, timeout=120
            )
            if done.returncode:
                raise OSError(
                    next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
                )
            os.replace(built, target)
    return ctypes.CDLL(str(target))


def _processor() -> str:
    """What the processor can do: a cache folder may be shared by machines that differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), platform.processor())
