"""Objective measures of one enhanced utterance against its clean original, at 16 kHz: docs/recipes.md lists them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata

import numpy as np
from jaxtyping import Float
from pesq import PesqError, pesq

from scaling import composite, dnsmos
from scaling.shards import SAMPLE_RATE

Waveform = Float[np.ndarray, " sample"]


class RefusedError(Exception):
    """A metric that is not defined for a signal, with the reason."""


def si_sdr(estimate: Waveform, clean: Waveform) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, without mean subtraction (Le Roux et al. 2019)."""
    estimate, clean = estimate.astype(np.float64), clean.astype(np.float64)
    energy = clean @ clean
    if energy == 0:
        raise RefusedError("the clean signal is silent")
    target = (estimate @ clean) / energy * clean
    distortion = estimate - target
    if not target.any():
        raise RefusedError("the estimate holds nothing of the clean signal")
    if not distortion.any():
        raise RefusedError("the estimate equals the clean signal")
    return float(10 * np.log10((target @ target) / (distortion @ distortion)))


def pesq_wb(estimate: Waveform, clean: Waveform) -> float:
    """Wideband PESQ (ITU-T P.862.2), 1.04 to 4.64, by the `pesq` package."""
    try:
        with np.errstate(invalid="ignore"):  # it divides by the peak, then refuses silence
            score = float(pesq(SAMPLE_RATE, clean, estimate, "wb"))
    except (PesqError, ValueError, ZeroDivisionError) as error:
        reason = error.args[0] if error.args else error
        raise RefusedError(
            reason.decode() if isinstance(reason, bytes) else f"{reason or type(error).__name__}"
        ) from None
    return score


def short_time_intelligibility(estimate: Waveform, clean: Waveform) -> float:
    """STOI (Taal et al. 2011), at most 1, by the `pystoi` package."""
    return _stoi(estimate, clean, extended=False)


def extended_intelligibility(estimate: Waveform, clean: Waveform) -> float:
    """ESTOI (Jensen & Taal 2016), at most 1, by the `pystoi` package."""
    return _stoi(estimate, clean, extended=True)


def _stoi(estimate: Waveform, clean: Waveform, extended: bool) -> float:
    from pystoi import stoi  # and with it scipy, which takes more than a second: of the processes that score alone

    if not clean.any():
        raise RefusedError("the clean signal is silent")
    with warnings.catch_warnings():
        # pystoi warns, and returns 1e-5, where speech is too short for one measurement
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(clean, estimate, SAMPLE_RATE, extended=extended))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise RefusedError(str(error).split(".")[0]) from None


class Pair:
    """An utterance and its clean original; what several metrics share is computed once."""

    def __init__(self, estimate: Waveform, clean: Waveform) -> None:
        self.estimate, self.clean = estimate, clean

    @cached_property
    def pesq_wb(self) -> float:
        return pesq_wb(self.estimate, self.clean)

    @cached_property
    def segmental_snr(self) -> float:
        return composite.segmental_snr(*self._framed)

    @cached_property
    def composite(self) -> composite.Composite:
        llr = composite.log_likelihood_ratio(*self._framed)
        return composite.composite(
            self.pesq_wb, llr, composite.weighted_spectral_slope(*self._framed), self.segmental_snr
        )

    @cached_property
    def dnsmos(self) -> dnsmos.Ratings:
        if not self.estimate.any():
            raise RefusedError("the estimate is silent")
        return dnsmos.rate(self.estimate)

    @property
    def _framed(self) -> tuple[Waveform, Waveform]:
        if len(self.clean) < composite.FRAME + composite.HOP:
            raise RefusedError(f"it has {len(self.clean)} samples, fewer than a frame")
        if not self.clean.any():
            raise RefusedError("the clean signal is silent")
        return self.estimate, self.clean


@dataclass(frozen=True)
class Metric:
    measure: Callable[[Pair], float]
    packages: tuple[str, ...] = ()  # whose code or networks give the value
    edition: int = 1  # of this project's part of it; raised whenever a value changes

    @property
    def version(self) -> str:
        return ", ".join([str(self.edition), *(f"{name} {metadata.version(name)}" for name in self.packages)])


_DNSMOS = ("speechmos", "onnxruntime")
# By name in the records.
METRICS: dict[str, Metric] = {
    "pesq_wb": Metric(lambda pair: pair.pesq_wb, ("pesq",)),
    "stoi": Metric(lambda pair: short_time_intelligibility(pair.estimate, pair.clean), ("pystoi",)),
    "estoi": Metric(lambda pair: extended_intelligibility(pair.estimate, pair.clean), ("pystoi",)),
    "si_sdr": Metric(lambda pair: si_sdr(pair.estimate, pair.clean)),
    "segmental_snr": Metric(lambda pair: pair.segmental_snr),
    "csig": Metric(lambda pair: pair.composite.signal, ("pesq",)),
    "cbak": Metric(lambda pair: pair.composite.background, ("pesq",)),
    "covl": Metric(lambda pair: pair.composite.overall, ("pesq",)),
    "dnsmos_p808": Metric(lambda pair: pair.dnsmos.p808, _DNSMOS),
    "dnsmos_sig": Metric(lambda pair: pair.dnsmos.speech, _DNSMOS),
    "dnsmos_bak": Metric(lambda pair: pair.dnsmos.background, _DNSMOS),
    "dnsmos_ovrl": Metric(lambda pair: pair.dnsmos.overall, _DNSMOS),
}


def score(estimate: Waveform, clean: Waveform, names: Sequence[str]) -> tuple[dict[str, float | None], dict[str, str]]:
    """(value of each metric, None where refused; reason of every refusal)"""
    pair = Pair(estimate, clean)
    values: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            value = METRICS[name].measure(pair)
            if not np.isfinite(value):
                raise RefusedError(f"its value is {value}")
            values[name] = value
        except RefusedError as error:
            values[name], refused[name] = None, str(error)
    return values, refused


def versions(names: Sequence[str]) -> dict[str, str]:
    """What each metric's values depend on beside the signals: its edition here, and packages."""
    return {name: METRICS[name].version for name in names}
