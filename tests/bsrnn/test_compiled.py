"""Compiling on first use: what is kept, what is made again, and what a compiler may not do to its caller."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bsrnn import compiled
from bsrnn.compiled import CompilerError, NotCompiledError, library

Compiler = Callable[[str], None]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of one function, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "seven.c"
    path.write_text("int seven(void) { return 7; }\n")
    return path


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Puts a shell script in the compiler's place."""

    def put(script: str) -> None:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))

    return put


def target_of(source: Path) -> Path:
    """Where the library of a source is kept, in a folder that is there."""
    target = compiled._target(source, ())
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def test_a_library_is_kept_and_loaded_again(source: Path, compiler: Compiler):
    compiler('echo called >> "$0.calls"\nexec cc "$@"')
    assert library(source).seven() == 7
    compiled._made.cache_clear()  # as in another process
    assert library(source).seven() == 7
    assert (source.parent / "compiler.calls").read_text() == "called\n"
    assert list(target_of(source).parent.iterdir()) == [target_of(source)]


def test_what_cannot_be_loaded_stays_until_another_is_whole(source: Path, compiler: Compiler):
    """The reason may be of this process alone, such as too many open files."""
    compiler("exit 1")
    target_of(source).write_text("no library")
    with pytest.raises(NotCompiledError):
        library(source)
    assert target_of(source).read_text() == "no library"
    compiler('exec cc "$@"')
    compiled._made.cache_clear()
    assert library(source).seven() == 7


def test_the_first_of_several_processes_that_compile_a_source_wins(source: Path, compiler: Compiler):
    """The others' libraries are not put in the place of one that is in use."""
    compiler('cc "$@"\nfor word; do case "$word" in *.so) cp "$word" "$TARGET"; echo first >> "$TARGET";; esac; done')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARGET", str(target_of(source)))
        assert library(source).seven() == 7
    assert target_of(source).read_bytes().endswith(b"first\n")


def test_a_file_system_without_links_keeps_libraries_too(source: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError("links are not to be had")

    monkeypatch.setattr(os, "link", refuse)
    assert library(source).seven() == 7
    assert target_of(source).exists()


def test_machines_of_different_c_libraries_have_different_libraries(source: Path, monkeypatch: pytest.MonkeyPatch):
    here = target_of(source)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.0"))
    assert target_of(source) != here


def test_a_compiler_that_failed_is_not_asked_again_in_this_process(source: Path, compiler: Compiler):
    compiler('echo called >> "$0.calls"\necho "error: no such thing" >&2\nexit 1')
    for _ in range(3):
        with pytest.raises(CompilerError, match=r"seven.c could not be compiled: error: no such thing"):
            library(source)
    assert (source.parent / "compiler.calls").read_text() == "called\n"


def test_a_compiler_that_takes_too_long_ends_with_all_that_it_started(
    source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
):
    compiler('sleep 60 & echo $! > "$0.child"\nwait')
    monkeypatch.setattr(compiled, "COMPILER_SECONDS", 1)
    with pytest.raises(NotCompiledError, match="took longer than 1 s") as error:
        library(source)
    assert not isinstance(error.value, CompilerError)
    child = Path("/proc", (source.parent / "compiler.child").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split(")")[-1].split()[0] != "Z":  # or not yet waited for
        assert time.monotonic() < deadline, "what the compiler started goes on"
        time.sleep(0.01)


def test_a_library_that_came_out_wrong_is_no_matter_of_flags(source: Path, compiler: Compiler):
    compiler('for word; do case "$word" in *.so) echo nothing > "$word";; esac; done')
    with pytest.raises(NotCompiledError, match=r"seven.c was compiled and could not be loaded: .*seven-") as error:
        library(source)
    assert not isinstance(error.value, CompilerError)


def test_a_compiler_hears_nothing_of_what_this_process_is_told(source: Path, compiler: Compiler):
    compiler('cat > /dev/null\nexec cc "$@"')
    reading, writing = os.pipe()
    os.write(writing, b"audio")
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert library(source).seven() == 7
        assert os.read(0, 10) == b"audio"
    finally:
        os.dup2(before, 0)
        for descriptor in (before, reading):
            os.close(descriptor)
