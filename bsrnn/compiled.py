"""C sources of this package as shared libraries, compiled on first use for this machine's processor.

The compiler is the system's (`cc`, or what the environment variable CC names). A library is kept in the user's cache
folder ($XDG_CACHE_HOME or ~/.cache), named after its sources, the command and the processor: several processes and
machines may share the folder.
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
HEADERS = sorted(Path(__file__).parent.glob("*.h"))


class NotCompiledError(OSError):
    """A source could not be compiled, or what came of it could not be kept or loaded; the message is one line."""


@lru_cache
def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The library made of a source; NotCompiledError where it cannot be had."""
    try:
        target = _target(source, flags)
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:  # of another system, or what a full disk left
                target.unlink(missing_ok=True)
        _compile(source, flags, target)
        return ctypes.CDLL(str(target))
    except NotCompiledError:
        raise
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise NotCompiledError(f"{source.name} could not be compiled: {' '.join(str(error).split())}") from error


def _command(flags: tuple[str, ...]) -> list[str]:
    return [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *flags]


def _target(source: Path, flags: tuple[str, ...]) -> Path:
    content = b"".join(path.read_bytes() for path in (source, *HEADERS))
    content += repr((_command(flags), platform.machine(), _processor())).encode()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # there is no home
        raise NotCompiledError(f"{source.name} has no place to be compiled to: set XDG_CACHE_HOME to a folder")
    return Path(cache, "bsrnn", f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so")


def _compile(source: Path, flags: tuple[str, ...], target: Path) -> None:
    command = _command(flags)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:  # renamed when whole: others may be compiling too
        built = Path(temporary, target.name)
        words = [*command, str(source), "-o", str(built), "-lm"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=120)
        if done.returncode or not built.exists():
            said = (line for line in done.stderr.replace(temporary, "").splitlines() if "error" in line)
            why = next(said, f"{command[0]} ended with status {done.returncode}, and made no library")
            raise NotCompiledError(f"{source.name} could not be compiled: {why.strip()}")
        with open(built, "rb") as file:
            os.fsync(file.fileno())  # a library of which a part is missing ends the process that calls it
        os.replace(built, target)


def _processor() -> str:
    """What the processor can do: a cache folder may be shared by machines that differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), platform.processor())
