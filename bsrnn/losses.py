"""The training loss: a weighted sum of terms on the waveform and on the compressed spectrum.

Terms and weights are those of FastEnhancer's recipe (arXiv 2509.21867) without its PESQ term.
Every term is a mean over all its elements, so a batch's loss is the mean of its crops' losses.
Spectra are compared at the recipe's compression, whatever the compression of the model's STFT is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

from bsrnn.model import Enhanced
from bsrnn.stft import CompressedSTFT, compress

COMPRESSION = 0.3  # exponent of the magnitude in the spectral terms


@dataclass
class LossConfig:
    """The weight of each term; a term of weight 0 is not computed."""

    magnitude: float = 0.3  # MSE of compressed magnitudes
    complex: float = 0.2  # MSE of compressed spectra, over real and imaginary parts
    consistency: float = 0.3  # the same against the STFT of the estimated waveform
    waveform: float = 0.2  # L1

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"loss.{name} = {weight}: expected a finite weight of at least 0")
        if not any(weights.values()):
            raise ValueError("every loss weight is 0: give at least one term a weight")


@dataclass(frozen=True)
class Loss:
    total: Float[Tensor, ""]  # weighted
    terms: dict[str, Float[Tensor, ""]]  # unweighted, detached


def enhancement_loss(
    estimate: Enhanced, clean: Float[Tensor, "batch sample"], stft: CompressedSTFT, weights: LossConfig
) -> Loss:
    """The loss of an estimate against the clean waveform; computed in 32 bits."""
    with torch.autocast(clean.device.type, enabled=False):
        spectrum = _compressed(stft(clean), stft)  # (B, F, T, 2)
        estimated = _compressed(estimate.spectrum, stft)
        terms: dict[str, Tensor] = {}
        if weights.magnitude:
            terms["magnitude"] = F.mse_loss(_magnitude(estimated), _magnitude(spectrum))
        if weights.complex:
            terms["complex"] = F.mse_loss(estimated, spectrum)
        if weights.consistency:
            terms["consistency"] = F.mse_loss(_compressed(stft(estimate.waveform), stft), spectrum)
        if weights.waveform:
            terms["waveform"] = F.l1_loss(estimate.waveform, clean)
        total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()})


def unprocessed(noisy: Float[Tensor, "batch sample"], stft: CompressedSTFT) -> Enhanced:
    """The noisy input as if it were an estimate: what every model has to beat."""
    return Enhanced(noisy, stft(noisy))


def _compressed(spectrum: Complex[Tensor, "*shape"], stft: CompressedSTFT) -> Float[Tensor, "*shape 2"]:
    """A spectrum of the STFT's compression at that of the losses."""
    return torch.view_as_real(compress(spectrum, COMPRESSION / stft.exponent))


def _magnitude(spectrum: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
    return torch.linalg.vector_norm(spectrum, dim=-1)
