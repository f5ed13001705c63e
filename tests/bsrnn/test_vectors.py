"""The compiled code for processors whose vectors are shorter than this one's: what a laptop runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bsrnn import compiled, kernel, lstm
from tests.bsrnn import test_lstm
from tests.bsrnn.test_streaming import assert_the_kernel_equals_torch

SHORTER = {8: "-mno-avx512f", 4: "-mno-avx"}  # floats of a vector, and what keeps the compiler to them
HAS_AVX = " avx " in f"{compiled._processor()} "  # else it has vectors of 4 alone


@pytest.fixture(scope="module", params=SHORTER if HAS_AVX else [4], ids="{} floats".format)
def lanes(request: pytest.FixtureRequest) -> Iterator[int]:
    """Code of vectors of so many floats in place of this processor's."""
    with pytest.MonkeyPatch.context() as patch:
        if HAS_AVX:
            patch.setattr(compiled, "FLAGS", (*compiled.FLAGS, SHORTER[request.param]))
        for cache in (compiled._made, lstm._library):
            cache.cache_clear()
        yield request.param
    for cache in (compiled._made, lstm._library):
        cache.cache_clear()


def test_it_is_the_shorter_vectors_code(lanes: int):
    assert kernel._library().bsrnn_lanes() == lstm._library().lstm_lanes() == lanes


@torch.inference_mode()
@pytest.mark.parametrize("num_streams", [1, 9])  # rows by one, by six and by two
@pytest.mark.parametrize("channels", [8, 24, 40])
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
    test_lstm.assert_those_of_64_bits(inputs, hidden, steps, rows, bidirectional, rows_first=bidirectional)


def test_gates_saturate_and_what_is_no_number_stays_none(lanes: int):
    for scale in (0.0, 1e3, 1e30):
        test_lstm.test_gates_far_beyond_saturation_stay_finite_and_are_the_librarys(scale)
    test_lstm.test_what_is_no_number_stays_none()
