"""The variants are the published ones: counts, norms, layout, any sample rate; those that can stream do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.counting import count_macs, count_parameters
from bsrnn.folding import fold
from bsrnn.front_end import FRONT_ENDS
from bsrnn.losses import LossConfig, enhancement_loss, unprocessed
from bsrnn.recording_norm import CumulativeNorm, GroupNorm
from bsrnn.stft import CompressedSTFT, compress
from scaling.corpus import espeak
from tests.bsrnn.library_lstm import by_library

CONF = Path(__file__).parents[2] / "conf" / "model"

# Zhang et al. 2024 (arXiv 2406.04269) and its repository's table: parameters, printed GMACs per second at 48 kHz
TABLE = {
    "ses_xtiny": (469_132, 0.4),
    "ses_xtiny_noncausal": (510_604, 0.6),
    "ses_tiny": (1_311_372, 1.7),
    "ses_tiny_noncausal": (1_474_188, 2.2),
    "ses_small": (4_132_492, 6.4),
    "ses_small_noncausal": (4_777_612, 8.5),
    "ses_medium": (14_321_292, 25.2),
    "ses_medium_noncausal": (16_889_484, 33.4),
    "ses_large": (52_885_132, 99.9),
    "ses_large_noncausal": (63_133_324, 132.5),
    "ses_xlarge": (83_638_924, 197.7),
    "ses_xlarge_noncausal": (104_135_308, 262.3),
}


def config_of(size: str) -> BSRNNConfig:
    """At the sample rate of its bands."""
    choice = yaml.safe_load((CONF / f"{size}.yaml").read_text())
    assert choice.pop("name") == size
    return BSRNNConfig(**(vars(FRONT_ENDS[choice.pop("front_end")]) | choice))


def small(norm: str = "group", causal: bool = True, sample_rate: int = 16_000, num_layers: int = 2) -> BSRNNConfig:
    config = BSRNNConfig(8, num_layers, **vars(FRONT_ENDS["universal_48khz"]), norm=norm, causal=causal)
    return config.at_sample_rate(sample_rate)


def model_with_norms_in_use(config: BSRNNConfig) -> BSRNN:
    """The norms' parameters are far from 1 and 0."""
    torch.manual_seed(0)
    model = BSRNN(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# --- the published table -------------------------------------------------------------------


@pytest.mark.parametrize("size", TABLE)
def test_every_size_has_the_published_number_of_parameters(size: str):
    assert count_parameters(config_of(size)).total == TABLE[size][0]


@pytest.mark.parametrize("size", TABLE)
def test_the_printed_macs_are_those_of_the_lstms_and_convolutions(size: str):
    """The LSTMs with their biases and gates (16 operations a hidden unit) and the 1x1 convolutions, over the 101
    frames of a centred second and without the linear layers after the LSTMs, are the printed figures.

    Eleven of the twelve, to 0.06 G; xlarge non-causal is 262.8 where 262.3 is printed. Ours have those linear layers.
    """
    config = config_of(size)
    channels, hidden = config.num_channels, 2 * config.num_channels
    lstm = 4 * hidden * (channels + hidden) + 16 * hidden
    lstms = config.num_layers * config.num_bands * lstm * (3 if config.causal else 4)
    convolutions = 2 * sum(4 * channels * (channels + 4 * width) for width in config.band_widths)
    convolutions += 2 * config.num_bins * channels
    counted = 101 * (lstms + convolutions) / 1e9
    printed = 262.8 if size == "ses_xlarge_noncausal" else TABLE[size][1]
    assert counted == pytest.approx(printed, abs=0.06)
    assert count_macs(config).total / 1e9 == pytest.approx(counted, rel=0.08)


def test_a_configured_size_exists_for_every_row_of_the_table():
    assert {path.stem for path in CONF.glob("ses_*.yaml")} == set(TABLE)


def test_a_model_at_16_khz_has_all_parameters_and_the_macs_of_27_bands():
    full = config_of("ses_xtiny")
    config = full.at_sample_rate(16_000)
    assert (config.n_fft, config.hop_length, config.num_bins) == (320, 160, 161)
    assert count_parameters(config).total == count_parameters(full).total
    assert count_macs(config).blocks / count_macs(full).blocks == pytest.approx(27 / 34)


@pytest.mark.parametrize(
    "config",
    [
        replace(config_of("ses_xtiny"), num_layers=2),
        replace(config_of("ses_tiny_noncausal").at_sample_rate(16_000), num_layers=2),
        small("cumulative", sample_rate=24_000),
    ],
    ids=["causal, 48 kHz", "non-causal, 16 kHz", "cumulative, 24 kHz"],
)
def test_the_macs_formula_equals_an_operator_by_operator_count(config: BSRNNConfig):
    def lstm_flops(x, w_ih, w_hh, *rest, out_val=None, **options):  # shapes: (T, B, C), (4H, C), (4H, H)
        steps, batch = x[0], x[1]
        return 2 * steps * batch * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1])

    model = fold(BSRNN(config))
    num_frames = 20
    spectrum = torch.randn(2, config.num_bins, num_frames, dtype=torch.complex64)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: lstm_flops})
    with torch.inference_mode(), counter:
        model.enhance_spectrum(spectrum)
    seconds = 2 * num_frames / config.frames_per_second
    assert counter.get_total_flops() / 2 / seconds == pytest.approx(count_macs(config).total, rel=1e-9)


def test_the_music_split_has_the_41_published_bands():
    config = config_of("music_v7")
    ends = np.cumsum(config.band_widths)
    assert len(ends) == 41
    assert ends[-1] == 1_025
    edges_khz = [*np.arange(1, 11) / 10, *np.arange(5, 17) / 4, *np.arange(9, 17) / 2, *range(9, 17), 18, 20]
    bins_khz = np.arange(1_025) * 44.1 / 2_048
    for end, edge in zip(ends, edges_khz, strict=False):
        assert bins_khz[end - 1] < edge <= bins_khz[end], edge
    assert count_parameters(config).total == sum(p.numel() for p in BSRNN(config).parameters())


# --- norms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3, 12), (7, 3, 5, 12)])
def test_group_norm_is_torchs(shape: tuple[int, ...]):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(4, 12), nn.GroupNorm(4, 12)
    for parameter, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        nn.init.normal_(parameter)
        other.data.copy_(parameter.data)
    x = 3 * torch.randn(shape) + 2  # (T, B, ..., feature)
    expected = theirs(x.transpose(0, 1).movedim(-1, 1)).movedim(1, -1).transpose(0, 1)
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_cumulative_norm_is_group_norm_over_the_frames_so_far():
    torch.manual_seed(0)
    cumulative, group = CumulativeNorm(4, 12), GroupNorm(4, 12)
    x = 3 * torch.randn(9, 3, 5, 12) + torch.arange(9.0).view(9, 1, 1, 1)
    expected = torch.stack([group(x[: t + 1])[0][t] for t in range(9)])
    torch.testing.assert_close(cumulative(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_cumulative_norm_keeps_its_precision_over_an_hour_far_from_zero():
    norm = CumulativeNorm(1, 4, affine=False)
    torch.manual_seed(0)
    x = 50 + torch.randn(1_000, 1, 4)
    _, (sums,) = norm(x)
    hour = (sums * 360,)  # the same frames again and again
    y, _ = norm(x[:10], hour)
    torch.testing.assert_close(y, (x[:10] - x.mean()) / x.std(correction=0), atol=2e-3, rtol=2e-3)


# --- the network ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sample_rate", [16_000, 48_000])
@torch.inference_mode()
def test_the_network_equals_a_loop_over_bands_written_from_the_equations(causal: bool, sample_rate: int):
    model = model_with_norms_in_use(small("group", causal, sample_rate))
    spectrum = torch.randn(2, model.config.num_bins, 9, dtype=torch.complex64)
    torch.testing.assert_close(
        model.enhance_spectrum(spectrum)[0], _loop_over_bands(model, spectrum), atol=1e-4, rtol=1e-4
    )


def _loop_over_bands(model: BSRNN, spectrum: torch.Tensor) -> torch.Tensor:
    """Band by band with torch's own layers in their own layout (B, C, T, K), on the same weights."""
    channels, num_bins = model.config.num_channels, spectrum.shape[1]
    split, decoder = model.band_split, model.mask_decoder
    places = [
        (group, norm, linear, output, k)
        for group, norm, linear, output in zip(
            split.groups, split.norm.norms, split.linears, decoder.outputs, strict=True
        )
        for k in range(group.num_bands)
        if group.first_bin + k * group.width < num_bins
    ]
    bands = []
    for group, norm, linear, _, k in places:
        start = group.first_bin + k * group.width
        part = spectrum[:, start : start + group.width]
        part = F.pad(torch.view_as_real(part), (0, 0, 0, 0, 0, group.width - part.shape[1]))  # (B, width, T, 2)
        features = part.permute(0, 1, 3, 2).flatten(1, 2)  # (B, 2·width, T)
        own = slice(2 * group.width * k, 2 * group.width * (k + 1))
        features = F.group_norm(features, 1, norm.weight[own], norm.bias[own], eps=1e-8)
        bands.append(F.conv1d(features, linear.weight[k].T.unsqueeze(-1), linear.bias[k]))
    x = torch.stack(bands, dim=-1)  # (B, C, T, K)
    batch, _, num_frames, num_bands = x.shape
    for block in model.blocks:
        y = F.group_norm(x, 1, block.time_norm.weight, block.time_norm.bias)
        with by_library():
            y = block.time_lstm(y.permute(2, 0, 3, 1).flatten(1, 2))[0]  # (T, B·K, ...)
        x = x + block.time_linear(y).view(num_frames, batch, num_bands, channels).permute(1, 3, 0, 2)
        y = F.group_norm(x, 1, block.band_norm.weight, block.band_norm.bias)
        with by_library():
            y = block.band_lstm(y.permute(0, 2, 3, 1).flatten(0, 1))[0]  # (B·T, K, ...)
        x = x + block.band_linear(y).view(batch, num_frames, num_bands, channels).permute(0, 3, 1, 2)
    spectra: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for band, (group, _, _, output, k) in enumerate(places):
        for head in (0, 1):
            y = F.group_norm(x[..., band], 1, decoder.scale[band, head], decoder.shift[band, head], eps=1e-8)
            row = 2 * band + head
            y = torch.tanh(F.conv1d(y, decoder.expand.weight[row].T.unsqueeze(-1), decoder.expand.bias[row]))
            row = 2 * k + head
            y = F.glu(F.conv1d(y, output.weight[row].T.unsqueeze(-1), output.bias[row]), dim=1)  # (B, 2·width, T)
            y = y.view(batch, group.width, 2, num_frames)
            spectra[head].append(torch.complex(y[:, :, 0], y[:, :, 1]))
    mask, residual = (torch.cat(parts, dim=1)[:, :num_bins] for parts in spectra)
    return mask * spectrum + residual


def test_gradients_reach_every_parameter_that_audio_of_the_rate_can_train():
    torch.manual_seed(0)
    for norm in ("group", "cumulative"):
        model = BSRNN(small(norm))
        noisy = torch.cat([torch.zeros(1, 4_000), 0.1 * torch.randn(1, 4_000)])
        enhancement_loss(model(noisy), 0.5 * noisy, model.stft, LossConfig()).total.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == {f"{part}.4.{kind}" for part in ("band_split.linears", "mask_decoder.outputs")
                          for kind in ("weight", "bias")} | {f"band_split.norm.norms.4.{kind}"
                          for kind in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize("norm", ["group", "cumulative"])
def test_folding_keeps_outputs_and_removes_the_norms_parameters(norm: str):
    model = model_with_norms_in_use(small(norm))
    folded = fold(model)
    noisy = 0.1 * torch.randn(2, 6_001)
    with torch.inference_mode():
        expected = model(noisy).waveform
        torch.testing.assert_close(folded(noisy).waveform, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    assert sum(p.numel() for p in folded.parameters()) == count_parameters(model.config).folded
    assert count_parameters(model.config).folded < sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="folded already"):
        fold(folded)


# --- streaming -----------------------------------------------------------------------------


@torch.inference_mode()
def test_frames_one_by_one_equal_the_whole_spectrum_with_cumulative_norms():
    for model in (model_with_norms_in_use(small("cumulative")), fold(model_with_norms_in_use(small("cumulative")))):
        spectrum = torch.randn(2, 161, 30, dtype=torch.complex64)
        whole, _ = model.enhance_spectrum(spectrum)
        states, frames = None, []
        for start, stop in ((0, 1), (1, 2), (2, 10), (10, 11), (11, 30)):
            frame, states = model.enhance_spectrum(spectrum[:, :, start:stop], states)
            frames.append(frame)
        torch.testing.assert_close(torch.cat(frames, dim=-1), whole, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_streams_of_different_age_go_on_in_one_batch():
    model = model_with_norms_in_use(small("cumulative"))
    old, new = torch.randn(1, 161, 30, dtype=torch.complex64), torch.randn(1, 161, 12, dtype=torch.complex64)
    _, old_states = model.enhance_spectrum(old[..., :20])
    _, new_states = model.enhance_spectrum(new[..., :2])
    states = [
        tuple(torch.cat(pair, dim=1) for pair in zip(*states, strict=True))
        for states in zip(old_states, new_states, strict=True)
    ]
    both, _ = model.enhance_spectrum(torch.cat([old[..., 20:], new[..., 2:]]), states)
    torch.testing.assert_close(both[:1], model.enhance_spectrum(old)[0][..., 20:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1:], model.enhance_spectrum(new)[0][..., 2:], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_only_causal_models_with_batch_or_cumulative_norms_stream():
    noisy = torch.randn(1, 8_000)
    changed = noisy.clone()
    changed[:, 4_000:] += torch.randn(1, 4_000)
    for norm, causal, streams in (("cumulative", True, True), ("cumulative", False, False), ("group", True, False)):
        model = model_with_norms_in_use(small(norm, causal))
        assert model.config.streams == streams
        before, after = (model(waveform).waveform[:, : 4_000 - 320] for waveform in (noisy, changed))
        assert torch.equal(before, after) == streams, (norm, causal)
        spectrum, states = model.enhance_spectrum(model.stft(noisy))
        if not streams:
            with pytest.raises(ValueError, match=f"norm = {norm}, causal = {causal}: enhances whole recordings alone"):
                model.enhance_spectrum(spectrum, states)


# --- sample rates --------------------------------------------------------------------------

RATES = (8_000, 16_000, 24_000, 44_100, 48_000)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """A second of speech in noise, (2, samples) at 48 kHz: noisy and clean."""
    clean = soxr.resample(
        espeak.speak(espeak.Voice("en-us", "f3"), "The quick brown fox jumps over the lazy dog."),
        espeak.SAMPLE_RATE,
        48_000,
    )
    clean = 0.1 * clean[:48_000] / clean.std()
    noise = soxr.resample(np.random.default_rng(0).normal(size=clean.shape), 44_100, 48_000)[: len(clean)]
    noise = np.pad(noise, (0, len(clean) - len(noise)))
    return np.stack([clean + 0.05 * noise, clean]).astype(np.float32)


def resampled(signals: np.ndarray, rate: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(soxr.resample(signals.T, 48_000, rate).T))


def test_a_sound_has_the_same_spectrum_at_every_sample_rate(speech: np.ndarray):
    full = BSRNN(small(sample_rate=48_000))
    expected = full.stft(torch.from_numpy(speech))[1].abs()
    for rate in RATES:
        model = full.at_sample_rate(rate)
        spectrum = model.stft(resampled(speech, rate))[1].abs()
        highest = int(0.9 * rate / 2 / 50)  # below the resampler's slope
        assert spectrum.shape[0] == rate // 100 + 1
        inner = slice(1, min(spectrum.shape[1], expected.shape[1]) - 2)  # frames that see nothing beyond the ends
        error = (spectrum[:highest, inner] - expected[:highest, inner]).square().mean().sqrt()
        assert error < 0.01 * expected[:highest, inner].square().mean().sqrt(), rate


def test_one_set_of_weights_trained_at_48_khz_enhances_at_every_rate(speech: np.ndarray):
    torch.manual_seed(0)
    model = BSRNN(small("cumulative", sample_rate=48_000, num_layers=1))
    noisy, clean = torch.from_numpy(speech).unsqueeze(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = enhancement_loss(model(noisy), clean, model.stft, LossConfig()).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    for rate in RATES:
        other = model.at_sample_rate(rate)
        assert next(other.parameters()) is next(model.parameters()), "the weights were copied"
        noisy, clean = resampled(speech, rate).unsqueeze(1)
        with torch.inference_mode():
            estimate = other(noisy)
            assert estimate.waveform.shape == noisy.shape
            loss = enhancement_loss(estimate, clean, other.stft, LossConfig()).total.item()
            untouched = enhancement_loss(unprocessed(noisy, other.stft), clean, other.stft, LossConfig()).total.item()
        assert loss < 0.8 * untouched, (rate, loss, untouched)


def test_a_rate_that_the_bands_or_the_window_cannot_serve_is_refused_by_name():
    with pytest.raises(ValueError, match="960 and 480 samples at 48000 Hz are no whole numbers of samples at 11025 Hz"):
        config_of("ses_xtiny").at_sample_rate(11_025)
    with pytest.raises(ValueError, match="band_widths sum to 481 bins, n_fft = 1920 has 961"):
        config_of("ses_xtiny").at_sample_rate(96_000)
    with pytest.raises(ValueError, match=r"n_fft = 256 has 129: .* or a norm other than batch"):
        BSRNNConfig().at_sample_rate(8_000)
    with pytest.raises(ValueError, match="norm = layer: expected one of batch, group, cumulative"):
        BSRNNConfig(norm="layer")


# --- losses --------------------------------------------------------------------------------


def test_the_losses_compare_at_one_compression_whatever_the_models_is():
    torch.manual_seed(0)
    clean, noisy = torch.randn(2, 1, 4_000)
    plain, compressed = CompressedSTFT(320, 160, 1.0), CompressedSTFT(320, 160, 0.3)
    assert torch.equal(compress(plain(clean), 0.3), compressed(clean))
    for first, second in zip(
        enhancement_loss(unprocessed(noisy, plain), clean, plain, LossConfig()).terms.values(),
        enhancement_loss(unprocessed(noisy, compressed), clean, compressed, LossConfig()).terms.values(),
        strict=True,
    ):
        assert first.item() == pytest.approx(second.item(), rel=1e-5)
