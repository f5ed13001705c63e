"""How a run ends: asked to stop before its records begin, and what an error is called."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.locks import held_lock
from scaling.plan import RunPlan, plan_run
from scaling.run import classify, execute
from scaling.shards import ShardIndex
from scaling.stopping import StopFlag


def test_a_lost_terminal_asks_a_run_to_stop_unless_it_was_started_to_outlive_it():
    before = signal.getsignal(signal.SIGHUP)
    heard = []
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):  # the second as nohup leaves it
            signal.signal(signal.SIGHUP, handler)
            with StopFlag() as stop, stop.deferred():
                os.kill(os.getpid(), signal.SIGHUP)
                heard.append(stop.signal)
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == ["SIGHUP", None]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node failure"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "node failure"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error"), "node failure"),
        (RuntimeError("CUDA error: device-side assert triggered"), "code error"),
        (BrokenProcessPool("A child process terminated abruptly"), "node failure"),
    ],
)
def test_what_a_gpu_or_a_killed_worker_says_in_the_end_is_told_apart(error: Exception, kind: str):
    assert classify(error)[0] == kind


def test_a_run_that_is_told_to_stop_before_it_has_begun_says_so(
    tiny_run: list[str], tiny_index: ShardIndex, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_run(load_config(RunConfig, "run", tiny_run), tiny_index)
    monkeypatch.setattr(RunPlan, "check_folder", lambda plan: signal.raise_signal(signal.SIGTERM))
    assert execute(plan) == 75
    monkeypatch.undo()
    assert not plan.directory.plan.exists()
    with held_lock(plan.directory.lock, "its lock is free"):
        pass
