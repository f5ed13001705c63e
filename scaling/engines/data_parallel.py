"""One process, or DistributedDataParallel on many, through Accelerate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bsrnn.lstm import keep_out_of_graphs
from scaling.config import RunConfig
from scaling.engines.base import Engine, Step
from scaling.optimiser import set_learning_rate
from scaling.processes import Processes

# fp16: steps in a row without a finite gradient after which a run counts as diverged. The scaler begins at 2^16 and
# halves its scale at each, so that after as many no scale is left that would help.
MOST_OVERFLOWS = 50


class DataParallel(Engine):
    """One process, or the same model on every rank with the gradients averaged during the backward pass."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
        # Buffers are running norm statistics, which are combined at a step's end (see _combine_statistics).
        keywords = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            mixed_precision=precision,
            # Else a variable of the environment would divide the gradients once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",  # else another would compile the model, and let 32-bit products be rounded (TF32)
            cpu=self.on_cpu,
            kwargs_handlers=[keywords],
        )
        self._check_group(self._group_type)
        with warnings.catch_warnings():
            # The keyword's successor synchronises buffers once at the start, and Accelerate does not take it yet.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.network, self.optimiser = self.accelerator.prepare(self.model, self.optimiser)
        self._num_overflows = 0  # fp16: steps in a row whose gradients were no numbers
        if config.execution.compile:
            keep_out_of_graphs()
        # Compiled for the one shape of training; validation's whole utterances are of every length.
        self.compiled = torch.compile(self.network) if config.execution.compile else self.network

    def optimise(self, batches: Iterator[Any], lr: float, is_asked_to_stop: bool) -> Step:
        set_learning_rate(self.optimiser, lr)
        self.network.train()
        self.optimiser.zero_grad()
        num_own = self.num_micro_batches // self.processes.world_size
        total = torch.zeros((), device=self.device)
        terms: dict[str, Tensor] = {}
        before = self._set_statistics_aside() if self.processes.world_size > 1 else None
        share = self._losses(batches, self.compiled)
        for number in range(num_own):
            is_last = number == num_own - 1
            # Gradients of all but the last are kept, and go to the other ranks together with the last's.
            with nullcontext() if is_last else self.accelerator.no_sync(self.network):
                loss, parts, _ = next(share)
                with self.processes.naming_the_lost():
                    self.accelerator.backward(loss / num_own)
            total += loss.detach() / num_own
            for name, term in parts.items():
                terms[name] = terms.get(name, 0) + term / num_own
        if before is not None:
            self._combine_statistics(before)
        total, terms, stops = self._mean_over_ranks(total, terms, is_asked_to_stop)
        bound = self.config.train.optimiser.max_gradient_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if bound is None else bound)
        step = Step.of(total, terms, norm, stops)
        if self.accelerator.scaler is not None:
            self.optimiser.step()  # fp16: the scaler itself passes over gradients that overflowed
            return step._replace(gradient_norm=self._norm_of_a_scaled_step(step.gradient_norm))
        if math.isfinite(step.gradient_norm):
            self.optimiser.step()
        return step

    def _norm_of_a_scaled_step(self, norm: float) -> float:
        """0 for gradients that overflowed, as they may while the scaler finds its scale; the norm if they go on."""
        self._num_overflows = 0 if math.isfinite(norm) else self._num_overflows + 1
        return norm if math.isfinite(norm) or self._num_overflows > MOST_OVERFLOWS else 0.0

    def write(self, folder: Path, extra: dict[str, Any]) -> None:
        if not self.processes.is_first:
            return
        scaler = self.accelerator.scaler
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            **extra,
        }
        with (folder / "state.pt").open("wb") as file:  # torch itself would not say what the disk answered
            torch.save(state, file)

    def load(self, folder: Path) -> dict[str, Any]:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def communication_seconds(self) -> float | None:
        if not isinstance(self.network, DistributedDataParallel):
            return None
        sampled = self.network._get_ddp_logging_data()
        nanoseconds = sampled.get("avg_backward_comm_time", 0)
        overlap = sampled.get("avg_backward_compute_comm_overlap_time", 0)
        return (nanoseconds - overlap) / 1e9 if nanoseconds else None
