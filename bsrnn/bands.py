"""How a spectrum is split into bands, and how bands of one width are worked on together.

A band is a run of neighbouring bins. Bands of the same width stand side by side, so the
31 bands fall into five groups, and a layer that differs from band to band is one batched
matrix product a group instead of one small product a band.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Width of every band in bins at n_fft = 512 and 16 kHz, 257 bins in all
# (FastEnhancer, arXiv 2509.21867; after Yu et al. 2023, arXiv 2212.00406).
BAND_WIDTHS_16_KHZ = (2, *[3] * 10, *[8] * 12, *[16] * 7, 17)


@dataclass(frozen=True)
class BandGroup:
    """Neighbouring bands of one width: bands [first_band, first_band + num_bands)."""

    width: int
    num_bands: int
    first_band: int
    first_bin: int

    @property
    def num_bins(self) -> int:
        return self.width * self.num_bands


def group_bands(widths: tuple[int, ...]) -> list[BandGroup]:
    """The runs of equal width in `widths`, in order."""
    groups = []
    first_band = first_bin = 0
    for width, run in groupby(widths):
        num_bands = len(list(run))
        groups.append(BandGroup(width, num_bands, first_band, first_bin))
        first_band += num_bands
        first_bin += num_bands * width
    return groups


def bands_holding(groups: Sequence[BandGroup], num_bins: int) -> list[BandGroup]:
    """The bands that the first `num_bins` bins fall into, in groups; the last may reach beyond those bins."""
    held = []
    for group in groups:
        if group.first_bin < num_bins:
            num_bands = min(group.num_bands, math.ceil((num_bins - group.first_bin) / group.width))
            held.append(group if num_bands == group.num_bands else replace(group, num_bands=num_bands))
    return held


class BandwiseLinear(nn.Module):
    """One linear layer for each of several bands, y[n, k] = x[n, k] W[k] + b[k]; or for the first few of them.

    Initialised as torch's `nn.Linear` and 1x1 `nn.Conv1d` are: uniform in ±1/sqrt(in_features).
    """

    def __init__(self, num_bands: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_bands, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_bands, out_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Float[Tensor, "band row input"]) -> Float[Tensor, "band row output"]:
        weight, bias = first(self.weight, len(x)), first(self.bias, len(x))
        return torch.baddbmm(bias.unsqueeze(1), x, weight)


def first(parameter: Tensor, num_rows: int) -> Tensor:
    """The first rows; the parameter itself where that is all of them, which spares a copy of its gradient."""
    return parameter if num_rows == len(parameter) else parameter[:num_rows]
