"""Pages whose figures a command writes: docs/performance.md and docs/reliability.md.

A page is prose by hand with named blocks in it, each rewritten by the one benchmark or test that
measures what it says:

    <!-- block: crops -->
    ...whatever the benchmark last measured...
    <!-- end: crops -->

    write_block(PERFORMANCE, "crops", markdown)

Move a block to where the prose wants it; a block that the page lacks is added at its end.
"""

from __future__ import annotations

import fcntl
import os
import platform
from importlib import metadata
from pathlib import Path

from bsrnn.processor import processor_name

DOCS = Path(__file__).parents[2] / "docs"
PERFORMANCE = DOCS / "performance.md"
RELIABILITY = DOCS / "reliability.md"


def write_block(page: Path, name: str, markdown: str) -> None:
    """Put `markdown` in place of the block `name` of a page; ValueError for a page whose block has no end."""
    begin, end = f"<!-- block: {name} -->", f"<!-- end: {name} -->"
    block = f"{begin}\n{markdown.strip()}\n{end}"
    with page.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # benchmarks may run side by side
        text = file.read()
        before, found, rest = text.partition(begin)
        if found:
            _, ended, after = rest.partition(end)
            if not ended:
                raise ValueError(f"{page}: block {name} has no line {end}")
            text = before + block + after
        else:
            text = f"{text.rstrip()}\n\n{block}\n"
        file.seek(0)
        file.write(text)
        file.truncate()


def read_block(page: Path, name: str) -> str:
    """What a block of a page says; ValueError if the page has no such block."""
    begin, end = f"<!-- block: {name} -->", f"<!-- end: {name} -->"
    _, begun, rest = page.read_text(encoding="utf-8").partition(begin)
    content, ended, _ = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{page} has no block {name}")
    return content.strip()


def measured_on(*packages: str) -> str:
    """Where a figure comes from: processor, cores, their load, Python and the versions of packages, in one line."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[1]  # above the cores: others were at work
    machine = f"{processor_name()}, {cores} cores, load {load:.0f}"
    return f"{machine}, Python {platform.python_version()}{', ' if versions else ''}{versions}"
