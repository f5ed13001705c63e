"""When training stops because validation has stopped improving, and which weights it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from scaling.errors import UserError


@dataclass
class EarlyStoppingConfig:
    """Stop where validation has stopped improving, and keep the weights that validated best; null for both: never."""

    interval: int | None = None  # optimiser steps between validations; execution.num_validations then has no say
    patience: int | None = None  # validations without a new best loss after which to stop

    def __post_init__(self) -> None:
        for name in ("interval", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.early_stopping.{name} = {value}: expected at least 1, or null")
        if (self.interval is None) != (self.patience is None):
            raise UserError(
                f"train.early_stopping has interval = {self.interval} and patience = {self.patience}: "
                "give both or neither"
            )


class EarlyStopping:
    """Best validation so far, its weights, and how many validations ago it was; part of a run's checkpoint."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss = float("inf")
        self.best_step = 0
        self.num_since = 0
        self.best_weights: dict[str, Any] = {}

    @property
    def is_over(self) -> bool:
        return self.num_since >= self.patience

    def update(self, loss: float, step: int, model: nn.Module) -> None:
        """Take note of a validation after `step`; its weights are kept if its loss is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.num_since = loss, step, 0
            self.best_weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        else:
            self.num_since += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "num_since": self.num_since,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self.num_since, self.best_weights = state["num_since"], state["best_weights"]
