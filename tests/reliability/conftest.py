"""Faults injected for real, few by default and many with --reliability=full (`make reliability`).

    def test_a_kill_changes_no_weight(times, report, ...):
        for _ in range(times(4, 200)):                       # 4 by default, 200 in full
            ...kill, count...
        report("kills", f"{kills} SIGKILLs: {different} runs differ")

`report` puts the sentence into the block of that name in docs/reliability.md, with the command
beside it; with the default counts it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.benchmarks.page import RELIABILITY, measured_on, write_block


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--reliability") == "full"


@pytest.fixture(scope="session")
def times(full: bool) -> Callable[[int, int], int]:
    """times(quick, full): how often to do what a test does."""
    return lambda quick, many: many if full else quick


@pytest.fixture
def report(full: bool, request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """report(block, markdown): write a figure of docs/reliability.md, with the command that produces it."""

    def write(block: str, markdown: str) -> None:
        if full:
            test = request.node.nodeid.partition("[")[0]
            command = f"`python -m pytest {test} --reliability=full`"
            write_block(RELIABILITY, block, f"{markdown.strip()}\n\n{command}  \n{measured_on('torch')}")

    return write
