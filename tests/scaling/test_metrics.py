"""Metrics mean what their definitions say, and refuse what they are not defined for."""

from __future__ import annotations

from importlib import metadata

import numpy as np
import pytest
from scipy.linalg import toeplitz

from scaling.composite import _critical_bands, composite, log_likelihood_ratio, prediction_error_filters, segmental_snr
from scaling.composite import weighted_spectral_slope as wss
from scaling.config import DEFAULT_METRICS, METRIC_NAMES
from scaling.dnsmos import mel_features, rate
from scaling.metrics import METRICS, RefusedError, pesq_wb, score, short_time_intelligibility, si_sdr, versions


def test_si_sdr_is_scale_invariant_and_subtracts_no_mean():
    rng = np.random.default_rng(0)
    clean = rng.standard_normal(16_000)
    noise = rng.standard_normal(16_000)
    noise -= noise @ clean / (clean @ clean) * clean  # orthogonal, so the ratio of energies is the definition
    expected = 10 * np.log10((clean @ clean) / (0.01 * noise @ noise))
    assert si_sdr(clean + 0.1 * noise, clean) == pytest.approx(expected)
    assert si_sdr(7 * (clean + 0.1 * noise), clean) == pytest.approx(expected)
    offset = si_sdr(clean + 0.5, clean)
    assert offset == pytest.approx(10 * np.log10(1 / 0.25), abs=0.3)  # a mean would have been subtracted away


def test_every_metric_prefers_less_noise(speech):
    noisy, clean = speech
    better, _ = score(clean + 0.1 * (noisy - clean), clean, METRIC_NAMES)
    worse, _ = score(noisy, clean, METRIC_NAMES)
    assert tuple(better) == METRIC_NAMES == tuple(METRICS)
    assert DEFAULT_METRICS == ("pesq_wb", "stoi", "estoi", "si_sdr")
    for name in METRIC_NAMES:
        assert better[name] > worse[name], name
    assert better["si_sdr"] - worse["si_sdr"] == pytest.approx(20, abs=0.5)


def test_what_a_metric_refuses_it_refuses_with_the_reason(speech):
    _, clean = speech
    silence = np.zeros(16_000, dtype=np.float32)
    with pytest.raises(RefusedError, match="No utterances detected"):
        pesq_wb(silence, silence)
    with pytest.raises(RefusedError, match="1/4 of a second"):
        pesq_wb(clean[:1_000], clean[:1_000])
    with pytest.raises(RefusedError, match="Not enough STFT frames"):
        short_time_intelligibility(clean[:2_000], clean[:2_000])
    with pytest.raises(RefusedError, match="clean signal is silent"):
        si_sdr(clean, np.zeros_like(clean))
    values, refused = score(silence, silence, METRIC_NAMES)
    assert values == dict.fromkeys(METRICS)
    assert set(refused) == set(METRICS)


def test_every_metric_says_what_its_values_depend_on():
    assert set(versions(METRIC_NAMES)) == set(METRIC_NAMES)
    assert versions(["stoi", "si_sdr", "dnsmos_sig"]) == {
        "stoi": f"1, pystoi {metadata.version('pystoi')}",
        "si_sdr": "1",
        "dnsmos_sig": f"1, speechmos {metadata.version('speechmos')}, onnxruntime {metadata.version('onnxruntime')}",
    }


# --- composite measures --------------------------------------------------------------------


def test_segmental_snr_is_the_snr_of_each_frame_within_its_bounds():
    rng = np.random.default_rng(0)
    clean = rng.standard_normal(16_000)
    assert segmental_snr(clean, clean) == 35.0
    assert segmental_snr(clean + 100 * rng.standard_normal(16_000), clean) == -10.0
    assert segmental_snr(1.1 * clean, clean) == pytest.approx(20.0)  # the error is a tenth of every frame
    half = np.concatenate([1.1 * clean, clean])  # first half 20 dB, second half at the bound, 3 frames with both
    assert segmental_snr(half, np.concatenate([clean, clean])) == pytest.approx(27.5, abs=0.2)


def test_linear_prediction_finds_the_filter_of_an_autoregressive_process():
    """Of order 2 with known poles; the lags follow from the poles by the Yule-Walker equations."""
    a1, a2 = 1.2, -0.7
    lags = [1.0, a1 / (1 - a2)]
    for _ in range(15):
        lags.append(a1 * lags[-1] + a2 * lags[-2])
    (filters,) = prediction_error_filters(np.array([lags]))
    np.testing.assert_allclose(filters, [1, -a1, -a2] + [0] * 14, atol=1e-12)


def test_the_spectral_distances_are_zero_for_equal_shapes_and_grow_with_noise(speech):
    noisy, clean = speech
    for distance in (log_likelihood_ratio, wss):
        assert distance(clean, clean) == pytest.approx(0, abs=1e-6)
        assert distance(0.5 * clean, clean) == pytest.approx(0, abs=1e-3)  # shapes, not levels
        assert 0 < distance(clean + 0.1 * (noisy - clean), clean) < distance(noisy, clean)


def test_the_log_likelihood_ratio_equals_its_definition_frame_by_frame(speech):
    """log (a' R a / c' R c), where a and c solve the normal equations of the estimate and of the clean frame."""
    noisy, clean = (signal[8_000:16_000].astype(np.float64) for signal in speech)
    window = np.hanning(482)[1:-1]
    ratios = []
    for start in range(0, len(clean) - 480 + 1, 120)[:-1]:
        lags = []
        for waveform in (noisy, clean):
            frame = (waveform[start : start + 480] + np.finfo(float).eps) * window
            lags.append(np.correlate(frame, frame, "full")[479 : 479 + 17])
        matrices = [toeplitz(lag) for lag in lags]
        filters = [np.r_[1, -np.linalg.solve(m[:-1, :-1], lag[1:])] for m, lag in zip(matrices, lags, strict=True)]
        ratios.append(np.log(filters[0] @ matrices[1] @ filters[0] / (filters[1] @ matrices[1] @ filters[1])))
    expected = np.mean(sorted(ratios)[: round(0.95 * len(ratios))])
    assert log_likelihood_ratio(noisy, clean) == pytest.approx(expected, rel=1e-6)


def test_the_slope_distance_weighs_peaks_as_klatt_does(speech):
    """The published loop over bands, frame by frame."""
    noisy, clean = (signal[8_000:16_000] for signal in speech)
    spectra = [_critical_bands(signal.astype(np.float64) + np.finfo(float).eps) for signal in (clean, noisy)]
    distances = []
    for frame in range(len(spectra[0])):
        weights, slopes = [], []
        for spectrum in (spectra[0][frame], spectra[1][frame]):
            slope = np.diff(spectrum)
            peaks = []
            for k in range(24):
                n = k
                if slope[k] > 0:
                    while n < 24 and slope[n] > 0:
                        n += 1
                    peaks.append(spectrum[n - 1])
                else:
                    while n >= 0 and slope[n] <= 0:
                        n -= 1
                    peaks.append(spectrum[n + 1])
            of_maximum = 20 / (20 + spectrum.max() - spectrum[:-1])
            weights.append(of_maximum * 1 / (1 + np.array(peaks) - spectrum[:-1]))
            slopes.append(slope)
        weight = (weights[0] + weights[1]) / 2
        distances.append((weight * (slopes[0] - slopes[1]) ** 2).sum() / weight.sum())
    expected = np.mean(sorted(distances)[: round(0.95 * len(distances))])
    assert wss(noisy, clean) == pytest.approx(expected, rel=1e-9)


def test_the_composite_measures_are_the_published_regressions():
    assert composite(3.0, 0.5, 30.0, 8.0) == pytest.approx((4.1175, 3.362, 3.543))
    assert composite(1.0, 4.0, 200.0, -10.0) == (1, 1, 1)
    assert composite(4.6, 0.0, 0.0, 35.0) == (5, 5, 5)


# --- DNSMOS --------------------------------------------------------------------------------


def known_signals() -> dict[str, np.ndarray]:
    """A tone that swells, and 12 s of noise that swells."""
    t = np.arange(5 * 16_000) / 16_000
    long = 0.05 * np.random.default_rng(1).standard_normal(192_000) * np.abs(np.sin(np.arange(192_000) / 4_000))
    return {
        "tone": (0.1 * np.sin(2 * np.pi * 220 * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 2).astype(np.float32),
        "long": long.astype(np.float32),
    }


@pytest.mark.parametrize(
    ("name", "expected"),  # p808, speech, background, overall by speechmos 0.0.1.1's own code with librosa 0.11.0
    [("tone", (2.23284, 2.66596, 3.16181, 2.09046)), ("long", (2.16703, 1.13257, 1.14470, 1.11895))],
)
def test_dnsmos_equals_the_published_code(name: str, expected: tuple[float, ...]):
    assert rate(known_signals()[name]) == pytest.approx(expected, abs=2e-4)


def test_dnsmos_prefers_clean_speech_and_does_not_mind_samples_beyond_full_scale(speech):
    noisy, clean = speech
    assert rate(clean).overall > rate(noisy).overall + 0.3
    assert rate(np.clip(50 * clean, -1, 1)) == rate(50 * clean)


def test_mel_features_put_a_tone_into_its_band():
    tone = np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000).astype(np.float32)
    features = mel_features(tone)
    assert features.shape == (100, 120)
    mels = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 122)[1:-1]  # centres on Slaney's scale; 15 is 1 kHz
    assert abs(int(features[50].argmax()) - int(np.abs(mels - 15).argmin())) <= 1
    assert features.max() == 1.0
