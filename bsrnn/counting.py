"""Parameters and multiply-accumulates of a BSRNN.

Counting convention for MACs: one multiply-accumulate for each weight and each time it is
applied, at the frame rate of a second of audio. Band split, LSTMs, linear layers and mask
decoder count; STFT, norms, biases, activations and the complex product of mask and input
do not. That is the convention of FastEnhancer's table (arXiv 2509.21867), whose figures
these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from bsrnn.bands import bands_holding, group_bands
from bsrnn.model import BSRNN, BSRNNConfig
from bsrnn.norm import BatchNorm
from bsrnn.recording_norm import GroupNorm


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters, by part."""

    band_split: int
    blocks: int
    mask_decoder: int
    norms: int  # those of the three above that folding removes

    @property
    def total(self) -> int:
        return self.band_split + self.blocks + self.mask_decoder

    @property
    def folded(self) -> int:
        """What inference needs, every normalisation's parameters folded into its neighbour."""
        return self.total - self.norms

    @property
    def non_decoder(self) -> int:
        """Without the mask decoder, which holds most parameters of the smallest sizes but few of their MACs."""
        return self.total - self.mask_decoder


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates per second of audio, by part."""

    band_split: float
    blocks: float
    mask_decoder: float

    @property
    def total(self) -> float:
        return self.band_split + self.blocks + self.mask_decoder


@lru_cache
def count_parameters(config: BSRNNConfig) -> ParameterCount:
    """Counted from the model itself, built without memory for its weights."""
    with torch.device("meta"):
        model = BSRNN(config)
    norms = sum(_num_parameters(module) for module in model.modules() if isinstance(module, BatchNorm | GroupNorm))
    heads = [model.mask_decoder.scale, model.mask_decoder.shift]  # the decoder's norm, an affine pair a head
    count = ParameterCount(
        band_split=_num_parameters(model.band_split),
        blocks=_num_parameters(model.blocks),
        mask_decoder=_num_parameters(model.mask_decoder),
        norms=norms + sum(parameter.numel() for parameter in heads if parameter is not None),
    )
    assert count.total == _num_parameters(model), "a part of the model is not counted"
    return count


@lru_cache
def count_macs(config: BSRNNConfig) -> MacCount:
    """By formula, for one second of audio; bands above the audio's bins are not computed."""
    channels = config.num_channels
    hidden = 2 * channels
    lstm = 4 * hidden * (channels + hidden)  # four gates, from the input and from the last output
    one_way = lstm + hidden * channels
    ways = (1 if config.causal else 2) + 2  # over time, and over bands
    groups = bands_holding(group_bands(config.band_widths), config.num_bins)
    num_bands = sum(group.num_bands for group in groups)
    num_bins = sum(group.num_bins for group in groups)  # the highest band is computed whole
    head = num_bands * channels * 4 * channels + 4 * channels * 4 * num_bins
    per_second = config.frames_per_second
    return MacCount(
        band_split=per_second * 2 * num_bins * channels,
        blocks=per_second * config.num_layers * num_bands * ways * one_way,
        mask_decoder=per_second * 2 * head,
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
