"""C sources of this package as shared libraries, compiled on first use for this machine's processor.

The compiler is the system's (`cc`, or what the environment variable CC names). A library is kept in the user's cache
folder ($XDG_CACHE_HOME or ~/.cache), named after its sources, the command, the processor and the C library: several
processes and machines may share the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import signal
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC")
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
COMPILER_SECONDS = 120  # that a compiler may take


class NotCompiledError(OSError):
    """A source could not be compiled, or what came of it could not be kept or loaded; the message is one line."""


class CompilerError(NotCompiledError):
    """The compiler ran to its end and made no library: with other flags it might."""


def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The library made of a source; NotCompiledError where it cannot be had, which is tried once in a process."""
    made = _made(source, flags)
    if isinstance(made, NotCompiledError):
        raise type(made)(*made.args)
    return made


@lru_cache
def _made(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | NotCompiledError:
    try:
        target = _target(source, flags)
        stood = target.exists()
        if stood:
            with contextlib.suppress(OSError):  # of another system, or what a full disk left
                return ctypes.CDLL(str(target))
        _compile(source, flags, target, replaces=stood)
    except NotCompiledError as error:
        return error
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return NotCompiledError(f"{source.name} could not be compiled: {_line_of(error)}")
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        return NotCompiledError(f"{source.name} was compiled and could not be loaded: {_line_of(error)}")


def _line_of(error: Exception) -> str:
    return " ".join(str(error).split())


def _command(flags: tuple[str, ...]) -> list[str]:
    return [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *flags]


def _target(source: Path, flags: tuple[str, ...]) -> Path:
    content = b"".join(path.read_bytes() for path in (source, *HEADERS))
    content += repr((_command(flags), platform.machine(), _processor(), platform.libc_ver())).encode()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # there is no home
        raise NotCompiledError(f"{source.name} has no place to be compiled to: set XDG_CACHE_HOME to a folder")
    return Path(cache, "bsrnn", f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so")


def _compile(source: Path, flags: tuple[str, ...], target: Path, replaces: bool) -> None:
    """Make the target, which appears when it is whole: others may be compiling it or, unless it is replaced, use it."""
    command = _command(flags)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        built = Path(temporary, target.name)
        status, said = _run([*command, str(source), "-o", str(built), "-lm"])
        if status or not built.exists():
            errors = (line for line in said.replace(temporary, "").splitlines() if "error" in line)
            why = next(errors, f"{command[0]} ended with status {status}, and made no library")
            raise CompilerError(f"{source.name} could not be compiled: {why.strip()}")
        with open(built, "rb") as file:
            os.fsync(file.fileno())  # a library of which a part is missing ends the process that calls it
        if replaces:
            os.replace(built, target)
            return
        try:
            os.link(built, target)
        except FileExistsError:  # another process was first, and may have it mapped
            pass
        except OSError:  # a file system without links
            os.replace(built, target)


def _run(words: list[str]) -> tuple[int, str]:
    """A compiler's status and what it wrote about errors; it ends with all its processes if it takes too long."""
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,  # which may be a pipe of audio
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # `cc` starts others, which would outlive it
    ) as process:
        try:
            _, said = process.communicate(timeout=COMPILER_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{words[0]} took longer than {COMPILER_SECONDS} s") from None
            raise
    return process.returncode, said


def _processor() -> str:
    """What the processor can do: a cache folder may be shared by machines that differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), platform.processor())
