"""The optimiser of a run: which one, which parameters go into which group, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling.errors import UserError, require_finite

SCHEDULES = ("cosine", "step")


@dataclass
class ParameterGroupConfig:
    """What holds for the parameters whose name matches a pattern (`*.weight`, `blocks.0.*`)."""

    pattern: str
    lr_scale: float = 1.0  # times the schedule's learning rate
    weight_decay: float | None = None  # null: the optimiser's

    def __post_init__(self) -> None:
        require_finite(f"train.optimiser.groups, {self.pattern}", self)
        for name in ("lr_scale", "weight_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"train.optimiser.groups, {self.pattern}: {name} = {value}: expected at least 0")


@dataclass
class OptimiserConfig:
    """The optimiser: linear warm-up, then a cosine down to the end of the run, or steps.

    adamw: Loshchilov & Hutter 2019; adam: Kingma & Ba 2015, weight decay part of the gradient; adamp: Heo et al. 2021
    """

    learning_rate: float = 2e-3
    min_learning_rate: float = 1e-6
    warmup_steps: int = 500
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 0.01
    max_gradient_norm: float | None = None  # null: gradients are not clipped
    name: str = field(default="adamw", metadata={"since": "0.2"})  # adamw, adam or adamp
    schedule: str = field(default="cosine", metadata={"since": "0.2"})  # after warm-up: cosine or step
    step_interval: int | None = field(default=None, metadata={"since": "0.2"})  # steps between steps of the rate
    step_factor: float | None = field(default=None, metadata={"since": "0.2"})  # of the rate at each of these
    # The first pattern that matches a parameter's name counts; [] is one group.
    groups: list[ParameterGroupConfig] = field(default_factory=list, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        require_finite("train.optimiser", self)
        if not self.learning_rate >= self.min_learning_rate >= 0:
            raise UserError(
                f"train.optimiser: learning_rate = {self.learning_rate} and min_learning_rate = "
                f"{self.min_learning_rate}: expected learning_rate >= min_learning_rate >= 0"
            )
        if self.warmup_steps < 0:
            raise UserError(f"train.optimiser.warmup_steps = {self.warmup_steps}: expected at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.optimiser.betas = {list(self.betas)}: expected two numbers in [0, 1)")
        if self.weight_decay < 0:
            raise UserError(f"train.optimiser.weight_decay = {self.weight_decay}: expected at least 0")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise UserError(
                f"train.optimiser.max_gradient_norm = {self.max_gradient_norm}: expected above 0, or null for none"
            )
        for name, known in (("name", OPTIMISERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise UserError(f"train.optimiser.{name} = {getattr(self, name)}: expected one of {', '.join(known)}")
        stepping = (self.step_interval, self.step_factor)
        if self.schedule == "step" and (
            self.step_interval is None or self.step_factor is None or self.step_interval < 1 or self.step_factor <= 0
        ):
            raise UserError(
                f"train.optimiser.schedule = step has step_interval = {stepping[0]}, step_factor = {stepping[1]}: "
                "expected at least 1 step, and a factor above 0"
            )
        if self.schedule != "step" and stepping != (None, None):
            raise UserError(
                f"train.optimiser.schedule = {self.schedule} uses no step_interval or step_factor: "
                "set both to null, or take schedule=step"
            )


def build_optimiser(config: OptimiserConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters, in groups; each keeps its `lr_scale` for `set_learning_rate`.

    UserError for a pattern of `config.groups` that matches no parameter.
    """
    kind: Callable[..., torch.optim.Optimizer] = OPTIMISERS[config.name]
    return kind(
        parameter_groups(config, model),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
    )


def parameter_groups(config: OptimiserConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters, each in the group of the first pattern that its name matches; the first group has the rest."""
    groups: list[dict[str, Any]] = [{"params": [], "lr_scale": 1.0}]
    for settings in config.groups:
        decay = config.weight_decay if settings.weight_decay is None else settings.weight_decay
        groups.append({"params": [], "lr_scale": settings.lr_scale, "weight_decay": decay})
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in named:
        matching = (number for number, settings in enumerate(config.groups, 1) if fnmatchcase(name, settings.pattern))
        groups[next(matching, 0)]["params"].append(parameter)
    for settings, matched in zip(config.groups, groups[1:], strict=True):
        if not matched["params"]:
            shown = ", ".join(name for name, _ in named[:4])
            raise UserError(
                f"train.optimiser.groups: pattern {settings.pattern!r} is the first match of no parameter; the model's "
                f"are {shown}, ...: correct the pattern or put it before a wider one"
            )
    return [group for group in groups if group["params"]]


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]


def learning_rate(config: OptimiserConfig, step: int, num_steps: int) -> float:
    """Of optimiser step `step` (0 is the first): linear warm-up, then the schedule.

    cosine: a half cosine to the minimum at the run's end. step: times `step_factor` every `step_interval` steps.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "step":
        assert config.step_factor is not None
        assert config.step_interval is not None
        rate = config.learning_rate * config.step_factor ** (step // config.step_interval)
        return max(rate, config.min_learning_rate)
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


class AdamP(torch.optim.AdamW):
    """AdamW that does not lengthen weights whose length does not matter (Heo et al. 2021, arXiv 2006.08217).

    Where a weight's gradient is nearly orthogonal to it, |cos| < delta / √dim, a normalisation makes its length
    meaningless: the part of the update that is parallel to the weight is taken out, and weight decay is
    scaled by `wd_ratio`. Tried for each row (output channel) and, if not all rows pass, for the whole tensor.
    A tensor that passes neither, or has one axis alone, is updated as by AdamW. Algorithm 2, with the defaults of the
    authors' code (github.com/clovaai/AdamP), which leaves out tensors of one axis too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        self.delta = delta
        self.wd_ratio = wd_ratio

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        invariant = [
            (weight, group, view, weight.clone())
            for group in self.param_groups
            for weight, view in scale_invariant(group["params"], self.delta, group["eps"])
        ]
        super().step()
        for weight, group, view, before in invariant:
            update = without_radial_part(self._update(weight, group), before, view, group["eps"])
            decay = self.wd_ratio * group["weight_decay"]
            weight.copy_(before.mul_(1 - group["lr"] * decay).add_(update, alpha=-group["lr"]))
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """What AdamW's last step took from the weight, beside the decay, in units of the learning rate."""
        state, (beta1, beta2) = self.state[weight], group["betas"]
        step = state["step"].item()
        scale = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        return state["exp_avg"] / scale / (1 - beta1**step)


def scale_invariant(weights: Sequence[Tensor], delta: float, eps: float) -> list[tuple[Tensor, tuple[int, int]]]:
    """The weights whose gradients are nearly orthogonal to them, each with the view (rows, -1) in which they are so.

    All are looked at together, for a GPU to be waited for once.
    """
    tried = [weight for weight in weights if weight.grad is not None and weight.dim() > 1]
    if not tried:
        return []
    pairs = [(weight.flatten(1), weight.grad.flatten(1)) for weight in tried if weight.grad is not None]
    dots = torch.cat([torch.linalg.vecdot(rows, towards) for rows, towards in pairs])
    lengths = [torch.cat([torch.linalg.vector_norm(pair[side], dim=1) for pair in pairs]) for side in (0, 1)]
    dot, *norms = torch.stack([dots, *lengths]).double().cpu().numpy()  # of the rows of all weights

    num_rows = np.array([len(weight) for weight in tried])
    dim = np.array([rows.shape[1] for rows, _ in pairs])
    first = np.cumsum(num_rows) - num_rows
    by_rows = np.logical_and.reduceat(_is_orthogonal(dot, norms, np.repeat(dim, num_rows), delta, eps), first)
    whole_norms = [np.sqrt(np.add.reduceat(norm**2, first)) for norm in norms]
    as_whole = _is_orthogonal(np.add.reduceat(dot, first), whole_norms, dim * num_rows, delta, eps)
    return [
        (weight, (len(weight) if is_by_rows else 1, -1))
        for weight, is_by_rows, is_so in zip(tried, by_rows, by_rows | as_whole, strict=True)
        if is_so
    ]


def _is_orthogonal(
    dot: np.ndarray, norms: Sequence[np.ndarray], dim: np.ndarray, delta: float, eps: float
) -> np.ndarray:
    """|cos| < delta / √dim, element by element; a norm below eps counts as eps."""
    lengths = np.maximum(norms[0], eps) * np.maximum(norms[1], eps)
    return np.abs(dot) < delta / np.sqrt(dim) * lengths


def without_radial_part(update: Tensor, weight: Tensor, view: tuple[int, int], eps: float) -> Tensor:
    """The update less, of each row of the view, its part parallel to the weight."""
    rows, flat = weight.reshape(view), update.reshape(view)
    unit = rows / (rows.norm(dim=1, keepdim=True) + eps)
    return (flat - unit * (unit * flat).sum(1, keepdim=True)).view_as(weight)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adamp": AdamP,
}
