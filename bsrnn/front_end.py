"""Published front ends: the STFT, its compression, and its split into bands.

`streaming_16khz` is FastEnhancer's (arXiv 2509.21867), after Yu et al. 2023 (arXiv 2212.00406).

`universal_48khz` is that of Zhang et al. 2024 (arXiv 2406.04269), after Yu & Luo 2023 (ICASSP,
"universal sample rate band-split RNN"): bands up to 24 kHz, of which audio at a lower sample rate
fills the lower ones. Window and hop keep their length in seconds, so a bin is 50 Hz at any rate.

`music_44khz` is the split V7 of Luo & Yu 2023 (arXiv 2209.15174), given there in Hz.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bsrnn.bands import BAND_WIDTHS_16_KHZ


@dataclass(frozen=True)
class FrontEnd:
    """What a BSRNN sees of a waveform; the fields are those of `BSRNNConfig`."""

    sample_rate: int  # Hz
    n_fft: int
    hop_length: int
    compression: float  # exponent of the magnitude; 1 leaves the spectrum as it is
    band_widths: tuple[int, ...]  # bins


def widths_between(edges: Sequence[float], bin_hz: float, num_bins: int) -> tuple[int, ...]:
    """Band widths in bins: a bin belongs to the band [lower edge, upper edge) that its centre frequency is in.

    edges: upper edges in Hz, rising, without the last band's, which takes all bins that are left
    """
    ends = [math.ceil(edge / bin_hz) for edge in edges] + [num_bins]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def _steps(*ranges: tuple[int, int, int]) -> list[float]:
    """Upper edges of the bands of `width` Hz that fill each (start, stop, width), in Hz."""
    return [float(edge) for start, stop, width in ranges for edge in range(start + width, stop + 1, width)]


# 100 Hz wide below 1 kHz, 250 Hz to 4 kHz, 500 Hz to 8 kHz, 1 kHz to 16 kHz, 2 kHz to 20 kHz, and the rest.
_V7_EDGES = _steps(
    (0, 1_000, 100), (1_000, 4_000, 250), (4_000, 8_000, 500), (8_000, 16_000, 1_000), (16_000, 20_000, 2_000)
)

FRONT_ENDS = {
    "streaming_16khz": FrontEnd(16_000, 512, 256, 0.3, BAND_WIDTHS_16_KHZ),
    # 20 bands of 200 Hz, 6 of 500 Hz, 7 of 2 kHz and one of 3 kHz
    "universal_48khz": FrontEnd(48_000, 960, 480, 1.0, (5, *[4] * 19, *[10] * 6, *[40] * 7, 60)),
    "music_44khz": FrontEnd(44_100, 2_048, 512, 1.0, widths_between(_V7_EDGES, 44_100 / 2_048, 1_025)),
}
