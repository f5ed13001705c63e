"""The training loss: a weighted sum of terms on the waveform and on the compressed spectrum.

The first five terms are those of FastEnhancer's recipe (arXiv 2509.21867), the last that of Zhang et al. 2024
(arXiv 2406.04269). Every term is a mean over crops, so the loss of a batch is the mean of its crops' losses and does
not depend on how the batch is cut into micro-batches. Spectra are compared at the first recipe's compression, whatever
the compression of the model's STFT is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

from bsrnn.model import Enhanced
from bsrnn.perceptual import FEWEST_PESQ_SAMPLES, perceptual_model
from bsrnn.stft import CompressedSTFT, compress

COMPRESSION = 0.3  # exponent of the magnitude in the spectral terms


@dataclass
class LossConfig:
    """The weight of each term; a term of weight 0 is not computed."""

    magnitude: float = 0.3  # MSE of compressed magnitudes
    complex: float = 0.2  # MSE of compressed spectra, over real and imaginary parts
    consistency: float = 0.3  # the same against the STFT of the estimated waveform
    waveform: float = 0.2  # L1
    pesq: float = field(default=0.0, metadata={"since": "0.2"})  # how far wideband PESQ's raw score is below its best
    multi_resolution: float = field(default=0.0, metadata={"since": "0.2"})  # L1 of waveform and four spectra, scaled

    def __post_init__(self) -> None:
        weights = {term.name: getattr(self, term.name) for term in fields(self)}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"train.losses.{name} = {weight}: expected a finite weight of at least 0")
        if not any(weights.values()):
            raise ValueError("every loss weight is 0: give at least one term a weight")

    @property
    def fewest_samples(self) -> int:
        """Samples of the shortest signal for which every term with a weight is defined."""
        return max(1, FEWEST_PESQ_SAMPLES if self.pesq else 0, FEWEST_RESOLVED_SAMPLES if self.multi_resolution else 0)


@dataclass(frozen=True)
class Loss:
    total: Float[Tensor, ""]  # weighted
    terms: dict[str, Float[Tensor, ""]]  # unweighted, detached


def enhancement_loss(
    estimate: Enhanced, clean: Float[Tensor, "batch sample"], stft: CompressedSTFT, weights: LossConfig
) -> Loss:
    """The loss of an estimate against the clean waveform; computed in 32 bits.

    ValueError for signals of fewer than `weights.fewest_samples` samples.
    """
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
        if weights.pesq:
            terms["pesq"] = perceptual_model(clean.device)(estimate.waveform, clean).loss.mean()
        if weights.multi_resolution:
            terms["multi_resolution"] = multi_resolution_l1(estimate.waveform, clean).mean()
        total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()})


# Of the loss of Zhang et al. 2024: windows in samples, rectangular, half overlapping.
RESOLUTIONS = (256, 512, 768, 1024)
FEWEST_RESOLVED_SAMPLES = max(RESOLUTIONS) // 2 + 1  # at either end half of a window is mirrored
QUIET_VARIANCE = 1e-12  # below it a signal is not brought to unit variance, so that silence has a finite gain


def multi_resolution_l1(
    estimate: Float[Tensor, "batch sample"], clean: Float[Tensor, "batch sample"]
) -> Float[Tensor, " batch"]:
    """Half the L1 distance of waveforms, half that of magnitude spectra at four resolutions (Lu et al. 2022).

    Both signals are brought to unit variance and the estimate scaled to fit the clean one; distances are summed.
    ValueError for signals of fewer than 513 samples.
    """
    if clean.shape[-1] < FEWEST_RESOLVED_SAMPLES:
        raise ValueError(
            f"the multi-resolution loss of {clean.shape[-1]} samples: expected at least {FEWEST_RESOLVED_SAMPLES}; pad "
            "the signals"
        )
    clean, estimate = (
        signal.float() / (signal.float().var(-1, keepdim=True) + QUIET_VARIANCE).sqrt() for signal in (clean, estimate)
    )
    scale = (estimate * clean).sum(-1, keepdim=True) / (estimate.square().sum(-1, keepdim=True) + 1e-8)
    estimate = scale * estimate
    spectral = clean.new_zeros(len(clean))
    for window in RESOLUTIONS:
        magnitudes = []
        for signal in (estimate, clean):
            rectangle = torch.ones(window, device=signal.device)
            spectrum = torch.stft(signal, window, window // 2, window=rectangle, return_complex=True)
            magnitudes.append(_magnitude(torch.view_as_real(spectrum)))
        spectral = spectral + (magnitudes[0] - magnitudes[1]).abs().sum((1, 2)) / len(RESOLUTIONS)
    return 0.5 * (estimate - clean).abs().sum(-1) + 0.5 * spectral


def unprocessed(noisy: Float[Tensor, "batch sample"], stft: CompressedSTFT) -> Enhanced:
    """The noisy input as if it were an estimate: what every model has to beat."""
    return Enhanced(noisy, stft(noisy))


def _compressed(spectrum: Complex[Tensor, "*shape"], stft: CompressedSTFT) -> Float[Tensor, "*shape 2"]:
    """A spectrum of the STFT's compression at that of the losses."""
    return torch.view_as_real(compress(spectrum, COMPRESSION / stft.exponent))


def _magnitude(spectrum: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
    return torch.linalg.vector_norm(spectrum, dim=-1)
