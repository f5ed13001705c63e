"""Folding: every normalisation's parameters into the layer that follows it, for inference.

In evaluation mode a batch normalisation is y = x · scale + shift with constant scale and
shift, and what follows it is linear in y, W y + b = (W · scale) x + (W shift + b).
The outputs stay the same, the parameters and one pass over the activations go.
A norm whose statistics are of the recording keeps those and gives up its parameters alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bsrnn.bands import BandwiseLinear
from bsrnn.model import BSRNN, BandSplit, Block, MaskDecoder
from bsrnn.norm import BatchNorm
from bsrnn.recording_norm import BandwiseNorm, GroupNorm


def fold(model: BSRNN) -> BSRNN:
    """A copy of `model` whose norms have no parameters, in evaluation mode; `model` stays as it is."""
    folded = copy.deepcopy(model).eval()
    with torch.no_grad():
        _fold_band_split(folded.band_split)
        for block in folded.blocks:
            assert isinstance(block, Block)
            _fold_block(block)
        _fold_mask_decoder(folded.mask_decoder)
    for module in folded.modules():
        if isinstance(module, nn.LSTM):
            module.flatten_parameters()  # in one piece on a GPU, which copying them undid
    return folded


def _fold_band_split(band_split: BandSplit) -> None:
    scale, shift, band_split.norm = _take_affine(band_split.norm)
    for group, linear in zip(band_split.groups, band_split.linears, strict=True):
        assert isinstance(linear, BandwiseLinear)
        start, stop = 2 * group.first_bin, 2 * (group.first_bin + group.num_bins)
        _fold_into_bandwise(
            linear, scale[start:stop].view(group.num_bands, -1), shift[start:stop].view(group.num_bands, -1)
        )


def _fold_block(block: Block) -> None:
    time_scale, time_shift, block.time_norm = _take_affine(block.time_norm)
    band_scale, band_shift, block.band_norm = _take_affine(block.band_norm)
    for scale, shift, lstm in (
        (time_scale, time_shift, block.time_lstm),
        (band_scale, band_shift, block.band_lstm),
    ):
        for direction in ("", "_reverse") if lstm.bidirectional else ("",):
            weight = getattr(lstm, f"weight_ih_l0{direction}")  # (4 · hidden, C)
            getattr(lstm, f"bias_ih_l0{direction}").add_(weight @ shift)
            weight.mul_(scale)


def _fold_mask_decoder(decoder: MaskDecoder) -> None:
    assert decoder.scale is not None
    assert decoder.shift is not None
    scale: Tensor = decoder.scale  # (K, 2, C)
    shift: Tensor = decoder.shift
    if isinstance(decoder.norm, BatchNorm):
        norm_scale, norm_shift, decoder.norm = _take_affine(decoder.norm)
        norm_scale, norm_shift = (part.view(-1, 1, scale.shape[-1]) for part in (norm_scale, norm_shift))
        scale, shift = norm_scale * scale, norm_shift * scale + shift
    _fold_into_bandwise(decoder.expand, scale.flatten(0, 1), shift.flatten(0, 1))
    decoder.scale = decoder.shift = None


def _fold_into_bandwise(linear: BandwiseLinear, scale: Tensor, shift: Tensor) -> None:
    """scale, shift: (band, input)"""
    linear.bias.add_(torch.bmm(shift.unsqueeze(1), linear.weight).squeeze(1))
    linear.weight.mul_(scale.unsqueeze(-1))


def _take_affine(norm: nn.Module) -> tuple[Tensor, Tensor, nn.Module]:
    """(scale, shift, what is left of the norm without them)"""
    if isinstance(norm, BatchNorm):
        return *norm.inference_affine(), nn.Identity()
    parts = norm.norms if isinstance(norm, BandwiseNorm) else [norm]
    scales: list[Tensor] = []
    shifts: list[Tensor] = []
    for part in parts:
        if not isinstance(part, GroupNorm) or part.weight is None or part.bias is None:
            raise ValueError("this model's norms have no parameters left to fold: it is folded already")
        scales.append(part.weight)
        shifts.append(part.bias)
        part.weight = part.bias = None
    return torch.cat(scales), torch.cat(shifts), norm
