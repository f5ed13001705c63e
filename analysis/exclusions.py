"""Which runs no fit is made of: each is left out by a rule, which is on record with its reason.

Runs that stopped early are left out of nothing, but of what is a result of their losses nothing may be made: they are
counted here too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.gather import Study


def with_exclusions(runs: pd.DataFrame, study: Study, fewest_warmups: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs with excluded and is_trained, the table of those that a rule excludes).

    excluded: the rule, or ""; is_trained: there is a loss at the end of the training, whatever rule excludes the run.
    The table: run_id, label, rule, detail, has_value (is_trained).
    fewest_warmups: runs of fewer steps than so many warm-ups are excluded.
    """
    told = [_rule(run, _warmup(study.science[run["run_id"]]), fewest_warmups) for _, run in runs.iterrows()]
    # A loss on the way is none of the steps that were planned.
    is_trained = runs["last_validation_step"] >= runs["steps_taken"].fillna(runs["steps"].astype(float))
    is_trained &= np.isfinite(runs["validation_loss"].astype(float))
    runs = runs.assign(excluded=[rule for rule, _ in told], is_trained=is_trained)
    table = runs[["run_id", "label"]].assign(
        rule=runs["excluded"], detail=[detail for _, detail in told], has_value=is_trained
    )
    return runs, table[table["rule"] != ""].reset_index(drop=True)


def _rule(run: pd.Series, warmup: float, fewest_warmups: float) -> tuple[str, str]:
    """The rule that excludes a run, and why in particular; "" of one that may stand in a fit."""
    if run["state"] == "failed" and run["failure"] == "diverged":
        return "diverged", str(run["reason"])
    if run["state"] != "finished":
        return "unfinished", f"{run['state']}: {run['reason']}"
    if not np.isfinite(run["validation_loss"]):
        return "no final loss", "finished without a finite validation loss on record"
    if run["steps_taken"] < fewest_warmups * warmup:
        few = f"{run['steps_taken']:,.0f} steps, fewer than {fewest_warmups:g} warm-ups of {warmup:g}"
        return "too few steps", few
    return "", ""


def _warmup(science: Mapping[str, str]) -> float:
    """Steps of a run's warm-up; 0 if its plan has none."""
    try:
        return float(science.get("train.optimiser.warmup_steps", 0))
    except ValueError:
        return 0.0


def stopped_early(runs: pd.DataFrame) -> str:
    """How many of these runs ended before their planned budget, in words; "" if none did."""
    count = int(runs["stopped_early"].sum())
    return f"{count} of {len(runs)} runs stopped early (train.early_stopping)" if count else ""
