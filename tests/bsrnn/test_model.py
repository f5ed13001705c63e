"""The model is the published one: counts, causality, layout, folding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.bands import BAND_WIDTHS_16_KHZ, group_bands
from bsrnn.counting import count_macs, count_parameters
from bsrnn.folding import fold
from bsrnn.norm import BatchNorm
from tests.bsrnn.library_lstm import by_library

CONF = Path(__file__).parents[2] / "conf" / "model"

# size: (parameters in training, folded, MACs per second of audio), FastEnhancer's table and its continuation
TABLE = {
    "xxt": (254_492, 251_352, "90.1 M"),
    "xt": (337_820, 334_424, "244.8 M"),
    "t": (1_039_148, 1_033_384, "961.9 M"),
    "s": (3_541_580, 3_531_080, "3.812 G"),
    "m": (12_945_548, 12_925_576, "15.18 G"),
    "l": (49_349_900, 49_310_984, "60.58 G"),
    "xl": (80_103_692, 80_058_632, "120.0 G"),
}


def config_of(size: str) -> BSRNNConfig:
    choice = yaml.safe_load((CONF / f"{size}.yaml").read_text())
    return BSRNNConfig(choice["num_channels"], choice["num_layers"])


def trained_like(config: BSRNNConfig, seed: int = 0) -> BSRNN:
    """A model whose norms, running statistics and affine parameters are far from their initial values."""
    torch.manual_seed(seed)
    model = BSRNN(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(5):
            model(torch.randn(4, 8000))
    return model.eval()


@pytest.mark.parametrize("size", TABLE)
def test_every_size_has_the_tables_parameters_and_macs(size: str):
    training, folded, macs = TABLE[size]
    number, unit = macs.split()
    config = config_of(size)
    parameters = count_parameters(config)
    assert (parameters.total, parameters.folded) == (training, folded)
    digits = len(number.split(".")[1])
    assert round(count_macs(config).total / {"M": 1e6, "G": 1e9}[unit], digits) == float(number)


def test_every_configured_size_has_its_files_name_and_those_between_the_published_are_of_one_depth():
    for path in CONF.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.stem
    between = {f"c{width}": BSRNNConfig(width, 6) for width in (2, 4, 8, 24, 48)}  # for +sweep=isoflop
    assert {size: config_of(size) for size in between} == between


@pytest.mark.parametrize(("channels", "layers", "decoder"), [(16, 2, 201_096), (32, 6, 527_112), (64, 6, 1_560_072)])
def test_the_mask_decoder_holds_the_published_share_of_parameters(channels: int, layers: int, decoder: int):
    model = fold(BSRNN(BSRNNConfig(channels, layers)))
    assert sum(parameter.numel() for parameter in model.mask_decoder.parameters()) == decoder


@pytest.mark.parametrize("size", ["xxt", "xt", "t"])
def test_the_macs_formula_equals_an_operator_by_operator_count(size: str):
    """torch counts each matrix product that runs; its LSTM kernel, which it does not know, is counted here."""

    def lstm_flops(x, w_ih, w_hh, *rest, out_val=None, **options):  # shapes: (T, B, C), (4H, C), (4H, H)
        steps, batch = x[0], x[1]
        return 2 * steps * batch * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1])

    config = config_of(size)
    model = fold(BSRNN(config))
    num_frames = 50
    spectrum = torch.randn(2, config.num_bins, num_frames, dtype=torch.complex64)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: lstm_flops})
    with torch.inference_mode(), counter:
        model.enhance_spectrum(spectrum)
    seconds = 2 * num_frames / config.frames_per_second
    assert counter.get_total_flops() / 2 / seconds == pytest.approx(count_macs(config).total, rel=1e-9)


def test_bands_cover_every_bin_once_in_five_groups():
    groups = group_bands(BAND_WIDTHS_16_KHZ)
    assert [(group.width, group.num_bands) for group in groups] == [(2, 1), (3, 10), (8, 12), (16, 7), (17, 1)]
    bins = [b for group in groups for b in range(group.first_bin, group.first_bin + group.num_bins)]
    assert bins == list(range(257))


@torch.inference_mode()
def test_changing_future_samples_changes_no_earlier_output():
    model = trained_like(BSRNNConfig(16, 2))
    torch.manual_seed(1)
    noisy = torch.randn(1, 16_000)
    changed = noisy.clone()
    changed[:, 8_000:] += torch.randn(1, 8_000)
    before, after = model(noisy).waveform, model(changed).waveform
    # A sample's last frame reaches one window past it, so outputs up to a window before the change are the same.
    assert torch.equal(before[:, : 8_000 - 512], after[:, : 8_000 - 512])
    assert not torch.allclose(before[:, 8_000:], after[:, 8_000:])


@torch.inference_mode()
def test_frames_one_by_one_equal_the_whole_spectrum():
    model = trained_like(BSRNNConfig(16, 2))
    spectrum = torch.randn(2, 257, 20, dtype=torch.complex64)
    whole, _ = model.enhance_spectrum(spectrum)
    states, frames = None, []
    for t in range(20):
        frame, states = model.enhance_spectrum(spectrum[:, :, t : t + 1], states)
        frames.append(frame)
    torch.testing.assert_close(torch.cat(frames, dim=-1), whole, atol=1e-5, rtol=1e-4)


def test_folding_keeps_outputs_and_removes_every_norm():
    model = trained_like(BSRNNConfig(16, 3))
    folded = fold(model)
    noisy = torch.randn(2, 6_001)
    with torch.inference_mode():
        expected = model(noisy).waveform
        torch.testing.assert_close(folded(noisy).waveform, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    assert not [module for module in folded.modules() if isinstance(module, BatchNorm)]
    assert [module for module in model.modules() if isinstance(module, BatchNorm)], "the original was folded too"
    assert sum(p.numel() for p in folded.parameters()) == count_parameters(model.config).folded
    with pytest.raises(ValueError, match="folded already"):
        fold(folded)


def test_the_network_equals_a_loop_over_bands_written_from_the_equations():
    """An independent reading of the architecture, band by band with torch's own layers, on the same weights."""
    config = BSRNNConfig(16, 2)
    model = trained_like(config)
    spectrum = torch.randn(2, 257, 9, dtype=torch.complex64)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.enhance_spectrum(spectrum)[0], _loop_over_bands(model, spectrum), atol=1e-4, rtol=1e-4
        )


def _loop_over_bands(model: BSRNN, spectrum: torch.Tensor) -> torch.Tensor:
    config, channels = model.config, model.config.num_channels
    batch, _, num_frames = spectrum.shape

    def norm_of(source: BatchNorm, part: slice, weight=None, bias=None) -> nn.BatchNorm1d:
        norm = nn.BatchNorm1d(len(range(*part.indices(source.num_features)))).eval()
        norm.running_mean.copy_(source.running_mean[part])
        norm.running_var.copy_(source.running_var[part])
        norm.weight.copy_(source.weight[part] if weight is None else weight)
        norm.bias.copy_(source.bias[part] if bias is None else bias)
        return norm

    # band split
    bands, first_bin = [], 0
    for group, linear in zip(model.band_split.groups, model.band_split.linears, strict=True):
        for k in range(group.num_bands):
            part = spectrum[:, first_bin : first_bin + group.width]  # (B, width, T)
            features = torch.stack([part.real, part.imag], dim=2).reshape(batch, -1, num_frames)
            norm = norm_of(model.band_split.norm, slice(2 * first_bin, 2 * (first_bin + group.width)))
            bands.append(torch.einsum("bft,fc->btc", norm(features), linear.weight[k]) + linear.bias[k])
            first_bin += group.width
    x = torch.stack(bands, dim=1)  # (B, K, T, C)
    for block in model.blocks:
        for norm, lstm, linear, axis in (
            (block.time_norm, block.time_lstm, block.time_linear, "time"),
            (block.band_norm, block.band_lstm, block.band_linear, "band"),
        ):
            y = norm_of(norm, slice(None))(x.reshape(-1, channels)).view(x.shape)
            sequences = y.reshape(-1, num_frames, channels) if axis == "time" else y.transpose(1, 2).flatten(0, 1)
            with by_library():
                out = linear(lstm(sequences if lstm.batch_first else sequences.transpose(0, 1))[0])
            out = out if lstm.batch_first else out.transpose(0, 1)
            out = out.view(x.shape) if axis == "time" else out.view(batch, num_frames, -1, channels).transpose(1, 2)
            x = x + out
    # mask decoder
    decoder, masks, residuals = model.mask_decoder, [], []
    for group, linear in zip(decoder.groups, decoder.outputs, strict=True):
        for k in range(group.num_bands):
            band = group.first_band + k
            for head, outputs in ((0, masks), (1, residuals)):
                part = slice(band * channels, (band + 1) * channels)
                norm = norm_of(decoder.norm, part, decoder.scale[band, head], decoder.shift[band, head])
                y = norm(x[:, band].transpose(1, 2)).transpose(1, 2)  # (B, T, C)
                row = 2 * band + head
                y = torch.tanh(y @ decoder.expand.weight[row] + decoder.expand.bias[row])
                y = y @ linear.weight[2 * k + head] + linear.bias[2 * k + head]  # (B, T, 4·width)
                value, gate = y.chunk(2, dim=-1)
                y = (value * torch.sigmoid(gate)).view(batch, num_frames, group.width, 2)
                outputs.append(torch.complex(y[..., 0], y[..., 1]))
    mask, residual = (torch.cat(parts, dim=2).transpose(1, 2) for parts in (masks, residuals))
    assert mask.shape == (batch, config.num_bins, num_frames)
    return mask * spectrum + residual


def test_gradients_reach_every_parameter_and_are_finite_on_silence():
    torch.manual_seed(0)
    model = BSRNN(BSRNNConfig(16, 2))
    noisy = torch.cat([torch.zeros(1, 4_000), torch.randn(1, 4_000)])
    estimate = model(noisy)
    (estimate.waveform.square().mean() + torch.view_as_real(estimate.spectrum).square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_windows_that_do_not_overlap_are_refused():
    with pytest.raises(ValueError, match="hop_length = 512: expected less than n_fft = 512"):
        BSRNNConfig(hop_length=512)


def test_a_band_layout_that_leaves_bins_out_is_refused_by_name():
    with pytest.raises(ValueError, match="band_widths sum to 256 bins, n_fft = 512 has 257"):
        BSRNNConfig(band_widths=(*BAND_WIDTHS_16_KHZ[:-1], 16))
