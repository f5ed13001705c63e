"""What takes a run's steps: a GPU's limits, a launcher's variables, the arithmetic."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend

from scaling import engines, train
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.device import require_gpu, set_arithmetic, warn_of_idle_gpu
from scaling.engines import make_engine, zero
from scaling.engines.data_parallel import MOST_OVERFLOWS, DataParallel
from scaling.errors import UnreachableError, UserError
from scaling.processes import ALONE
from scaling.run import classify


def test_variables_of_a_launcher_change_no_gradient(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    engine = DataParallel(load_config(RunConfig, "run", tiny_run), ALONE)
    weight = next(engine.model.parameters())
    engine.accelerator.backward(weight.sum())
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_launcher_that_names_a_compiler_compiles_no_model(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = DataParallel(load_config(RunConfig, "run", tiny_run), ALONE)
    assert engine.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert engine.network is engine.model
    AcceleratorState._reset_state(reset_partial_state=True)


def test_deepspeed_compiles_nothing_either_and_measures_nothing_that_waits_for_the_gpu(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
):
    class AskedError(Exception):
        pass

    asked: dict[str, Any] = {}

    def accelerator(**settings: Any) -> None:
        asked.update(settings)
        raise AskedError

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # put back after the test
    monkeypatch.setattr(zero, "_prepare_deepspeed", lambda on_cpu: None)
    monkeypatch.setattr(zero, "Accelerator", accelerator)
    with pytest.raises(AskedError):
        zero.ZeRO(load_config(RunConfig, "run", [*tiny_run, "deepspeed=zero2"]), ALONE)
    assert asked["dynamo_backend"] == "no"
    assert asked["deepspeed_plugin"].deepspeed_config["timers"] == {"throughput": {"enabled": False}}


@pytest.mark.parametrize(("given", "are_set"), [({}, "1 1"), ({"NCCL_IB_DISABLE": "0"}, "1 0")])
def test_links_that_gpus_have_in_name_alone_are_left_alone_before_accelerate_looks(
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, str],
    are_set: str,
):
    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    for name in names:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = load_config(RunConfig, "run", tiny_run)
    monkeypatch.setattr(engines, "DataParallel", lambda *_: " ".join(os.environ.get(name, "-") for name in names))
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: False)
    assert "-" in make_engine(config, ALONE), "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    caplog.set_level("INFO")
    for _ in range(2):
        assert make_engine(config, ALONE) == are_set
    assert [record.getMessage() for record in caplog.records] == [
        "GPUs of the RTX 40 series with a driver before 550.40: NCCL_P2P_DISABLE and NCCL_IB_DISABLE are set to 1"
    ]


def test_gradients_that_overflow_are_passed_over_as_long_as_the_scaler_can_help():
    engine = DataParallel.__new__(DataParallel)
    engine._num_overflows = 0
    for _ in range(3):
        assert [engine._norm_of_a_scaled_step(math.inf) for _ in range(MOST_OVERFLOWS)] == [0.0] * MOST_OVERFLOWS
        assert engine._norm_of_a_scaled_step(1.5) == 1.5
    for _ in range(MOST_OVERFLOWS):
        engine._norm_of_a_scaled_step(math.nan)
    assert math.isnan(engine._norm_of_a_scaled_step(math.nan)), "the run has diverged"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["execution.audit=true"], "execution.audit: sums on a GPU have no order that is always the same"),
        (["deepspeed=zero2", "execution.device=cpu"], "hide it with CUDA_VISIBLE_DEVICES="),
        (
            ["train.precision=bf16"],
            r"train.precision = bf16: expected a GPU that has it .compute capability 8.0 or later., and this is a T4: "
            "take fp32 or fp16",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_in_a_line(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    with pytest.raises(UserError, match=told):
        make_engine(load_config(RunConfig, "run", [*tiny_run, *words]), ALONE)


def test_products_in_32_bits_are_in_32_bits_whatever_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for precision in ("fp32", "bf16"):
        set_arithmetic(precision)
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")


def test_a_job_with_gpus_that_torch_does_not_see_does_not_train_on_the_cpu_instead(monkeypatch: pytest.MonkeyPatch):
    for device, gpus in (("auto", 0), ("cpu", 4)):
        require_gpu(device, gpus)
    for device in ("auto", "cuda"):
        with pytest.raises(
            UnreachableError, match=r"torch sees no GPU on \S+, where the job has 4 a node: it is"
        ) as raised:
            require_gpu(device, 4)
        assert classify(raised.value)[0] == "node failure"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_gpu("auto", 4)


@pytest.mark.parametrize(
    ("device", "named", "is_told"),
    [("auto", None, True), ("auto", "0", True), ("auto", "", False), ("cpu", None, False)],
)
def test_a_gpu_that_torch_cannot_use_is_told_in_a_line_unless_nobody_wants_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    device: str,
    named: str | None,
    is_told: bool,
):
    monkeypatch.setattr("scaling.gpus.DRIVERS_GPUS", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    warn_of_idle_gpu(device)
    assert not caplog.records, "there is none"
    (tmp_path / "0000:01:00.0").mkdir()
    warn_of_idle_gpu(device)
    assert [record.getMessage() for record in caplog.records] == is_told * [
        "this machine has an NVIDIA GPU that torch, built for CUDA 13.0, cannot use: training on the CPU; install a "
        "torch build for your driver, or say execution.device=cpu"
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    warn_of_idle_gpu(device)
    assert len(caplog.records) == is_told


def test_a_run_of_its_own_tells_of_the_gpu_that_it_cannot_use(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr("scaling.gpus.DRIVERS_GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(train, "execute", lambda plan, force: 0)
    for rank, times in (("0", 1), ("1", 1)):  # the first of several processes alone
        monkeypatch.setenv("RANK", rank)
        assert train.main(tiny_run) == 0
        assert caplog.text.count("cannot use: training on the CPU") == times
