"""DNSMOS: what listeners would say of a signal, predicted without its clean original.

P.808 is one overall rating (Reddy et al. 2021, arXiv 2010.15258); P.835 has three, of the speech, of the background and
overall (Reddy et al. 2022, arXiv 2110.01763). The networks are those that the package `speechmos` carries; they run in
onnxruntime, one thread a process. The package's own code is not used, because it loads librosa and takes all cores.
A signal is repeated until it lasts 9.01 s, the networks' input, and a longer one is judged every second; the ratings
are means. Samples beyond full scale are clipped, as in a file of 16 bits.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

SAMPLE_RATE = 16_000
INPUT = 144_160  # samples: 9.01 s
STRIDE = 16_000
MEL_BANDS, MEL_FRAME, MEL_HOP = 120, 321, 160
# From the networks' outputs to ratings of speech, background, overall: coefficients from the highest power down.
CALIBRATION = (
    (-0.08397278, 1.22083953, 0.0052439),
    (-0.13166888, 1.60915514, -0.39604546),
    (-0.06766283, 1.11546468, 0.04602535),
)


class Ratings(NamedTuple):
    """Mean opinion scores, 1 to 5."""

    p808: float
    speech: float
    background: float
    overall: float


def rate(signal: Float[np.ndarray, " sample"]) -> Ratings:
    """The ratings of a signal at 16 kHz that is not empty."""
    signal = np.clip(signal, -1, 1).astype(np.float32)
    while len(signal) < INPUT:
        signal = np.concatenate([signal, signal])
    # the last whole second decides how many windows there are, as in the published code
    num_windows = int(len(signal) // SAMPLE_RATE - INPUT / SAMPLE_RATE) + 1
    p808, p835 = (_session(name) for name in ("model_v8.onnx", "sig_bak_ovr.onnx"))
    ratings = []
    for start in range(0, num_windows * STRIDE, STRIDE):
        window = signal[start : start + INPUT]
        overall = p808.run(None, {"input_1": mel_features(window[:-MEL_HOP])[None]})[0].item()
        raw = p835.run(None, {"input_1": window[None]})[0][0]
        ratings.append([overall, *(np.polyval(curve, value) for curve, value in zip(CALIBRATION, raw, strict=True))])
    return Ratings(*(float(value) for value in np.mean(ratings, axis=0)))


def mel_features(signal: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "frame 120"]:
    """Mel spectrum in dB below its maximum, -40 dB to -1 and 0 dB to 1."""
    padded = np.pad(signal.astype(np.float64), MEL_FRAME // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(MEL_FRAME) / MEL_FRAME)
    frames = np.lib.stride_tricks.sliding_window_view(padded, MEL_FRAME)[::MEL_HOP] * window
    power = (np.abs(np.fft.rfft(frames)) ** 2) @ _mel_filters().T
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    decibels = np.maximum(decibels - decibels.max(), -80)
    return ((decibels + 40) / 40).astype(np.float32)


@cache
def _mel_filters() -> np.ndarray:
    """Triangles of unit area on Slaney's mel scale (Auditory Toolbox, 1998): linear to 1 kHz, then logarithmic."""

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    corners = hertz(np.linspace(0, top, MEL_BANDS + 2))
    frequencies = np.fft.rfftfreq(MEL_FRAME, 1 / SAMPLE_RATE)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (corners[2:] - corners[:-2])[:, None]


@cache
def _session(name: str) -> Any:
    """A network in this process; onnxruntime is loaded where it is first needed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(_models() / name), sess_options=options, providers=["CPUExecutionProvider"])


def _models() -> Path:
    package = importlib.util.find_spec("speechmos")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("speechmos, which carries DNSMOS's networks, is not installed")
    return Path(package.submodule_search_locations[0]) / "dnsmos_models"
