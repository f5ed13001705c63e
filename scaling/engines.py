"""Engines: how a global batch becomes one optimiser step, on one process or on many.

A global batch is V micro-batches, of which a rank computes its share one after another. What
the engines have in common is what a step means: the mean over the V losses, its gradient, one
step of the optimiser, and running norm statistics that took in every norm batch in the order
of the micro-batches. How the ranks add up differs:

    DataParallel   one process, or DistributedDataParallel through Accelerate: fast, and equal over world
                   sizes up to the rounding of sums
    FixedOrder     gradients, losses and statistics of every micro-batch gathered and added in one order
                   (execution.audit): bit for bit the same on any world size, for checking the others
    ZeRO           DeepSpeed's stages 0 to 3 through Accelerate (execution.zero_stage): optimiser state,
                   gradients and parameters cut into parts, one a rank
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bsrnn import BSRNN
from bsrnn.losses import enhancement_loss
from bsrnn.lstm import LSTM, keep_out_of_graphs
from bsrnn.norm import batch_norms, running_statistics, synchronise
from scaling.config import RunConfig
from scaling.device import uses_gpu
from scaling.errors import UserError
from scaling.optimiser import build_optimiser, set_learning_rate
from scaling.processes import Processes
from scaling.stream import to_float

# fp16: steps in a row without a finite gradient after which a run counts as diverged. The scaler begins at 2^16 and
# halves its scale at each, so that after as many no scale is left that would help.
MOST_OVERFLOWS = 50


class Step(NamedTuple):
    """What one optimiser step showed, the same on every rank."""

    loss: float
    terms: dict[str, float]
    gradient_norm: float
    should_stop: bool  # whether any rank has been asked to


def make_engine(config: RunConfig, processes: Processes) -> Engine:
    """The engine that the execution settings ask for; UserError for what they cannot have here."""
    execution = config.execution
    on_gpu = uses_gpu(execution.device)
    if execution.device == "cuda" and not on_gpu:
        raise UserError("execution.device = cuda: torch finds no GPU here; take execution.device=auto")
    if execution.audit and on_gpu:
        raise UserError(
            "execution.audit: sums on a GPU have no order that is always the same; take execution.device=cpu"
        )
    if execution.zero_stage is not None and not on_gpu and torch.cuda.is_available():
        raise UserError(
            f"deepspeed takes the GPU of a machine that has one, whatever execution.device = {execution.device} says; "
            "hide it with CUDA_VISIBLE_DEVICES="
        )
    if config.train.precision == "fp16":
        if not on_gpu:
            raise UserError("train.precision = fp16 needs a GPU and torch finds none: take bf16 or fp32")
        if execution.audit or execution.zero_stage is not None:
            raise UserError("train.precision = fp16 goes neither with execution.audit nor with deepspeed: take bf16")
    if execution.zero_stage is not None:
        return ZeRO(config, processes)
    return FixedOrder(config, processes) if execution.audit else DataParallel(config, processes)


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
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.train.precision]
        obstacle = lstm.obstacle(torch.empty(1, 1, lstm.input_size, dtype=dtype, device=self.device))
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


class DataParallel(Engine):
    """One process, or the same model on every rank with the gradients averaged during the backward pass."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
        # Buffers are running norm statistics, which are combined at a step's end (see _combine_statistics).
        keywords = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=self.on_cpu, kwargs_handlers=[keywords])
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
        total, terms, should_stop = self._mean_over_ranks(total, terms, is_asked_to_stop)
        bound = self.config.train.optimiser.max_gradient_norm
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if bound is None else bound))
        if self.accelerator.scaler is not None:
            self.optimiser.step()  # fp16: the scaler itself passes over gradients that overflowed
            norm = self._norm_of_a_scaled_step(norm)
        elif math.isfinite(norm):
            self.optimiser.step()
        return _step(total, terms, norm, should_stop)

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
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> dict[str, Any]:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def _mean_over_ranks(
        self, total: Tensor, terms: dict[str, Tensor], is_asked_to_stop: bool
    ) -> tuple[Tensor, dict[str, Tensor], bool]:
        if self.processes.world_size == 1:
            return total, terms, is_asked_to_stop
        self.processes.at("adding up with the other ranks")
        means = torch.stack([total, *terms.values(), total.new_tensor(float(is_asked_to_stop))])
        total, *values, stops = (self.processes.sum_(means) / self.processes.world_size).unbind()
        return total, dict(zip(terms, values, strict=True)), stops.item() > 0

    def communication_seconds(self) -> float | None:
        if not isinstance(self.network, DistributedDataParallel):
            return None
        sampled = self.network._get_ddp_logging_data()
        nanoseconds = sampled.get("avg_backward_comm_time", 0)
        overlap = sampled.get("avg_backward_compute_comm_overlap_time", 0)
        return (nanoseconds - overlap) / 1e9 if nanoseconds else None

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


class FixedOrder(DataParallel):
    """All of every micro-batch gathered on every rank, and added in the order of the micro-batches."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        if self.span > 1:
            raise UserError(
                f"execution.audit needs whole norm batches in a process: {processes.world_size} processes have "
                f"{self.micro_batch} crops each and train.norm_batch = {config.train.norm_batch}; take fewer processes"
            )
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


class ZeRO(DataParallel):
    """DeepSpeed's engine, in 32 bits with autocast where the precision is bf16."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        from accelerate.utils import DeepSpeedPlugin

        Engine.__init__(self, config, processes)
        assert config.execution.zero_stage is not None
        self.stage = config.execution.zero_stage
        if config.execution.compile:
            raise UserError("execution.compile does not go with deepspeed: leave one of them out")
        _prepare_deepspeed(self.on_cpu)
        bound = config.train.optimiser.max_gradient_norm
        plugin = DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.num_micro_batches // processes.world_size,
                "gradient_clipping": 0.0 if bound is None else bound,
                "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            }
        )
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # Without the backend named, Accelerate on CPU makes W groups of one, and says nothing.
        backend = InitProcessGroupKwargs(backend="gloo" if self.on_cpu else "nccl")
        self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend])
        self._check_group(DistributedType.DEEPSPEED)
        self._set_precision(self.model)
        self.network, self.optimiser = self.accelerator.prepare(self.model, self.optimiser)
        if self.network.zero_optimization_stage() != self.stage:
            raise RuntimeError(f"DeepSpeed runs stage {self.network.zero_optimization_stage()}, expected {self.stage}")

    def optimise(self, batches: Iterator[Any], lr: float, is_asked_to_stop: bool) -> Step:
        set_learning_rate(self.network.optimizer, lr)
        self.network.train()
        before = self._set_statistics_aside()
        losses, parts, norm = [], [], 0.0
        for loss, terms, is_last in self._losses(batches, self.network):
            with self.processes.naming_the_lost():
                self.network.backward(loss)  # which divides it by the number of micro-batches
                if self.stage == 0 and is_last:  # the only stage that does not tell it afterwards
                    gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                    norm = float(torch.nn.utils.get_total_norm(gradients))
                self.network.step()  # which does something after the last of them only
            losses.append(loss.detach())
            parts.append(terms)
        self._combine_statistics(before)
        total = torch.stack(losses).mean()
        terms = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        total, terms, should_stop = self._mean_over_ranks(total, terms, is_asked_to_stop)
        if self.stage > 0:
            norm = float(self.network.get_global_grad_norm())
        return _step(total, terms, norm, should_stop)

    def _set_precision(self, model: BSRNN) -> None:
        """As Accelerate does elsewhere, in `forward`: DeepSpeed turns off autocast that it finds on around it."""
        if self.config.train.precision == "bf16":
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]

    def evaluation_model(self) -> BSRNN:
        if self.stage < 3:
            return self.model
        import deepspeed

        config = self.config
        whole = BSRNN(config.model.architecture(config.train.norm_batch)).to(self.device)
        self._set_precision(whole)
        # A parameter is whole on all ranks within the context, and in parts again after it.
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            whole.load_state_dict(self.model.state_dict())
        return whole

    def write(self, folder: Path, extra: dict[str, Any]) -> None:
        model = self.evaluation_model()
        if self.processes.is_first:
            torch.save({"model": model.state_dict(), **extra}, folder / "state.pt")
        (folder / "zero").mkdir(exist_ok=True)  # DeepSpeed does not say where it cannot
        with self.processes.naming_the_lost():
            self.network.save_checkpoint(str(folder), tag="zero")

    def load(self, folder: Path) -> dict[str, Any]:
        with self.processes.naming_the_lost():
            path, _ = self.network.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder / 'zero'}")
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)

    @property
    def layout(self) -> dict[str, int] | None:
        return {"zero_stage": self.stage, "world_size": self.processes.world_size}


def _step(total: Tensor, terms: dict[str, Tensor], norm: float, should_stop: bool) -> Step:
    """The numbers of all, brought from the device at once."""
    loss, *values = torch.stack([total, *terms.values()]).tolist()
    return Step(loss, dict(zip(terms, values, strict=True)), norm, should_stop)


def _mean_in_order(rows: Tensor) -> Tensor:
    """The mean of the rows, added one after another: `Tensor.mean` may add in an order of its own."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total / len(rows)


def _prepare_deepspeed(on_cpu: bool) -> None:
    """UserError if DeepSpeed is not installed; without the operator it would compile for inference on CPU."""
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"deepspeed is not installed ({error}): pip install 'bsrnn-scaling[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        # A minute of compiling under a lock that a killed process leaves behind; training goes over gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
