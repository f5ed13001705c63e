"""The streaming BSRNN with batch normalisation.

Architecture: FastEnhancer's BSRNN (arXiv 2509.21867), after Yu et al. 2023 (arXiv 2212.00406)
and Luo & Yu 2023 (arXiv 2209.15174).

Axes, in the order in which they stand:
    T frame    B batch    K band    C channel    F bin    R row (T·B)
The frame axis leads inside the network, so the recurrence over time reads memory in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from bsrnn.bands import BAND_WIDTHS_16_KHZ, BandwiseLinear, group_bands
from bsrnn.norm import BatchNorm
from bsrnn.stft import CompressedSTFT


@dataclass(frozen=True)
class BSRNNConfig:
    """The architecture; a size is its width `num_channels` and its depth `num_layers`."""

    num_channels: int = 16
    num_layers: int = 6
    n_fft: int = 512
    hop_length: int = 256
    sample_rate: int = 16_000  # Hz
    compression: float = 0.3  # exponent of the magnitude
    band_widths: tuple[int, ...] = BAND_WIDTHS_16_KHZ  # bins
    norm_batch: int | None = None  # crops behind each batch statistic in training; None: the whole batch

    def __post_init__(self) -> None:
        for name in ("num_channels", "num_layers", "n_fft", "hop_length", "sample_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a whole number of at least 1")
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression = {self.compression}: expected above 0 and at most 1")
        if sum(self.band_widths) != self.num_bins:
            raise ValueError(
                f"band_widths sum to {sum(self.band_widths)} bins, n_fft = {self.n_fft} has {self.num_bins}: "
                "give widths that cover every bin once"
            )
        if self.norm_batch is not None and self.norm_batch < 1:
            raise ValueError(f"norm_batch = {self.norm_batch}: expected at least 1 crop, or null for the whole batch")

    @property
    def num_bins(self) -> int:
        return self.n_fft // 2 + 1

    @property
    def num_bands(self) -> int:
        return len(self.band_widths)

    @property
    def frames_per_second(self) -> float:
        return self.sample_rate / self.hop_length


class Enhanced(NamedTuple):
    """What the model makes of a noisy waveform."""

    waveform: Tensor  # (B, samples)
    spectrum: Tensor  # (B, F, T) complex, compressed: what the spectral losses compare


# The two tensors (hidden, cell), each (1, B·K, 2C), that a block carries from frame to frame.
BlockState = tuple[Tensor, Tensor]


class BandSplit(nn.Module):
    """Each band's bins, normalised, to C channels."""

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        self.groups = group_bands(config.band_widths)
        self.norm: nn.Module = BatchNorm(2 * config.num_bins, config.norm_batch)
        self.linears = nn.ModuleList(
            BandwiseLinear(group.num_bands, 2 * group.width, config.num_channels) for group in self.groups
        )

    def forward(self, spectrum: Float[Tensor, "frame batch feature"]) -> Float[Tensor, "frame batch band channel"]:
        """`feature` holds the real and imaginary part of each bin in turn, 2·F in all."""
        num_frames, batch = spectrum.shape[:2]
        x = self.norm(spectrum).reshape(num_frames * batch, -1)  # (R, 2F)
        bands = []
        for group, linear in zip(self.groups, self.linears, strict=True):
            start, stop = 2 * group.first_bin, 2 * (group.first_bin + group.num_bins)
            inputs = x[:, start:stop].view(-1, group.num_bands, 2 * group.width)  # (R, K of group, 2·width)
            bands.append(linear(inputs.transpose(0, 1)))  # (K of group, R, C)
        return torch.cat(bands).transpose(0, 1).reshape(num_frames, batch, -1, bands[0].shape[-1])


class Block(nn.Module):
    """A recurrence over time, forward only, then one over the bands, in both directions."""

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        channels = config.num_channels
        hidden = 2 * channels
        self.time_norm: nn.Module = BatchNorm(channels, config.norm_batch)
        self.time_lstm = nn.LSTM(channels, hidden)
        self.time_linear = nn.Linear(hidden, channels)
        self.band_norm: nn.Module = BatchNorm(channels, config.norm_batch)
        self.band_lstm = nn.LSTM(channels, hidden, bidirectional=True)
        self.band_linear = nn.Linear(2 * hidden, channels)

    def forward(
        self, x: Float[Tensor, "frame batch band channel"], state: BlockState | None = None
    ) -> tuple[Float[Tensor, "frame batch band channel"], BlockState]:
        num_frames, batch, num_bands, channels = x.shape
        over_time = self.time_norm(x).reshape(num_frames, batch * num_bands, channels)
        over_time, state = self.time_lstm(over_time, state)  # (T, B·K, 2C)
        x = x + self.time_linear(over_time).view(x.shape)
        over_bands = self.band_norm(x).reshape(num_frames * batch, num_bands, channels)
        over_bands, _ = self.band_lstm(over_bands.transpose(0, 1))  # (K, R, 4C)
        x = x + self.band_linear(over_bands).transpose(0, 1).view(x.shape)
        return x, state


class MaskDecoder(nn.Module):
    """Each band's channels to a complex mask and a complex residual for each of its bins.

    The two heads (0 mask, 1 residual) have the same input, hence the same batch statistics,
    which are computed once; each head has its own affine parameters.
    """

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        channels, num_bands = config.num_channels, config.num_bands
        self.groups = group_bands(config.band_widths)
        self.norm: nn.Module = BatchNorm(num_bands * channels, config.norm_batch, affine=False)
        self.scale: nn.Parameter | None = nn.Parameter(torch.ones(num_bands, 2, channels))
        self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(num_bands, 2, channels))
        self.expand = BandwiseLinear(2 * num_bands, channels, 4 * channels)  # band-major: (band, head)
        self.outputs = nn.ModuleList(
            BandwiseLinear(2 * group.num_bands, 4 * channels, 4 * group.width) for group in self.groups
        )

    def forward(
        self, x: Float[Tensor, "frame batch band channel"]
    ) -> tuple[Complex[Tensor, "batch bin frame"], Complex[Tensor, "batch bin frame"]]:
        """(mask, residual)"""
        num_frames, batch, num_bands, channels = x.shape
        x = self.norm(x.flatten(2)).reshape(-1, num_bands, channels).transpose(0, 1)  # (K, R, C)
        weight, bias = self._expansion()
        hidden = torch.baddbmm(bias, x, weight)  # (K, R, 2·4C): both heads side by side
        hidden = torch.tanh(hidden)
        hidden = hidden.view(num_bands, -1, 2, 4 * channels).transpose(1, 2)  # (K, 2, R, 4C)
        features = []
        for group, linear in zip(self.groups, self.outputs, strict=True):
            inputs = hidden[group.first_band : group.first_band + group.num_bands]
            outputs = F.glu(linear(inputs.flatten(0, 1)), dim=-1)  # (K of group · 2, R, 2·width)
            outputs = outputs.view(group.num_bands, 2, -1, group.width, 2)
            features.append(outputs.permute(1, 2, 0, 3, 4).flatten(2, 3))  # (2, R, bins of group, 2)
        spectra = torch.view_as_complex(torch.cat(features, dim=2).float())  # (2, R, F)
        mask, residual = spectra.view(2, num_frames, batch, -1).permute(0, 2, 3, 1)  # (B, F, T) each
        return mask, residual

    def _expansion(self) -> tuple[Tensor, Tensor]:
        """The first layer of both heads as one, with the heads' affine parameters multiplied in.

        The weights are far smaller than the activations, so this is cheaper than scaling those.
        """
        num_bands = self.expand.weight.shape[0] // 2
        weight: Tensor = self.expand.weight  # (2K, C, 4C)
        bias: Tensor = self.expand.bias  # (2K, 4C)
        if self.scale is not None and self.shift is not None:
            bias = bias + torch.bmm(self.shift.flatten(0, 1).unsqueeze(1), weight).squeeze(1)
            weight = weight * self.scale.flatten(0, 1).unsqueeze(-1)
        weight = weight.unflatten(0, (num_bands, 2)).transpose(1, 2).flatten(2)  # (K, C, 2·4C)
        return weight, bias.view(num_bands, 1, -1)


class BSRNN(nn.Module):
    """Noisy waveform in, enhanced waveform out; no look-ahead beyond the STFT frame."""

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        self.config = config
        self.stft = CompressedSTFT(config.n_fft, config.hop_length, config.compression)
        self.band_split = BandSplit(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.mask_decoder = MaskDecoder(config)

    def forward(self, noisy: Float[Tensor, "batch sample"]) -> Enhanced:
        """Enhance a batch of whole waveforms of at least n_fft / 2 + 1 samples, full scale ±1."""
        spectrum, _ = self.enhance_spectrum(self.stft(noisy))
        return Enhanced(self.stft.inverse(spectrum, noisy.shape[-1]), spectrum)

    def enhance_spectrum(
        self, noisy: Complex[Tensor, "batch bin frame"], states: list[BlockState] | None = None
    ) -> tuple[Complex[Tensor, "batch bin frame"], list[BlockState]]:
        """Enhance compressed spectra, going on from `states` (from silence if None), which are returned renewed."""
        x = torch.view_as_real(noisy.permute(2, 0, 1)).flatten(2)  # (T, B, 2F)
        x = self.band_split(x)  # (T, B, K, C)
        renewed = []
        for index, block in enumerate(self.blocks):
            x, state = block(x, states[index] if states is not None else None)
            renewed.append(state)
        mask, residual = self.mask_decoder(x)
        return mask * noisy + residual, renewed
