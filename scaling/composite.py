"""Segmental SNR and the composite measures CSIG, CBAK, COVL (Hu & Loizou 2008, IEEE TASLP 16(1), 229-238).

Signals are cut into Hann frames of 30 ms that advance by 7.5 ms, the last of them left out. From these come the
segmental SNR, the log-likelihood ratio (LLR) of linear prediction, and the weighted spectral slope distance (WSS; Klatt
1982) in 25 critical bands up to 3.6 kHz; of LLR and WSS the worst 5 % of frames are left out. The composite measures
weigh these with PESQ, and predict ratings from 1 to 5 of the signal, of the background and overall. As is usual at
16 kHz, PESQ is the wideband one and linear prediction has order 16. Loizou's book (Speech Enhancement: Theory and
Practice, 2nd ed. 2013, ch. 11) has the constants.

Axes: T frame, N sample of a frame, P order of prediction, K critical band.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SAMPLE_RATE = 16_000
FRAME, HOP = 480, 120  # samples
ORDER = 16
KEPT = 0.95  # of the frames, the best
MIN_SNR, MAX_SNR = -10.0, 35.0  # dB, of a frame

N_FFT = 1024
CENTRES = (
    50.0, 120.0, 190.0, 260.0, 330.0, 400.0, 470.0, 540.0, 617.372, 703.378, 798.717, 904.128, 1020.38,
    1148.30, 1288.72, 1442.54, 1610.70, 1794.16, 1993.93, 2211.08, 2446.71, 2701.97, 2978.04, 3276.17, 3597.63,
)  # fmt: skip
WIDTHS = (
    70.0, 70.0, 70.0, 70.0, 70.0, 70.0, 70.0, 77.3724, 86.0056, 95.3398, 105.411, 116.256, 127.914,
    140.423, 153.823, 168.154, 183.457, 199.776, 217.153, 235.631, 255.255, 276.072, 298.126, 321.465, 346.136,
)  # fmt: skip
SMALLEST_DB = -100.0
GLOBAL_PEAK, LOCAL_PEAK = 20.0, 1.0  # Klatt's constants, dB
EPS = float(np.finfo(np.float64).eps)

Signal = Float[np.ndarray, " sample"]


class Composite(NamedTuple):
    """Predicted ratings, 1 to 5."""

    signal: float
    background: float
    overall: float


def composite(pesq_wb: float, llr: float, wss: float, segmental_snr: float) -> Composite:
    """Table VI of Hu & Loizou 2008, kept within the scale."""
    ratings = (
        3.093 - 1.029 * llr + 0.603 * pesq_wb - 0.009 * wss,
        1.634 + 0.478 * pesq_wb - 0.007 * wss + 0.063 * segmental_snr,
        1.594 + 0.805 * pesq_wb - 0.512 * llr - 0.007 * wss,
    )
    return Composite(*(min(5.0, max(1.0, rating)) for rating in ratings))


def segmental_snr(estimate: Signal, clean: Signal) -> float:
    """Mean over frames of the SNR in dB, each kept within -10 to 35 dB."""
    signal, noise = _frames(clean), _frames(clean - estimate)
    ratio = (signal**2).sum(1) / ((noise**2).sum(1) + EPS)
    return float(np.clip(10 * np.log10(ratio + EPS), MIN_SNR, MAX_SNR).mean())


def log_likelihood_ratio(estimate: Signal, clean: Signal) -> float:
    """How much worse the estimate's linear prediction predicts the clean frame than the frame's own does."""
    clean_lags, lags = _autocorrelation(_frames(clean + EPS)), _autocorrelation(_frames(estimate + EPS))
    distances = np.arange(ORDER + 1)
    toeplitz = clean_lags[:, np.abs(distances[:, None] - distances)]  # (T, P + 1, P + 1)
    own, other = prediction_error_filters(clean_lags), prediction_error_filters(lags)
    errors = [np.einsum("tp,tpq,tq->t", filters, toeplitz, filters) for filters in (other, own)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = errors[0] / errors[1]
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        return _mean_of_best(np.log(np.where(ratio <= 0, 1000.0, ratio)))


def weighted_spectral_slope(estimate: Signal, clean: Signal) -> float:
    """The distance of the slopes of the two critical-band spectra, weighted towards their peaks."""
    spectra = [_critical_bands(signal + EPS) for signal in (clean, estimate)]  # dB, (T, K)
    weights = 0.5 * (_slope_weights(spectra[0]) + _slope_weights(spectra[1]))
    difference = np.diff(spectra[0]) - np.diff(spectra[1])
    return _mean_of_best((weights * difference**2).sum(1) / weights.sum(1))


# --- parts ---------------------------------------------------------------------------------


def _frames(signal: Signal) -> Float[np.ndarray, "frame 480"]:
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(1, FRAME + 1) / (FRAME + 1)))
    framed = np.lib.stride_tricks.sliding_window_view(signal.astype(np.float64), FRAME)[::HOP]
    return framed[:-1] * window


def _mean_of_best(distances: Float[np.ndarray, " frame"]) -> float:
    return float(np.sort(distances)[: round(len(distances) * KEPT)].mean())


def _autocorrelation(frames: Float[np.ndarray, "frame sample"]) -> Float[np.ndarray, "frame lag"]:
    """Lags 0 to the order."""
    power = np.abs(np.fft.rfft(frames, N_FFT)) ** 2
    return np.fft.irfft(power)[:, : ORDER + 1]


def prediction_error_filters(lags: Float[np.ndarray, "frame lag"]) -> Float[np.ndarray, "frame lag"]:
    """(1, -a1, ..., -aP) of each frame's linear prediction, by Levinson and Durbin's recursion."""
    filters = np.zeros_like(lags)
    filters[:, 0] = 1
    error = lags[:, 0].copy()
    for order in range(1, lags.shape[1]):
        unpredicted = (filters[:, :order] * lags[:, order:0:-1]).sum(1)
        reflection = np.divide(-unpredicted, error, out=np.zeros_like(error), where=error != 0)
        filters[:, 1 : order + 1] += reflection[:, None] * filters[:, order - 1 :: -1][:, :order]
        error *= 1 - reflection**2
    return filters


def _critical_bands(signal: Signal) -> Float[np.ndarray, "frame 25"]:
    bins = np.arange(N_FFT // 2)
    per_hertz = N_FFT / SAMPLE_RATE
    centres, widths = np.floor(np.array(CENTRES) * per_hertz), np.array(WIDTHS) * per_hertz
    distances = (bins - centres[:, None]) / widths[:, None]
    filters = np.exp(-11 * distances**2) * (widths[0] / widths)[:, None]  # of equal area
    filters *= filters > np.exp(-30 / (2 * 2.303))  # -30 dB
    power = np.abs(np.fft.rfft(_frames(signal), N_FFT)[:, :-1]) ** 2
    with np.errstate(divide="ignore"):
        return np.maximum(10 * np.log10(power @ filters.T), SMALLEST_DB)


def _slope_weights(spectrum: Float[np.ndarray, "frame 25"]) -> Float[np.ndarray, "frame 24"]:
    """Klatt's weight of each slope: near the frame's highest band, and near the peak that the slope climbs to."""
    slopes, bands = np.diff(spectrum), spectrum.shape[1]
    peaks = np.empty_like(slopes)
    # A rising slope's peak is the band before the next slope that falls; a falling one's is looked for downwards.
    above = spectrum[:, bands - 2].copy()
    for k in range(bands - 2, -1, -1):
        rising = slopes[:, k] > 0
        following = slopes[:, k + 1] > 0 if k < bands - 2 else np.zeros(len(slopes), bool)
        above = np.where(following, above, spectrum[:, k])
        peaks[:, k] = np.where(rising, above, 0)
    below = spectrum[:, 0].copy()
    for k in range(bands - 1):
        falling = slopes[:, k] <= 0
        preceding = slopes[:, k - 1] <= 0 if k > 0 else np.ones(len(slopes), bool)
        below = np.where(preceding, below, spectrum[:, k])
        peaks[:, k] = np.where(falling, below, peaks[:, k])
    highest = spectrum.max(1, keepdims=True)
    lower = spectrum[:, :-1]
    return GLOBAL_PEAK / (GLOBAL_PEAK + highest - lower) * LOCAL_PEAK / (LOCAL_PEAK + peaks - lower)
