"""What benchmarks have in common."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Without the checks of types that tests make at every call: of a step of 0.1 ms they are more than half."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
