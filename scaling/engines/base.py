"""What the engines have in common: a model, its optimiser, a rank's share of a global batch, and sums over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from bsrnn import BSRNN
from bsrnn.losses import enhancement_loss
from bsrnn.lstm import LSTM
from bsrnn.norm import batch_norms, running_statistics, synchronise
from scaling.config import RunConfig
from scaling.device import uses_gpu
from scaling.optimiser import build_optimiser
from scaling.processes import Processes
from scaling.stream import to_float


class Step(NamedTuple):
    """What one optimiser step showed, the same on every rank."""

    loss: float
    terms: dict[str, float]
    gradient_norm: float
    should_stop: bool  # whether any rank has been asked to

    @classmethod
    def of(cls, total: Tensor, terms: dict[str, Tensor], norm: Tensor | float, stops: Tensor | bool) -> Step:
        """From scalars, brought from the device at once. stops: above 0 where a rank is asked to stop"""
        scalars = [
            scalar if isinstance(scalar, Tensor) else torch.full((), float(scalar), device=total.device)
            for scalar in (total, norm, stops, *terms.values())
        ]
        loss, gradient_norm, asked, *values = torch.stack(scalars).tolist()
        return cls(loss, dict(zip(terms, values, strict=True)), gradient_norm, asked > 0)


class Engine:
    """A model and its optimiser, and the way to take a step."""

    accelerator: Accelerator

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.micro_batch, self.span = config.micro_batches(processes.world_size)
        self.num_micro_batches = config.train.global_batch // self.micro_batch  # of all ranks together
        torch.manual_seed(config.seed)
        self.model = BSRNN(config.model.architecture(config.train.norm_batch))
        self.optimiser: Any = build_optimiser(config.train.optimiser, self.model)
        if self.span > 1:
            synchronise(self.model, processes.subgroup(self.span))

    @property
    def on_cpu(self) -> bool:
        return not uses_gpu(self.config.execution.device)

    @property
    def device(self) -> torch.device:
        device = self.accelerator.device
        return torch.device("cpu") if device.type == "cpu" else device  # torch.load knows no cpu:0

    def optimise(self, batches: Iterator[Any], lr: float, is_asked_to_stop: bool) -> Step:
        """One optimiser step at a learning rate over this rank's share of a global batch."""
        raise NotImplementedError

    def lstm(self) -> str:
        """What computes the LSTMs in training, which differ in rounding: "compiled", or torch and why."""
        (lstm, *_) = (module for module in self.model.modules() if isinstance(module, LSTM))
        obstacle = lstm.obstacle(torch.empty(1, 1, lstm.input_size, device=self.device))
        return "compiled" if obstacle is None else f"torch: {obstacle}"

    def evaluation_model(self) -> BSRNN:
        """The model as it stands, whole, on every rank, computing in the training's precision: to validate."""
        return self.model

    def communication_seconds(self) -> float | None:
        """Of a step, from the first gradient's departure to the last's arrival, less what backward computes meanwhile.

        A mean over the steps that torch sampled; None where there is no communication, or none was measured.
        """
        return None

    def trained_model(self) -> BSRNN:
        """As `scaling.evaluate` will load it: not compiled, and in 32 bits whatever the training's precision."""
        model = BSRNN(self.config.model.architecture(self.config.train.norm_batch)).to(self.device)
        model.load_state_dict(self.evaluation_model().state_dict())
        return model

    def write(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write this rank's part of a checkpoint.

        Rank 0 writes `state.pt`, with the whole model under "model", and what else the caller wants kept.
        """
        raise NotImplementedError

    def load(self, folder: Path) -> dict[str, Any]:
        """Take up the checkpoint in a folder; what its `state.pt` holds."""
        raise NotImplementedError

    @property
    def layout(self) -> dict[str, int] | None:
        """How the state is cut into parts: it can be read only as it was written; None: whole, readable by all."""
        return None

    def _losses(self, batches: Iterator[Any], network: Any) -> Iterator[tuple[Tensor, dict[str, Tensor], bool]]:
        """The loss and its terms of each of this rank's micro-batches, and whether it is the step's last."""
        num_own = self.num_micro_batches // self.processes.world_size
        for number in range(num_own):
            self.processes.at("reading data")
            noisy, clean = (to_float(part, self.device) for part in next(batches))
            self.processes.at("computing")
            loss = enhancement_loss(network(noisy), clean, self.model.stft, self.config.train.losses)
            yield loss.total, {name: term.detach() for name, term in loss.terms.items()}, number == num_own - 1

    def _mean_over_ranks(
        self, total: Tensor, terms: dict[str, Tensor], is_asked_to_stop: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | bool]:
        if self.processes.world_size == 1:
            return total, terms, is_asked_to_stop
        self.processes.at("adding up with the other ranks")
        means = torch.stack([total, *terms.values(), torch.full_like(total, is_asked_to_stop)])
        total, *values, stops = (self.processes.sum_(means) / self.processes.world_size).unbind()
        return total, dict(zip(terms, values, strict=True)), stops

    def _set_statistics_aside(self) -> list[Tensor]:
        """The running statistics before a step; during it they gather from zero what this rank's batches add."""
        statistics = running_statistics(self.model)
        before = [statistic.clone() for statistic in statistics]
        for statistic in statistics:
            statistic.zero_()
        return before

    def _combine_statistics(self, before: list[Tensor]) -> None:
        """Put together what all ranks gathered, as if one process had met the norm batches in their order.

        A running statistic is a weighted sum, r ← (1 − m) r + m s for each norm batch in turn, so
        the share of a rank whose batches are followed by n others counts (1 − m)ⁿ times.
        """
        statistics = running_statistics(self.model)
        if not statistics:
            return
        keep = 1 - batch_norms(self.model)[0].momentum
        num_batches = self.config.train.global_batch // self.config.train.norm_batch
        num_spans = self.processes.world_size // self.span
        span = self.processes.rank // self.span
        followed_by = num_batches // num_spans * (num_spans - 1 - span)
        flat = torch.cat(statistics) * (keep**followed_by / self.span)
        self.processes.sum_(flat)
        for statistic, old, new in zip(statistics, before, flat.split([len(s) for s in statistics]), strict=True):
            statistic.copy_(keep**num_batches * old + new)

    def _check_group(self, expected: DistributedType) -> None:
        """RuntimeError if Accelerate made another kind of group than was asked for: it would train W runs apart."""
        found = self.accelerator.state
        if (found.distributed_type, found.num_processes) != (expected, self.processes.world_size):
            raise RuntimeError(
                f"Accelerate made a group of type {found.distributed_type} with {found.num_processes} processes, "
                f"expected {expected} with {self.processes.world_size}"
            )

    @property
    def _group_type(self) -> DistributedType:
        if self.processes.world_size == 1:
            return DistributedType.NO
        return DistributedType.MULTI_CPU if self.on_cpu else DistributedType.MULTI_GPU
