"""DeepSpeed's ZeRO, through Accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from bsrnn import BSRNN
from scaling.config import RunConfig
from scaling.engines.base import Engine, Step
from scaling.errors import UserError
from scaling.optimiser import set_learning_rate
from scaling.processes import Processes


class ZeRO(Engine):
    """DeepSpeed's engine, in 32 bits with autocast where the precision is bf16."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        from accelerate.utils import DeepSpeedPlugin

        super().__init__(config, processes)
        assert config.execution.zero_stage is not None
        self.stage = config.execution.zero_stage
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
                "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at both ends of every step
            }
        )
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # Without the backend named, Accelerate on CPU makes W groups of one, and says nothing.
        backend = InitProcessGroupKwargs(backend="gloo" if self.on_cpu else "nccl")
        # In words, since variables of the environment would else have their say.
        self.accelerator = Accelerator(
            mixed_precision="no", dynamo_backend="no", deepspeed_plugin=plugin, kwargs_handlers=[backend]
        )
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
        total, terms, stops = self._mean_over_ranks(total, terms, is_asked_to_stop)
        if self.stage > 0:
            norm = float(self.network.get_global_grad_norm())
        return Step.of(total, terms, norm, stops)

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
        with self.processes.naming_the_lost(whatever_fails=False):  # what else fails is the disk's
            self.network.save_checkpoint(str(folder), tag="zero")

    def load(self, folder: Path) -> dict[str, Any]:
        with self.processes.naming_the_lost(whatever_fails=False):  # what else fails is the disk's
            path, _ = self.network.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder / 'zero'}")
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)

    @property
    def layout(self) -> dict[str, int] | None:
        return {"zero_stage": self.stage, "world_size": self.processes.world_size}


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
