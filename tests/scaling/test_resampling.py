"""Recordings in the form of the shards: 16 kHz, 16 bits."""

import numpy as np

from scaling.resampling import quantize


def test_rounding_is_to_the_nearest_and_counts_only_what_is_cut() -> None:
    samples = np.array([-1.5, -1, -0.6 / 32768, 0.4 / 32768, 32767.4 / 32768, 1.0])
    quantized, num_clipped = quantize(samples)
    assert quantized.tolist() == [-32768, -32768, -1, 0, 32767, 32767]
    assert num_clipped == 2
