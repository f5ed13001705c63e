"""The band-split recurrent network: by default streaming, with batch normalisation.

Architecture: FastEnhancer's BSRNN (arXiv 2509.21867), after Yu et al. 2023 (arXiv 2212.00406)
and Luo & Yu 2023 (arXiv 2209.15174). With a norm over the recording it is that of Zhang et al.
2024 (arXiv 2406.04269), causal or not, whose bands serve audio of any sample rate.

Axes, in the order in which they stand:
    T frame    B batch    K band    C channel    F bin    R row (T·B)
The frame axis leads inside the network, so the recurrence over time reads memory in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from bsrnn.bands import BAND_WIDTHS_16_KHZ, BandwiseLinear, bands_holding, first, group_bands
from bsrnn.lstm import LSTM
from bsrnn.norm import BatchNorm
from bsrnn.recording_norm import BandwiseNorm, Carried, CumulativeNorm, GroupNorm, normalise
from bsrnn.stft import CompressedSTFT

# What a mean and variance are over: a batch of recordings, one recording, or what has been heard of it.
NORMS = ("batch", "group", "cumulative")


@dataclass(frozen=True)
class BSRNNConfig:
    """The architecture; a size is its width `num_channels` and its depth `num_layers`.

    `band_widths` may hold more bins than the STFT has: bands of a higher sample rate than the audio's.
    """

    num_channels: int = 16
    num_layers: int = 6
    n_fft: int = 512
    hop_length: int = 256
    sample_rate: int = 16_000  # Hz
    compression: float = 0.3  # exponent of the magnitude; 1 leaves the spectrum as it is
    band_widths: tuple[int, ...] = BAND_WIDTHS_16_KHZ  # bins
    norm_batch: int | None = None  # crops behind each batch statistic in training; None: the whole batch
    norm: str = "batch"  # one of NORMS
    causal: bool = True  # whether the recurrence over time runs forward only

    def __post_init__(self) -> None:
        for name in ("num_channels", "num_layers", "n_fft", "hop_length", "sample_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a whole number of at least 1")
        if self.hop_length >= self.n_fft:
            raise ValueError(
                f"hop_length = {self.hop_length}: expected less than n_fft = {self.n_fft}, so that windows overlap"
            )
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression = {self.compression}: expected above 0 and at most 1")
        if self.norm not in NORMS:
            raise ValueError(f"norm = {self.norm}: expected one of {', '.join(NORMS)}")
        reach = sum(self.band_widths)
        if reach < self.num_bins or (reach > self.num_bins and self.norm == "batch"):
            raise ValueError(
                f"band_widths sum to {reach} bins, n_fft = {self.n_fft} has {self.num_bins}: give widths that cover "
                "every bin once" + (", or a norm other than batch" if reach > self.num_bins else "")
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

    @property
    def streams(self) -> bool:
        """Whether frames can be enhanced one by one, as they come."""
        return self.causal and self.norm != "group"

    def check_streams(self) -> None:
        """ValueError if frames cannot be enhanced one by one."""
        if not self.streams:
            raise ValueError(
                f"norm = {self.norm}, causal = {self.causal}: enhances whole recordings alone; "
                "frames can be taken one by one with causal = True and norm = batch or cumulative"
            )

    def at_sample_rate(self, sample_rate: int) -> BSRNNConfig:
        """The same network for audio of another rate: window and hop keep their length in seconds.

        ValueError if they are no whole number of samples there, or the bands do not reach so high.
        """
        n_fft, n_rest = divmod(self.n_fft * sample_rate, self.sample_rate)
        hop_length, hop_rest = divmod(self.hop_length * sample_rate, self.sample_rate)
        if n_rest or hop_rest:
            raise ValueError(
                f"window and hop of {self.n_fft} and {self.hop_length} samples at {self.sample_rate} Hz are no whole "
                f"numbers of samples at {sample_rate} Hz: resample the audio, or take another front end"
            )
        return replace(self, sample_rate=sample_rate, n_fft=n_fft, hop_length=hop_length)


class Enhanced(NamedTuple):
    """What the model makes of a noisy waveform."""

    waveform: Tensor  # (B, samples)
    spectrum: Tensor  # (B, F, T) complex, compressed: what the spectral losses compare


# What a block carries from frame to frame: (hidden, cell), each (1, B·K, 2C), and what its norms carry.
BlockState = tuple[Tensor, ...]


RECORDING_NORMS = {"group": GroupNorm, "cumulative": CumulativeNorm}
# Of the norms of single bands, whose inputs may be as small as a spectrum is; the blocks' have 1e-5.
BAND_EPSILON = 1e-8


class BandSplit(nn.Module):
    """Each band's bins, normalised, to C channels."""

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        self.groups = group_bands(config.band_widths)
        self.norm: nn.Module = (
            BatchNorm(2 * config.num_bins, config.norm_batch)
            if config.norm == "batch"
            else BandwiseNorm(self.groups, RECORDING_NORMS[config.norm], BAND_EPSILON)
        )
        self.linears = nn.ModuleList(
            BandwiseLinear(group.num_bands, 2 * group.width, config.num_channels) for group in self.groups
        )

    def forward(
        self, spectrum: Float[Tensor, "frame batch feature"], carried: Carried = ()
    ) -> tuple[Float[Tensor, "frame batch band channel"], Carried]:
        """`feature` holds the real and imaginary part of each bin in turn, 2·F in all, and F decides on K."""
        num_frames, batch = spectrum.shape[:2]
        groups = bands_holding(self.groups, spectrum.shape[-1] // 2)
        num_missing = 2 * (groups[-1].first_bin + groups[-1].num_bins) - spectrum.shape[-1]
        if num_missing:  # the highest band reaches beyond the spectrum
            spectrum = F.pad(spectrum, (0, num_missing))
        x, carried = normalise(self.norm, spectrum, carried)
        x = x.reshape(num_frames * batch, -1)  # (R, 2F)
        bands = []
        parts = x.split([2 * group.num_bins for group in groups], dim=1)
        for group, linear, part in zip(groups, self.linears, parts, strict=False):
            inputs = part.unflatten(1, (group.num_bands, 2 * group.width))  # (R, K of group, 2·width)
            bands.append(linear(inputs.transpose(0, 1)))  # (K of group, R, C)
        return torch.cat(bands).transpose(0, 1).reshape(num_frames, batch, -1, bands[0].shape[-1]), carried


class Block(nn.Module):
    """A recurrence over time, forward only if causal, then one over the bands, in both directions."""

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        channels = config.num_channels
        hidden = 2 * channels
        self.time_norm = self._norm(config)
        self.time_lstm = LSTM(channels, hidden, bidirectional=not config.causal)
        self.time_linear = nn.Linear(hidden if config.causal else 2 * hidden, channels)
        self.band_norm = self._norm(config)
        self.band_lstm = LSTM(channels, hidden, bidirectional=True, batch_first=True)
        self.band_linear = nn.Linear(2 * hidden, channels)

    def forward(
        self, x: Float[Tensor, "frame batch band channel"], state: BlockState | None = None
    ) -> tuple[Float[Tensor, "frame batch band channel"], BlockState]:
        num_frames, batch, num_bands, channels = x.shape
        state = state or ()
        over_time, time_carried = normalise(self.time_norm, x, state[2:3])
        over_time = over_time.reshape(num_frames, batch * num_bands, channels)
        over_time, recurrent = self.time_lstm(over_time, state[:2] or None)  # (T, B·K, 2C), 4C if not causal
        x = x + self.time_linear(over_time).view(x.shape)
        over_bands, band_carried = normalise(self.band_norm, x, state[3:4])
        over_bands = over_bands.reshape(num_frames * batch, num_bands, channels)
        over_bands, _ = self.band_lstm(over_bands)  # (R, K, 4C)
        x = x + self.band_linear(over_bands).view(x.shape)
        return x, (*recurrent, *time_carried, *band_carried)

    @staticmethod
    def _norm(config: BSRNNConfig) -> nn.Module:
        """Over all bands and channels, with parameters for each channel."""
        if config.norm == "batch":
            return BatchNorm(config.num_channels, config.norm_batch)
        return RECORDING_NORMS[config.norm](1, config.num_channels)


class MaskDecoder(nn.Module):
    """Each band's channels to a complex mask and a complex residual for each of its bins.

    The two heads (0 mask, 1 residual) have the same input, hence the same statistics, which are
    computed once; each head has its own affine parameters.
    """

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        channels, num_bands = config.num_channels, config.num_bands
        self.groups = group_bands(config.band_widths)
        self.norm: nn.Module = (
            BatchNorm(num_bands * channels, config.norm_batch, affine=False)
            if config.norm == "batch"
            else RECORDING_NORMS[config.norm](num_bands, num_bands * channels, BAND_EPSILON, affine=False)
        )
        self.scale: nn.Parameter | None = nn.Parameter(torch.ones(num_bands, 2, channels))
        self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(num_bands, 2, channels))
        self.expand = BandwiseLinear(2 * num_bands, channels, 4 * channels)  # band-major: (band, head)
        self.outputs = nn.ModuleList(
            BandwiseLinear(2 * group.num_bands, 4 * channels, 4 * group.width) for group in self.groups
        )

    def forward(
        self, x: Float[Tensor, "frame batch band channel"], num_bins: int, carried: Carried = ()
    ) -> tuple[Complex[Tensor, "batch {num_bins} frame"], Complex[Tensor, "batch {num_bins} frame"], Carried]:
        """(mask, residual, what the norm carries)"""
        num_frames, batch, num_bands, channels = x.shape
        x, carried = normalise(self.norm, x.flatten(2), carried)
        x = x.reshape(-1, num_bands, channels).transpose(0, 1)  # (K, R, C)
        hidden = torch.tanh(self.expand(self._for_heads(x)))  # (2K, R, 4C)
        features = []
        groups = bands_holding(self.groups, num_bins)
        parts = hidden.split([2 * group.num_bands for group in groups])
        for group, linear, part in zip(groups, self.outputs, parts, strict=False):
            outputs = F.glu(linear(part), dim=-1)  # (K of group · 2, R, 2·width)
            outputs = outputs.view(group.num_bands, 2, -1, group.width, 2)
            features.append(outputs.permute(1, 2, 0, 3, 4).flatten(2, 3))  # (2, R, bins of group, 2)
        spectra = torch.view_as_complex(torch.cat(features, dim=2).float())  # (2, R, F)
        spectra = spectra.view(2, num_frames, batch, -1)[..., :num_bins]  # the highest band may reach beyond
        mask, residual = spectra.permute(0, 2, 3, 1)  # (B, F, T) each
        return mask, residual, carried

    def _for_heads(self, x: Float[Tensor, "band row channel"]) -> Float[Tensor, "head row channel"]:
        """Each band twice, once for each head with that head's affine parameters.

        They go with the activations, since the weights that follow would have to be copied in every pass to take
        them up, and there are more of those than of activations where crops are few and channels many.
        """
        both = x.unsqueeze(1)  # (K, 1, R, C)
        if self.scale is None or self.shift is None:
            return both.expand(-1, 2, -1, -1).flatten(0, 1)
        scale, shift = (first(part, len(x)).unsqueeze(2) for part in (self.scale, self.shift))  # (K, 2, 1, C)
        return torch.addcmul(shift, both, scale).flatten(0, 1)


class BSRNN(nn.Module):
    """Noisy waveform in, enhanced waveform out; no look-ahead beyond the STFT frame if `config.streams`."""

    def __init__(self, config: BSRNNConfig) -> None:
        super().__init__()
        self.config = config
        self.stft = _stft(config)
        self.band_split = BandSplit(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.mask_decoder = MaskDecoder(config)
        by_group = [self.band_split.linears, self.mask_decoder.outputs]
        if isinstance(self.band_split.norm, BandwiseNorm):
            by_group.append(self.band_split.norm.norms)
        for index, group in enumerate(self.band_split.groups):
            if group.first_bin >= config.num_bins:  # no audio at this rate reaches these bands
                for parts in by_group:
                    parts[index].requires_grad_(False)

    def at_sample_rate(self, sample_rate: int) -> BSRNN:
        """The same network, its weights shared, for audio of another sample rate; ValueError as the config's."""
        config = self.config.at_sample_rate(sample_rate)
        with torch.device("meta"):
            other = BSRNN(config)
        other.stft = _stft(config).to(self.stft.window.device)
        other.band_split, other.blocks, other.mask_decoder = self.band_split, self.blocks, self.mask_decoder
        return other.train(self.training)

    def forward(self, noisy: Float[Tensor, "batch sample"]) -> Enhanced:
        """Enhance a batch of whole waveforms of at least one sample, full scale ±1."""
        spectrum, _ = self.enhance_spectrum(self.stft(noisy))
        return Enhanced(self.stft.inverse(spectrum, noisy.shape[-1]), spectrum)

    def enhance_spectrum(
        self, noisy: Complex[Tensor, "batch bin frame"], states: Sequence[BlockState] | None = None
    ) -> tuple[Complex[Tensor, "batch bin frame"], list[BlockState]]:
        """Enhance compressed spectra, going on from `states` (from silence if None), which are returned renewed.

        States are one tuple of tensors a block, and where the norms carry something a last one for the norms
        of the band split and the mask decoder; streams lie along axis 1. ValueError if this model does not stream.
        """
        if states is not None:
            self.config.check_streams()
        states = states or ()
        ends = states[-1] if len(states) > len(self.blocks) else ()
        x = torch.view_as_real(noisy.permute(2, 0, 1)).flatten(2)  # (T, B, 2F)
        x, split_carried = self.band_split(x, ends[:1])  # (T, B, K, C)
        renewed = []
        for index, block in enumerate(self.blocks):
            x, state = block(x, states[index] if states else None)
            renewed.append(state)
        mask, residual, decoder_carried = self.mask_decoder(x, noisy.shape[1], ends[1:])
        if split_carried:
            renewed.append((*split_carried, *decoder_carried))
        return mask * noisy + residual, renewed


def _stft(config: BSRNNConfig) -> CompressedSTFT:
    """Of a gain that gives a sound the same spectrum at any sample rate: that of the rate all bands are for."""
    return CompressedSTFT(
        config.n_fft,
        config.hop_length,
        config.compression,
        gain=2 * (sum(config.band_widths) - 1) / config.n_fft,
    )
