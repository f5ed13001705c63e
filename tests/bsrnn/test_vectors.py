"""The compiled code for processors whose vectors are shorter than this one's: what a laptop runs."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from bsrnn import compiled, kernel, lstm
from tests.bsrnn.test_lstm import assert_those_of_64_bits
from tests.bsrnn.test_streaming import assert_the_kernel_equals_torch

SHORTER = {8: "-mno-avx512f", 4: "-mno-avx"}  # floats of a vector, and what keeps the compiler to them
IS_X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module", params=SHORTER if IS_X86 else [4], ids="{} floats".format)
def lanes(request: pytest.FixtureRequest) -> Iterator[int]:
    """Code of vectors of so many floats in place of this processor's."""
    with pytest.MonkeyPatch.context() as patch:
        if IS_X86:
            patch.setattr(compiled, "FLAGS", (*compiled.FLAGS, SHORTER[request.param]))
        for cache in (compiled.library, lstm._library):
            cache.cache_clear()
        yield request.param
    for cache in (compiled.library, lstm._library):
        cache.cache_clear()


def test_it_is_the_shorter_vectors_code(lanes: int):
    assert kernel._library().bsrnn_lanes() == lstm._library().lstm_lanes() == lanes


@torch.inference_mode()
@pytest.mark.parametrize("num_streams", [1, 2, 7])
@pytest.mark.parametrize("channels", [8, 16, 24, 40, 64])
@pytest.mark.parametrize("packed_from", [kernel.PACKED_FROM, 0], ids=["as it is", "packed"])
def test_the_kernel_equals_torch_frame_by_frame(
    lanes: int, channels: int, num_streams: int, packed_from: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bsrnn.kernel.PACKED_FROM", packed_from)
    assert_the_kernel_equals_torch(channels, num_streams)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize(("inputs", "hidden"), [(2, 4), (5, 20), (32, 64), (64, 128)])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (9, 7), (3, 100)])
def test_the_lstm_and_its_gradients_are_those_of_64_bits(
    lanes: int, inputs: int, hidden: int, steps: int, rows: int, bidirectional: bool
):
    assert_those_of_64_bits(inputs, hidden, steps, rows, bidirectional, rows_first=bidirectional)
