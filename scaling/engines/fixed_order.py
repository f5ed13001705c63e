"""The engine of execution.audit: sums in one order, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bsrnn.norm import batch_norms, running_statistics
from scaling.config import RunConfig
from scaling.engines.base import Step
from scaling.engines.data_parallel import DataParallel
from scaling.optimiser import set_learning_rate
from scaling.processes import Processes


class FixedOrder(DataParallel):
    """All of every micro-batch gathered on every rank, and added in the order of the micro-batches."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        # Never synchronised by DistributedDataParallel: its wrapper is not called.
        self.network = self.model

    def optimise(self, batches: Iterator[Any], lr: float, is_asked_to_stop: bool) -> Step:
        set_learning_rate(self.optimiser, lr)
        self.model.train()
        statistics = running_statistics(self.model)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        before = self._set_statistics_aside()
        rows = []
        names: list[str] = []
        for loss, terms, _ in self._losses(batches, self.model):
            names = list(terms)
            gradients = torch.autograd.grad(loss, parameters)
            numbers = torch.stack([loss.detach(), *terms.values(), loss.new_tensor(float(is_asked_to_stop))])
            rows.append(torch.cat([numbers, *statistics, *(gradient.flatten() for gradient in gradients)]))
            for statistic in statistics:
                statistic.zero_()
        self.processes.at("adding up with the other ranks")
        gathered = self.processes.gather_tensors(torch.stack(rows)).flatten(0, 1)  # (V, numbers of a micro-batch)
        numbers, running, gradient = gathered.split(
            [len(names) + 2, sum(map(len, before)), sum(p.numel() for p in parameters)], dim=1
        )
        self._add_statistics(before, running)
        parts = _mean_in_order(gradient).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        bound = self.config.train.optimiser.max_gradient_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if bound is None else bound))
        if math.isfinite(norm):
            self.optimiser.step()
        total, *values, stops = _mean_in_order(numbers).tolist()
        return Step(total, dict(zip(names, values, strict=True)), norm, stops > 0)

    def _add_statistics(self, before: list[Tensor], running: Tensor) -> None:
        """running: what each micro-batch alone made of statistics of zero, (V, statistics)"""
        statistics = running_statistics(self.model)
        if not statistics:
            return
        keep = 1 - batch_norms(self.model)[0].momentum
        per_micro_batch = self.micro_batch // self.config.train.norm_batch
        total = torch.cat(before)
        for row in running:
            total = keep**per_micro_batch * total + row
        for statistic, new in zip(statistics, total.split([len(s) for s in statistics]), strict=True):
            statistic.copy_(new)


def _mean_in_order(rows: Tensor) -> Tensor:
    """The mean of the rows, added one after another: `Tensor.mean` may add in an order of its own."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total / len(rows)
