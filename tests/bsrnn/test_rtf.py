"""The real-time factor is measured on the sizes of the table and put where the scaling table finds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml

from bsrnn import BSRNNConfig
from bsrnn.compiled import NotCompiledError
from bsrnn.counting import count_macs, count_parameters
from bsrnn.rtf import SIZES, OnnxStep, main
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


def test_the_command_appends_a_row_for_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    try:
        assert main(["xxt", "16x1", "seconds=0.1", f"study={tmp_path}"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (tmp_path / "rtf.jsonl").read_text().splitlines()]
    for row, size in zip(rows, [(16, 2), (16, 1)], strict=True):
        config = BSRNNConfig(*size)
        assert (row["num_channels"], row["num_layers"], row["threads"]) == (*size, 1)
        assert row["num_params"] == count_parameters(config).total
        assert row["macs_per_second"] == count_macs(config).total
        assert 1e-4 < row["rtf"] < 10
        assert row["step"] == "kernel"
        assert 1e-4 < row["rtf_onnxruntime"] < 10
    assert re.search(r"16x1 .* kernel\n", capsys.readouterr().out)


def test_a_row_measured_in_torch_says_so_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("bsrnn.kernel._library", _no_compiler)
    threads = torch.get_num_threads()
    try:
        assert main(["8x1", "seconds=0.05", f"study={tmp_path}"]) == 0
    finally:
        torch.set_num_threads(threads)
    why = "torch: kernel.c could not be compiled: no cc"
    assert json.loads((tmp_path / "rtf.jsonl").read_text())["step"] == why
    assert why in capsys.readouterr().out


def _no_compiler() -> NoReturn:
    raise NotCompiledError("kernel.c could not be compiled: no cc")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["huge"], "huge: no such size"),
        (["c8"], "c8: no such size; .*WIDTHxDEPTH, such as 8x6,"),
        (["study=nowhere"], "nowhere: no such folder"),
        (["seconds=-1"], "seconds = -1"),
        (["threads=2"], "expected"),
    ],
)
def test_a_users_mistake_is_one_line(words: list[str], said: str):
    with pytest.raises((ValueError, OSError), match=said) as error:
        main(words)
    assert "\n" not in str(error.value)
