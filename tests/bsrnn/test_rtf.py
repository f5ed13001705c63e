"""The real-time factor is measured on the sizes of the table, and on any width and depth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml

from bsrnn import BSRNNConfig
from bsrnn.compiled import NotCompiledError
from bsrnn.rtf import SIZES, OnnxStep, main, measure, table_line
from bsrnn.streaming import Stream
from tests.bsrnn.test_model import trained_like

CONF = Path(__file__).parents[2] / "conf" / "model"


def test_the_sizes_are_those_of_the_configuration():
    for name, size in SIZES.items():
        choice = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert (choice["num_channels"], choice["num_layers"]) == size


def test_what_is_timed_enhances_alike():
    model = trained_like(BSRNNConfig(16, 2))
    signal = 0.1 * torch.randn(1, 4_096)
    ours, onnx = (
        torch.cat([*(stream.process(hop) for hop in signal.split(256, dim=1)), stream.flush()], dim=1)
        for stream in (Stream(model), Stream(model, step=OnnxStep(model)))
    )
    assert (ours - onnx).abs().max() <= 1e-5 * ours.abs().max()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Measuring sets them to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_measures_the_sizes_that_it_is_given(capsys: pytest.CaptureFixture[str]):
    assert main(["xxt", "16x1", "seconds=0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["size", "this", "project", "onnxruntime", "ratio", "step"]
    for line, size in zip(lines[2:], ["xxt", "16x1"], strict=True):
        name, ours, onnx, ratio, step = line.split()
        assert (name, step) == (size, "kernel")
        assert 1e-4 < float(ours) < 10
        assert 1e-4 < float(onnx) < 10
        assert float(ratio) == pytest.approx(float(ours) / float(onnx), rel=0.1)


def test_what_was_measured_in_torch_says_so_and_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bsrnn.kernel._library", _no_compiler)
    found = measure(BSRNNConfig(8, 1), 0.05)
    assert found.step == "torch: kernel.c could not be compiled: no cc"
    assert found.step in table_line("8x1", found)


def test_norms_that_follow_the_signal_are_measured_without_onnxruntime_and_the_whole_recordings_not_at_all():
    found = measure(BSRNNConfig(8, 1, norm="cumulative"), 0.05)
    assert found.rtf_onnxruntime is None
    assert re.fullmatch(r" +8x1 +[0-9.]+ +– +– +torch: its normalisations are not folded", table_line("8x1", found))
    with pytest.raises(ValueError, match="norm = group, causal = True: enhances whole recordings"):
        measure(BSRNNConfig(8, 1, norm="group"), 0.05)


def _no_compiler() -> NoReturn:
    raise NotCompiledError("kernel.c could not be compiled: no cc")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["huge"], "huge: no such size"),
        (["c8"], "c8: no such size; .*WIDTHxDEPTH, such as 8x6,"),
        (["study=nowhere"], "expected"),
        (["seconds=-1"], "seconds = -1"),
        (["threads=2"], "expected"),
    ],
)
def test_a_users_mistake_is_one_line(words: list[str], said: str):
    with pytest.raises((ValueError, OSError), match=said) as error:
        main(words)
    assert "\n" not in str(error.value)
