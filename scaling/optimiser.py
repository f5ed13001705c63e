"""The optimiser of a run: which one, which parameters go into which group, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from scaling.config import OptimiserConfig
from scaling.errors import UserError


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
                f"are {shown}, ...: mend the pattern or put it before a wider one"
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


class AdamP(torch.optim.Optimizer):
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"delta": delta, "wd_ratio": wd_ratio})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [
            (weight, group) for group in self.param_groups for weight in group["params"] if weight.grad is not None
        ]
        tried = [(weight, group, view) for weight, group in weights for view in views_of(weight)]
        passes = [is_orthogonal(weight, view, group["delta"], group["eps"]) for weight, group, view in tried]
        invariant: dict[Tensor, tuple[int, int]] = {}
        for (weight, _, view), does_pass in zip(tried, torch.stack(passes).tolist() if passes else [], strict=True):
            if does_pass:
                invariant.setdefault(weight, view)
        for weight, group in weights:
            self._update(weight, weight.grad, group, invariant.get(weight))
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], view: tuple[int, int] | None) -> None:
        state = self.state[weight]
        if not state:
            # kept as torch's own optimisers keep them
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        update = state["exp_avg"] / scale / (1 - beta1**step)
        decay = group["weight_decay"]
        if view is not None:
            update, decay = without_radial_part(update, weight, view, group["eps"]), decay * group["wd_ratio"]
        weight.mul_(1 - group["lr"] * decay).add_(update, alpha=-group["lr"])


def views_of(weight: Tensor) -> list[tuple[int, int]]:
    """As what a weight may be scale-invariant: its rows, then the whole tensor; one of a single axis as nothing."""
    return [(len(weight), -1), (1, -1)] if weight.dim() > 1 else []


def is_orthogonal(weight: Tensor, view: tuple[int, int], delta: float, eps: float) -> Tensor:
    """Whether each row of the view is nearly orthogonal to its gradient, as a tensor: nothing waits for it."""
    assert weight.grad is not None
    rows, towards = weight.reshape(view), weight.grad.reshape(view)
    cosine = nn.functional.cosine_similarity(rows, towards, dim=1, eps=eps).abs()
    return cosine.max() < delta / math.sqrt(rows.shape[1])


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
