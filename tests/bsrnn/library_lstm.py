"""torch's LSTM in place of the compiled one, to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def by_library() -> Iterator[None]:
    """Within it every LSTM of this process is torch's: each is too large for the compiled one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bsrnn.lstm.LARGEST_HIDDEN", 0)
        yield
