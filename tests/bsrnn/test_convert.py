"""A checkpoint in the FastEnhancer repository's layout to one of ours that makes the same of a signal, and back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.convert import from_reference, main, to_reference
from bsrnn.folding import fold
from bsrnn.modelfile import load_model, save_model
from tests.bsrnn.band_by_band import BandByBand
from tests.bsrnn.test_model import trained_like


def published(channels: int = 16, layers: int = 2) -> BandByBand:
    """A model written from the equations, its norms and weights far from their initial values."""
    torch.manual_seed(0)
    model = BandByBand(channels, layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(3):
            model(torch.randn(2, 4_000))
    return model.eval()


def signal() -> torch.Tensor:
    return 0.1 * torch.randn(2, 256 * 20, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize(("channels", "layers"), [(16, 2), (24, 1)])
def test_a_converted_checkpoint_makes_the_same_of_a_signal_as_the_published_equations(channels: int, layers: int):
    theirs = published(channels, layers)
    waveform, spectrum = theirs(signal())
    ours = from_reference(theirs.state_dict())(signal())
    assert (ours.waveform - waveform).abs().max() <= 1e-5 * waveform.abs().max()
    assert (ours.spectrum - spectrum).abs().max() <= 1e-5 * spectrum.abs().max()


@torch.inference_mode()
def test_one_of_our_models_makes_the_same_of_a_signal_in_their_layout():
    ours = trained_like(BSRNNConfig(16, 2))
    theirs = BandByBand(16, 2)
    theirs.load_state_dict(to_reference(ours))  # strictly: every name and shape
    expected = ours(signal()).waveform
    waveform, _ = theirs.eval()(signal())
    assert (waveform - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_there_and_back_every_tensor_is_the_same_to_the_last_bit():
    state = published().state_dict()
    back = to_reference(from_reference(state))
    # The statistics of the two heads are of the same input; torch sums them twice in the same way.
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(back[name], tensor), name
    assert back.keys() == state.keys()
    ours = trained_like(BSRNNConfig(16, 2))
    again = from_reference(to_reference(ours))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@torch.inference_mode()
def test_heads_whose_statistics_differ_are_converted_too():
    theirs = published()
    for head in theirs.mask_decoder.mlp_residual:
        head[0].running_mean += 0.3
        head[0].running_var *= 1.7
    waveform, _ = theirs(signal())
    ours = from_reference(theirs.state_dict())(signal()).waveform
    assert (ours - waveform).abs().max() <= 1e-5 * waveform.abs().max()


def test_the_command_converts_to_and_fro(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    theirs = published()
    wrapped = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}  # of a distributed training
    torch.save({"model": wrapped, "optim": {"lr": 2e-3}, "epoch": 500}, tmp_path / "00500.pth")
    assert main([str(tmp_path / "00500.pth")]) == 0
    assert "00500.pt: a model of this project, 16 channels, 2 layers, 31 bands" in capsys.readouterr().out
    model = load_model(tmp_path / "00500.pt")
    assert model.config == BSRNNConfig(16, 2)
    assert main([str(tmp_path / "00500.pt"), str(tmp_path / "back.pth")]) == 0
    assert "back.pth: a checkpoint of the FastEnhancer repository, 16 channels" in capsys.readouterr().out
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert all(torch.equal(back[name], theirs.state_dict()[name]) for name in back if "tracked" not in name)


def test_a_users_mistake_is_one_line(tmp_path: Path):
    def said(content: object, *more: str) -> str:
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises((ValueError, OSError)) as error:
            main([str(tmp_path / "file.pth"), *more])
        assert "\n" not in str(error.value)
        return str(error.value)

    state = dict(published().state_dict())
    assert "holds no state dict under 'model'" in said({"weights": state})
    assert "not the state of a BSRNN" in said({"model": {"encoder.weight": torch.zeros(3)}})
    assert "rnn_time.1.weight_ih_l0" in said(
        {"model": {k: v for k, v in state.items() if k != "rnn_time.1.weight_ih_l0"}}
    )
    assert "band_split.norm.0.weight is missing" in said(
        {"model": {k: v for k, v in state.items() if not k.startswith("band_split.norm")}}
    )
    assert "extra.weight: no such weight" in said({"model": state | {"extra.weight": torch.zeros(3)}})
    save_model(trained_like(BSRNNConfig(16, 1)), tmp_path / "ours.pt")
    with pytest.raises(ValueError, match="name the file to write too"):
        main([str(tmp_path / "ours.pt")])
    with pytest.raises(ValueError, match="is the input"):
        main([str(tmp_path / "ours.pt"), str(tmp_path / "ours.pt")])
    with pytest.raises(ValueError, match=r"other.pt: .* checkpoint of the FastEnhancer .*: name it other.pth"):
        main([str(tmp_path / "ours.pt"), str(tmp_path / "other.pt")])
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("setting", [{"causal": False}, {"compression": 0.5}, {"hop_length": 128}])
def test_what_their_layout_cannot_say_is_refused(setting: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} = "):
        to_reference(BSRNN(BSRNNConfig(16, 1, **setting)))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    save_model(trained_like(BSRNNConfig(16, 1)), tmp_path / "ours.pt")
    with pytest.raises(OSError, match=r"theirs.pth: cannot be written .*: choose another path") as raised:
        main([str(tmp_path / "ours.pt"), str(tmp_path / "ours.pt" / "theirs.pth")])
    assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST), "by its number a full disk is known"


def test_a_folded_model_cannot_be_converted():
    with pytest.raises(ValueError, match="it is folded"):
        to_reference(fold(trained_like(BSRNNConfig(16, 1))))
