"""The wideband PESQ of paired signals, differentiable: what an ear would mind in an estimate.

The perceptual model of ITU-T P.862 (02/2001) with the input filter and the mapping of P.862.2 (11/2007), in
single precision and batched. A signal on its way to its disturbance:
    1. brought to the standard's level by its power between 350 and 3250 Hz, and filtered as headphones would
    2. Hann frames of 32 ms, half overlapping; power spectra summed to 49 bands of the Bark scale
    3. the clean one is equalised to the estimate's average spectrum, then the estimate to the clean one's power, frame
       by frame
    4. power becomes loudness above the threshold of hearing (Zwicker's law)
    5. the difference of loudness less a dead zone is the disturbance; weighted by the ratio of powers where the
       estimate has more, it is the asymmetric one, which counts what was added
    6. both are averaged over bands, over syllables of 20 frames (exponent 6) and over time (exponent 2)

Left out, because training signals are paired sample by sample: the alignment in time, and with it the second look
at frames that seem badly aligned; and the smaller weight of the beginning of signals of more than 16 s.
The tables are the standard's. Axes: B batch, N sample, T frame, K band of the Bark scale.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLE_RATE = 16_000
FRAME = 512  # samples
HOP = 256  # samples
FEWEST_PESQ_SAMPLES = FRAME - HOP  # the last frame reaches a hop into silence
SYLLABLE = 20  # frames, half overlapping
PADDING = 5_120  # samples of silence that the standard counts at a signal's end
TAIL = 1_024  # samples after which the input filter's impulse response has fallen by 120 dB
FADE = 16  # samples at either end

TARGET_POWER = 1e7
# dB at Hz, straight lines between: the band whose power is the level.
LEVEL_BAND = ((0.0, -500.0), (300.0, -500.0), (350.0, 0.0), (3250.0, 0.0), (3500.0, -500.0), (8000.0, -500.0))
# P.862.2: the section's numerator and denominator in powers of 1/z.
INPUT_FILTER = ((2.740826, -5.4816519, 2.740826), (1.0, -1.9444777, 0.94597794))

POWER_SCALE = 6.910853e-6
LOUDNESS_SCALE = 0.1866055
ZWICKER_EXPONENT = 0.23
SILENT_POWER = 1e7  # audible power of a clean frame below which it is silent
QUIET_SAMPLES = 100.0  # mean magnitude of 5 samples of the levelled clean signal below which its ends are cut

# The bands of the Bark scale at 16 kHz.
BINS = (
    1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2,
    3, 3, 3, 3, 4, 3, 4, 5, 4, 5, 6, 6, 7, 8, 9, 9, 12, 12, 15, 16, 18, 21, 25, 20,
)  # fmt: skip
CENTRES = (  # Bark
    0.078672, 0.316341, 0.636559, 0.961246, 1.290450, 1.624217, 1.962597, 2.305636, 2.653383, 3.005889,
    3.363201, 3.725371, 4.092449, 4.464486, 4.841533, 5.223642, 5.610866, 6.003256, 6.400869, 6.803755,
    7.211971, 7.625571, 8.044611, 8.469146, 8.899232, 9.334927, 9.776288, 10.223374, 10.676242, 11.134952,
    11.599563, 12.070135, 12.546731, 13.029408, 13.518232, 14.013264, 14.514566, 15.022202, 15.536238, 16.056736,
    16.583761, 17.117382, 17.657663, 18.204674, 18.758478, 19.319147, 19.886751, 20.461355, 21.043034,
)  # fmt: skip
WIDTHS = (  # Bark
    0.157344, 0.317994, 0.322441, 0.326934, 0.331474, 0.336061, 0.340697, 0.345381, 0.350114, 0.354897,
    0.359729, 0.364611, 0.369544, 0.374529, 0.379565, 0.384653, 0.389794, 0.394989, 0.400236, 0.405538,
    0.410894, 0.416306, 0.421773, 0.427297, 0.432877, 0.438514, 0.444209, 0.449962, 0.455774, 0.461645,
    0.467577, 0.473569, 0.479621, 0.485736, 0.491912, 0.498151, 0.504454, 0.510819, 0.517250, 0.523745,
    0.530308, 0.536934, 0.543629, 0.550390, 0.557220, 0.564119, 0.571085, 0.578125, 0.585232,
)  # fmt: skip
CORRECTIONS = (  # of a band's summed power
    100.000000, 99.999992, 100.000000, 100.000008, 100.000008, 100.000015, 99.999992, 99.999969, 50.000027, 100.000000,
    99.999969, 100.000015, 99.999947, 100.000061, 53.047077, 110.000046, 117.991989, 65.000000, 68.760147, 69.999931,
    71.428818, 75.000038, 76.843384, 80.968781, 88.646126, 63.864388, 68.155350, 72.547775, 75.584831, 58.379192,
    80.950836, 64.135651, 54.384785, 73.821884, 64.437073, 59.176456, 65.521278, 61.399822, 58.144047, 57.004543,
    64.126297, 54.311001, 61.114979, 55.077751, 56.849335, 55.628868, 53.137054, 54.985844, 79.546974,
)  # fmt: skip
THRESHOLDS = (  # power at the threshold of hearing
    51286152.0, 2454709.5, 70794.59375, 4897.788574, 1174.897705, 389.045166, 104.712860, 45.708820, 17.782795,
    9.772372, 4.897789, 3.090296, 1.905461, 1.258925, 0.977237, 0.724436, 0.562341, 0.457088, 0.389045, 0.331131,
    0.295121, 0.269153, 0.257040, 0.251189, 0.251189, 0.251189, 0.251189, 0.263027, 0.288403, 0.309030,
    0.338844, 0.371535, 0.398107, 0.436516, 0.467735, 0.489779, 0.501187, 0.501187, 0.512861, 0.524807,
    0.524807, 0.524807, 0.512861, 0.478630, 0.426580, 0.371535, 0.363078, 0.416869, 0.537032,
)  # fmt: skip

# Below this mean square (full scale 1) a signal is left as quiet as it is, so that silence has a finite gain.
POWER_FLOOR = 1e-9
# A mean of powers is rounded off below this, so that it has a finite gradient where nothing disturbs.
ROUNDED_BELOW = 1e-3


class Disturbance(NamedTuple):
    """What the model finds in each estimate of a batch; 0 is none."""

    symmetric: Float[Tensor, " batch"]
    asymmetric: Float[Tensor, " batch"]

    @property
    def loss(self) -> Float[Tensor, " batch"]:
        """How far PESQ's raw score lies below its best, 4.5."""
        return 0.1 * self.symmetric + 0.0309 * self.asymmetric

    @property
    def score(self) -> Float[Tensor, " batch"]:
        """Wideband PESQ, MOS-LQO: P.862.2's mapping of the raw score."""
        return 0.999 + 4 / (1 + torch.exp(-1.3669 * (4.5 - self.loss) + 3.8224))


class PerceptualModel(nn.Module):
    """The disturbance of estimates of clean speech at 16 kHz."""

    window: Tensor
    bands: Tensor
    thresholds: Tensor
    exponents: Tensor
    widths: Tensor

    def __init__(self) -> None:
        super().__init__()
        bands = torch.zeros(FRAME // 2, len(BINS))
        first = 0
        for band, (bins, correction) in enumerate(zip(BINS, CORRECTIONS, strict=True)):
            bands[first : first + bins, band] = correction * POWER_SCALE
            first += bins
        bands[0] = 0  # a constant offset is not heard
        centres = torch.tensor(CENTRES)
        self.register_buffer("window", torch.hann_window(FRAME), persistent=False)
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("thresholds", torch.tensor(THRESHOLDS), persistent=False)
        steeper = (6 / (centres + 2)).clamp(1, 2).pow(0.15)  # below 4 Bark
        self.register_buffer("exponents", ZWICKER_EXPONENT * steeper, persistent=False)
        self.register_buffer("widths", torch.tensor(WIDTHS), persistent=False)

    def forward(self, estimate: Float[Tensor, "batch sample"], clean: Float[Tensor, "batch sample"]) -> Disturbance:
        """None where the clean signal is silent, since PESQ is not defined there; ValueError below 256 samples."""
        if clean.shape[-1] < FEWEST_PESQ_SAMPLES:
            raise ValueError(
                f"PESQ of {clean.shape[-1]} samples: expected at least {FEWEST_PESQ_SAMPLES} (16 ms); pad the signals"
            )
        with torch.autocast(clean.device.type, enabled=False):
            heard_clean, heard = (self._level_and_filter(signal.to(self.window.dtype)) for signal in (clean, estimate))
            active = _active_frames(heard_clean)  # (B, T)
            clean_power, power = self._power(heard_clean), self._power(heard)  # (B, T, K)
            speech = (self._audible(clean_power, 100.0) >= SILENT_POWER) & active
            clean_power = clean_power * self._equalisation(clean_power, power, speech, clean.shape[-1])
            clean_audible = self._audible(clean_power, 1.0)
            power = power * _gain(clean_audible, self._audible(power, 1.0))[..., None]

            loudness, clean_loudness = self._loudness(power), self._loudness(clean_power)
            difference = loudness - clean_loudness
            dead_zone = 0.25 * torch.minimum(loudness, clean_loudness)
            disturbance = difference.sign() * F.relu(difference.abs() - dead_zone)
            added = ((power + 50) / (clean_power + 50)).pow(1.2)
            added = torch.where(added < 3, 0, added).clamp(max=12)

            loud = ((clean_audible + 1e5) / TARGET_POWER).pow(0.04)  # (B, T)
            frames = torch.stack(
                [self._over_bands(disturbance, 2.0), self._over_bands(disturbance * added, 1.0)]
            )  # (2, B, T)
            symmetric, asymmetric = _over_time((frames / loud).clamp(max=45), active)
            return Disturbance(symmetric, asymmetric)

    def _level_and_filter(self, signal: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch sample"]:
        num_samples = signal.shape[-1]
        fade = torch.arange(1, FADE, device=signal.device) / FADE
        edges = torch.ones(num_samples, device=signal.device)
        edges[: FADE - 1], edges[-FADE + 1 :] = fade, fade.flip(0)
        size = -(-(num_samples + TAIL) // 4096) * 4096
        spectrum = torch.fft.rfft(signal * edges, size)
        in_band, response = _responses(size, signal.device)
        level = (torch.view_as_real(spectrum).square().sum(-1) * in_band).sum(-1, keepdim=True)
        mean_square = level / (num_samples + PADDING)
        gain = (TARGET_POWER / (mean_square + POWER_FLOOR)).sqrt()
        return gain * torch.fft.irfft(spectrum * response, size)[:, :num_samples]

    def _power(self, signal: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch frame band"]:
        frames = F.pad(signal, (0, HOP)).unfold(-1, FRAME, HOP) * self.window
        spectrum = torch.fft.rfft(frames)[..., : FRAME // 2]
        return torch.view_as_real(spectrum).square().sum(-1) @ self.bands

    def _audible(self, power: Float[Tensor, "batch frame band"], margin: float) -> Float[Tensor, "batch frame"]:
        """Power above `margin` times the threshold of hearing, summed over the bands but the lowest."""
        return torch.where(power > margin * self.thresholds, power, 0)[..., 1:].sum(-1)

    def _equalisation(
        self,
        clean_power: Float[Tensor, "batch frame band"],
        power: Float[Tensor, "batch frame band"],
        speech: Bool[Tensor, "batch frame"],
        num_samples: int,
    ) -> Float[Tensor, "batch 1 band"]:
        num_frames = max(1, (num_samples + PADDING) // HOP - 1)  # the standard's count, silence at the end included

        def average(power: Tensor) -> Tensor:
            heard = speech[..., None] & (power > 100 * self.thresholds)
            return torch.where(heard, power, 0).sum(1, keepdim=True) / num_frames

        return ((average(power) + 1000) / (average(clean_power) + 1000)).clamp(0.01, 100)

    def _loudness(self, power: Float[Tensor, "batch frame band"]) -> Float[Tensor, "batch frame band"]:
        above = torch.maximum(power / self.thresholds, power.new_ones(()))
        scale = LOUDNESS_SCALE * (2 * self.thresholds).pow(self.exponents)
        return scale * ((0.5 + 0.5 * above).pow(self.exponents) - 1)

    def _over_bands(
        self, disturbance: Float[Tensor, "batch frame band"], exponent: float
    ) -> Float[Tensor, "batch frame"]:
        widths = self.widths[1:]  # the lowest band is left out
        total = widths.sum()
        return total * _power_mean(disturbance[..., 1:].abs() * widths, 1 / total, exponent)


@cache
def perceptual_model(device: torch.device) -> PerceptualModel:
    """The model on a device; it has no state."""
    return PerceptualModel().to(device)


@cache
def _responses(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight of each bin's squared magnitude in the sum of squares within the level's band, input filter)"""
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, size // 2 + 1, dtype=torch.float64)
    decibels = torch.full_like(frequencies, -torch.inf)
    for (low, low_db), (high, high_db) in pairwise(LEVEL_BAND):
        between = (frequencies >= low) & (frequencies <= high)
        decibels[between] = low_db + (high_db - low_db) * (frequencies[between] - low) / (high - low)
    weight = 10 ** (decibels / 10) * 2 / size  # Parseval; both sides of the spectrum
    delay = torch.exp(-2j * torch.pi * frequencies / SAMPLE_RATE)
    numerator, denominator = (a + b * delay + c * delay**2 for a, b, c in INPUT_FILTER)
    return weight.float().to(device), (numerator / denominator).to(torch.complex64).to(device)


def _active_frames(clean: Float[Tensor, "batch sample"]) -> Bool[Tensor, "batch frame"]:
    """The frames from the clean signal's first sound to its last; none where it is silent."""
    num_frames = clean.shape[-1] // HOP  # frame t begins at t·HOP; the last reaches into silence
    loud = F.avg_pool1d(clean.detach().abs()[:, None], 5, 1)[:, 0] >= QUIET_SAMPLES
    positions = torch.arange(loud.shape[-1], device=clean.device)
    first = torch.where(loud, positions, loud.shape[-1]).amin(-1, keepdim=True) // HOP
    last = (torch.where(loud, positions, -1).amax(-1, keepdim=True) + 5) // HOP - 1
    frames = torch.arange(num_frames, device=clean.device)
    return (frames >= first) & (frames <= last.clamp(min=0)) & loud.any(-1, keepdim=True)


def _gain(clean: Float[Tensor, "batch frame"], heard: Float[Tensor, "batch frame"]) -> Float[Tensor, "batch frame"]:
    """What brings each frame of the estimate to the clean one's power, smoothed from frame to frame."""
    gain = (clean + 5e3) / (heard + 5e3)
    # g'(t) = 0.8 g(t) + 0.2 g'(t - 1), g'(0) = g(0): its impulse response falls below single precision in 12 frames
    response = 0.8 * 0.2 ** torch.arange(12, device=gain.device, dtype=gain.dtype).flip(0)
    padded = F.pad(gain[:, None], (len(response) - 1, 0), mode="replicate")[:, 0]
    # No convolution of a library's, which on a GPU may round its factors to 10 bits.
    return (padded.unfold(-1, len(response), 1) * response).sum(-1).clamp(3e-4, 5)


def _power_mean(values: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """(Σ weight · value^exponent)^(1/exponent) over the last axis, of values that are not negative."""
    floor = ROUNDED_BELOW**exponent
    return ((weights * values.pow(exponent)).sum(-1) + floor).pow(1 / exponent) - ROUNDED_BELOW


def _over_time(
    frames: Float[Tensor, "kind batch frame"], active: Bool[Tensor, "batch frame"]
) -> Float[Tensor, "kind batch"]:
    """The mean over syllables of the active frames, the first of which begins with the first of these."""
    num_frames = frames.shape[-1]
    num_active = active.sum(-1)  # (B,); they are in one piece
    first = active.int().argmax(-1)
    half = SYLLABLE // 2
    starts = torch.arange(0, num_frames, half, device=frames.device)
    offsets = starts[:, None] + torch.arange(SYLLABLE, device=frames.device)  # (S, 20)
    taken = (first[:, None, None] + offsets).clamp(max=num_frames - 1)  # (B, S, 20)
    within = (offsets < num_active[:, None, None]).to(frames.dtype) / SYLLABLE
    gathered = frames[:, torch.arange(len(active), device=frames.device)[:, None, None], taken]  # (2, B, S, 20)
    syllables = _power_mean(gathered, within, 6.0)
    begun = (starts < num_active[:, None]).to(frames.dtype)  # (B, S)
    return _power_mean(syllables, begun / begun.sum(-1, keepdim=True).clamp(min=1), 2.0)
