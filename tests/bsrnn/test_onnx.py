"""The exported step is the model: frame by frame through onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bsrnn import BSRNNConfig
from bsrnn.convert import main as convert
from bsrnn.folding import fold
from bsrnn.modelfile import save_model
from bsrnn.onnx import Session, export, largest_difference, main
from bsrnn.streaming import Stream
from tests.bsrnn.test_model import trained_like


@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("band_widths", [BSRNNConfig().band_widths, (257,)], ids=["31 bands", "1 band"])
def test_the_exported_step_equals_torch_frame_by_frame(num_streams: int, band_widths: tuple[int, ...]):
    model = trained_like(BSRNNConfig(24, 2, band_widths=band_widths))
    assert largest_difference(model, export(model, num_streams), num_frames=12) <= 1e-5


def test_a_signal_enhanced_by_the_exported_step_alone_equals_the_streams(tmp_path: Path):
    """As somebody without torch would run it: padding, numpy's FFT, a Hann window, overlapping halves added."""
    model = trained_like(BSRNNConfig(16, 2))
    signal = 0.1 * torch.randn(1, 5_119)
    stream = Stream(model, use_kernel=False)
    expected = torch.cat([stream.process(signal), stream.flush()], dim=1)[0].numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    padded = np.pad(np.pad(signal[0].numpy(), (0, 1)), 256, mode="reflect")
    session, total, squares = Session(export(model)), np.zeros(len(padded)), np.zeros(len(padded))
    for start in range(0, len(padded) - 511, 256):
        spectrum = np.fft.rfft(padded[start : start + 512] * window)
        enhanced = session.step(np.stack([spectrum.real, spectrum.imag], axis=-1)[None].astype(np.float32))
        frame = np.fft.irfft(enhanced[0, :, 0] + 1j * enhanced[0, :, 1])
        total[start : start + 512] += frame * window
        squares[start : start + 512] += window**2
    ours = (total / np.maximum(squares, 1e-9))[256:-257]
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_check_that_finds_a_difference_says_how_large(tmp_path: Path):
    model = trained_like(BSRNNConfig(16, 2))
    other = trained_like(BSRNNConfig(16, 2), seed=1)
    assert largest_difference(model, export(other), num_frames=3) > 1e-2


def test_the_command_writes_a_valid_file_with_its_front_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_model(trained_like(BSRNNConfig(16, 1)), tmp_path / "model.pt")
    assert main([str(tmp_path / "model.pt"), str(tmp_path / "model.onnx"), "streams=2"]) == 0
    assert "equal torch's to" in capsys.readouterr().out
    exported = onnx.load(tmp_path / "model.onnx")
    assert {prop.key: prop.value for prop in exported.metadata_props} == {
        "n_fft": "512",
        "hop_length": "256",
        "sample_rate": "16000",
    }
    assert [dim.dim_value for dim in exported.graph.input[0].type.tensor_type.shape.dim] == [2, 257, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.pt", "out.onnx"], "none.pt: no such file"),
        (["out.onnx"], "expected CHECKPOINT OUTPUT.onnx; got out.onnx"),
        (["none.pt", "out.onnx", "streams=two"], "streams=two: not understood"),
    ],
)
def test_a_users_mistake_is_one_line(words: list[str], said: str):
    with pytest.raises((ValueError, OSError), match=said):
        main(words)


def test_neither_command_overwrites_the_model_that_it_reads(tmp_path: Path):
    save_model(trained_like(BSRNNConfig(16, 1)), tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    for command in (main, convert):
        for given in (tmp_path / "model.pt", tmp_path):  # the folder stands for the file in it
            with pytest.raises(ValueError, match=r"model.pt is the input"):
                command([str(given), str(tmp_path / "model.pt")])
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_folded_model_is_not_saved_and_not_exported_twice(tmp_path: Path):
    folded = fold(trained_like(BSRNNConfig(16, 1)))
    with pytest.raises(ValueError, match="folded"):
        save_model(folded, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="folded already"):
        export(folded)
