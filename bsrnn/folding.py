"""Folding: every batch normalisation into the layer that follows it, for inference.

In evaluation mode a batch normalisation is y = x · scale + shift with constant scale and
shift, and what follows it is linear in y, W y + b = (W · scale) x + (W shift + b).
The outputs stay the same, the parameters and one pass over the activations go.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bsrnn.bands import BandwiseLinear
from bsrnn.model import BSRNN, BandSplit, Block, MaskDecoder
from bsrnn.norm import BatchNorm


def fold(model: BSRNN) -> BSRNN:
    """A copy of `model` without batch normalisations, in evaluation mode; `model` stays as it is."""
    folded = copy.deepcopy(model).eval()
    with torch.no_grad():
        _fold_band_split(folded.band_split)
        for block in folded.blocks:
            assert isinstance(block, Block)
            _fold_block(block)
        _fold_mask_decoder(folded.mask_decoder)
    return folded


def _fold_band_split(band_split: BandSplit) -> None:
    scale, shift = _affine(band_split.norm)
    for group, linear in zip(band_split.groups, band_split.linears, strict=True):
        assert isinstance(linear, BandwiseLinear)
        start, stop = 2 * group.first_bin, 2 * (group.first_bin + group.num_bins)
        _fold_into_bandwise(
            linear, scale[start:stop].view(group.num_bands, -1), shift[start:stop].view(group.num_bands, -1)
        )
    band_split.norm = nn.Identity()


def _fold_block(block: Block) -> None:
    for norm, lstm in ((block.time_norm, block.time_lstm), (block.band_norm, block.band_lstm)):
        scale, shift = _affine(norm)
        for direction in ("", "_reverse") if lstm.bidirectional else ("",):
            weight = getattr(lstm, f"weight_ih_l0{direction}")  # (4 · hidden, C)
            getattr(lstm, f"bias_ih_l0{direction}").add_(weight @ shift)
            weight.mul_(scale)
    block.time_norm = nn.Identity()
    block.band_norm = nn.Identity()


def _fold_mask_decoder(decoder: MaskDecoder) -> None:
    scale, shift = (statistic.view(-1, 1, decoder.expand.weight.shape[1]) for statistic in _affine(decoder.norm))
    if decoder.scale is not None and decoder.shift is not None:
        scale, shift = scale * decoder.scale, shift * decoder.scale + decoder.shift  # (K, 2, C)
    _fold_into_bandwise(decoder.expand, scale.flatten(0, 1), shift.flatten(0, 1))
    decoder.norm = nn.Identity()
    decoder.scale = decoder.shift = None


def _fold_into_bandwise(linear: BandwiseLinear, scale: Tensor, shift: Tensor) -> None:
    """scale, shift: (band, input)"""
    linear.bias.add_(torch.bmm(shift.unsqueeze(1), linear.weight).squeeze(1))
    linear.weight.mul_(scale.unsqueeze(-1))


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    if not isinstance(norm, BatchNorm):
        raise ValueError("this model has no batch normalisation left to fold: it is folded already")
    return norm.inference_affine()
