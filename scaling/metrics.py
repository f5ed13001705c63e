"""Objective measures of one enhanced utterance against its clean original, at 16 kHz."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import metadata

import numpy as np
from jaxtyping import Float
from pesq import PesqError, pesq
from pystoi import stoi

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
    if not clean.any():
        raise RefusedError("the clean signal is silent")
    with warnings.catch_warnings():
        # pystoi warns, and returns 1e-5, where speech is too short for one measurement
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(clean, estimate, SAMPLE_RATE, extended=extended))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise RefusedError(str(error).split(".")[0]) from None


# Name in the records -> measure(estimate, clean).
METRICS: dict[str, Callable[[Waveform, Waveform], float]] = {
    "pesq_wb": pesq_wb,
    "stoi": short_time_intelligibility,
    "estoi": extended_intelligibility,
    "si_sdr": si_sdr,
}


def score(estimate: Waveform, clean: Waveform) -> tuple[dict[str, float | None], dict[str, str]]:
    """(value of every metric, None where refused; reason of every refusal)"""
    values: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    for name, measure in METRICS.items():
        try:
            value = measure(estimate, clean)
            if not np.isfinite(value):
                raise RefusedError(f"its value is {value}")
            values[name] = value
        except RefusedError as error:
            values[name], refused[name] = None, str(error)
    return values, refused


def versions() -> dict[str, str]:
    """The packages behind the figures."""
    return {name: metadata.version(name) for name in ("pesq", "pystoi")} | {"metrics": "1 " + " ".join(METRICS)}
