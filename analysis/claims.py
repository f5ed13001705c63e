"""From a study's runs to what may be claimed of them: laws with intervals, and their test on what they did not see.

1. Rules leave runs out of every fit, each with the rule on record; every law is fitted both ways. Of the settings
   that any further axes make, one is fitted (`analysis.other_axes`).
2. L(N) is fitted at one budget (of the budgets, the one with the most sizes), L(D) at one size, L(C) to
   the cells that no cheaper cell beats, L(N, D) to all. Where audio seen and distinct audio vary apart from one
   another, L(D) and L(N, D) are of one level of the one that D is not.
3. Metrics follow bounded laws of N, and of the loss.
4. Each law is fitted again without the largest size, or budget, and has to predict it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.budgets import at_one_budget, at_one_level, levels_of
from analysis.cells import cell_numbers
from analysis.families import with_families
from analysis.fit import HUBER_DELTA, UNIDENTIFIABLE, Data, Fit, fit
from analysis.gather import Study
from analysis.laws import Law, joint_loss_law, loss_law, metric_law, metric_loss_law, metric_sigmoid
from analysis.other_axes import OtherAxes, one_setting
from analysis.quantities import VALIDATION_LOSS, Quantity, human_count, human_hours, human_macs, loss_of, round_hours
from analysis.settings import DATA, SIZES, Settings

# The highest value that the metric can take.
CEILINGS = {"pesq_wb": 4.64, "stoi": 1.0, "estoi": 1.0}
CEILINGS |= {"csig": 5.0, "cbak": 5.0, "covl": 5.0, "dnsmos_p808": 5.0}
CEILINGS |= {"dnsmos_sig": 4.443, "dnsmos_bak": 4.521, "dnsmos_ovrl": 4.644}  # the tops of the published polynomials
RESULTS = "hours seen and compute are results of their losses, not budgets"


@dataclass(frozen=True)
class HeldOut:
    """A prediction of cells that the fit did not see.

    cells: one row a cell left out: label, N, D, C, seeds, run_ids, observed, predicted, low, high, error (predicted -
        observed; relative for losses), half_width (of the interval, in the unit of the error), naive (the nearest cell
        that was seen), naive_run_ids, naive_error, is_covered.
    verdict: "pass" if every cell lies in its interval and the errors are smaller than the naive ones, and the cells
        show all of the law, with those left out and without; "fail"; or "not possible", with the reason.
    fitted_run_ids: of the fit that predicts.
    """

    left_out: str
    verdict: str
    reason: str
    cells: pd.DataFrame
    fitted_run_ids: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        return float(np.abs(self.cells["error"]).mean()) if len(self.cells) else np.nan

    @property
    def half_width(self) -> float:
        return float(self.cells["half_width"].mean()) if len(self.cells) else np.nan


@dataclass(frozen=True)
class Claim:
    """A law of one quantity, fitted to some of the cells.

    fitted: without the runs that a rule excludes; with_excluded: with those of them that have a value at the end of
    their training, or None where there are none. Of losses `squares` is the least-squares fit to set beside the
    robust one.
    """

    quantity: Quantity
    law: Law
    about: str  # which cells, in words
    measure: str  # what N is
    fitted: Fit
    squares: Fit | None
    with_excluded: Fit | None
    held_out: tuple[HeldOut, ...]
    run_ids: tuple[str, ...]
    excluded_run_ids: tuple[str, ...]  # of `with_excluded`, beside run_ids


@dataclass(frozen=True)
class Claims:
    """All that is claimed of a study.

    exclusions: run_id, rule, detail, has_value (a loss at the end of its training nonetheless).
    """

    settings: Settings
    data: str  # what D is: a key of DATA
    # the study's runs with N, D, C, cell, label, excluded (the rule, or ""), is_trained (has a loss at the end of its
    # training), hardware.gpu, hardware.cpu and is_chosen; hours_seen and macs_spent as planned where they have not
    # finished
    runs: pd.DataFrame
    exclusions: pd.DataFrame
    losses: list[Claim]
    metrics: list[Claim]
    other_axes: OtherAxes

    @property
    def kept(self) -> pd.DataFrame:
        """The runs of the chosen setting that no rule excludes: what every law and table is made of."""
        return self.runs[(self.runs["excluded"] == "") & self.runs["is_chosen"]]

    @property
    def refusal(self) -> str:
        """Why nothing may be chosen by the loss of these runs at a budget; "" if it may."""
        told, trained = stopped_early(self.kept), int(self.kept["train_on_validation"].sum())
        speakers = (
            f"{trained} of {len(self.kept)} runs trained on the speakers of validation (data.train_on_validation)"
        )
        reasons = [f"{told}: {RESULTS}" if told else "", f"{speakers}: their loss chooses nothing" if trained else ""]
        return "; ".join(filter(None, reasons))

    def loss(self, name: str) -> Claim | None:
        """The claim of a law by its name ("L(N)"), with N as the settings have it."""
        return next((c for c in self.losses if c.law.name == name and c.measure == self.settings.size), None)


def claims(study: Study, settings: Settings) -> Claims:
    """Fit and test every law that the study's axes allow."""
    data = varying_data(study.runs) if settings.data == "auto" else settings.data
    everything, exclusions = prepared(study, settings, data)
    everything, axes = with_families(everything, study)
    everything["cell"] = cell_numbers(everything, axes)
    is_chosen, other_axes = one_setting(everything, axes, study.science)
    runs = everything[is_chosen]
    losses: list[Claim] = []
    for measure in (settings.size, *(name for name in SIZES if name != settings.size)):
        losses.append(_loss_against_size(runs, measure, settings))
    losses.append(_loss_against_data(runs, data, settings))
    losses.append(_loss_against_compute(runs, settings))
    for measure in (settings.size, *(name for name in SIZES if name != settings.size)):
        losses.append(_joint(runs, measure, data, settings))
    metrics: list[Claim] = []
    for metric in study.metrics:
        if (runs[metric.key].notna() & (runs["excluded"] == "")).any():
            metrics += _metric_claims(runs, metric, settings)
    return Claims(settings, data, everything.assign(is_chosen=is_chosen), exclusions, losses, metrics, other_axes)


def varying_data(runs: pd.DataFrame) -> str:
    """Which of distinct audio and audio seen the study varies; audio seen if both do, or none."""
    seen, distinct = runs["audio_hours_seen"].map(round_hours).nunique(), runs["hours"].map(round_hours).nunique()
    return "hours" if distinct > 1 and seen == 1 else "audio_hours_seen"


# --- exclusions ----------------------------------------------------------------------------


def prepared(study: Study, settings: Settings, data: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs with N, D, C, cell, label, excluded; the table of exclusions)."""
    runs = study.runs.copy()
    names = runs.groupby("size")["num_params"].transform("nunique")
    runs["size"] = [  # a size that an axis changes is several sizes
        size if count == 1 else f"{size}, {human_count(params)}"
        for size, count, params in zip(runs["size"], names, runs["num_params"], strict=True)
    ]
    runs["budget_hours"] = runs["hours"].map(round_hours)
    # Of a run that has not finished, what was planned: only fits with the excluded runs have it.
    runs["hours_seen"] = runs["hours_seen"].fillna(runs["audio_hours_seen"].astype(float))
    runs["macs_spent"] = runs["macs_spent"].fillna(runs["train_macs"].astype(float))
    runs["N"], runs["C"] = runs[settings.size].astype(float), runs["macs_spent"]
    runs["D"] = runs["hours_seen"] if data == "audio_hours_seen" else runs["budget_hours"]
    runs["cell"] = cell_numbers(runs, study.axes)
    at_most = runs.groupby("cell")["stopped_early"].transform("any")
    runs["label"] = [
        f"{size}, {'up to ' if stopped else ''}{human_hours(seen)} h seen"
        for size, seen, stopped in zip(runs["size"], runs["audio_hours_seen"].astype(float), at_most, strict=True)
    ]
    warmups = [_warmup(study.science[run_id]) for run_id in runs["run_id"]]
    rules, details = [], []
    for (_, run), warmup in zip(runs.iterrows(), warmups, strict=True):
        rule, detail = "", ""
        if run["state"] == "failed" and run["failure"] == "diverged":
            rule, detail = "diverged", str(run["reason"])
        elif run["state"] != "finished":
            rule, detail = "unfinished", f"{run['state']}: {run['reason']}"
        elif not np.isfinite(run["validation_loss"]):
            rule, detail = "no final loss", "finished without a finite validation loss on record"
        elif run["steps_taken"] < settings.fewest_warmups * warmup:
            rule = "too few steps"
            detail = f"{run['steps_taken']:,.0f} steps, fewer than {settings.fewest_warmups:g} warm-ups of {warmup:g}"
        rules.append(rule)
        details.append(detail)
    runs["excluded"] = rules
    # A loss on the way is none of the steps that were planned.
    runs["is_trained"] = runs["last_validation_step"] >= runs["steps_taken"].fillna(runs["steps"].astype(float))
    runs["is_trained"] &= np.isfinite(runs["validation_loss"].astype(float))
    for part in ("hardware.gpu", "hardware.cpu"):
        runs[part] = runs["run_id"].map(study.provenance[part]) if part in study.provenance else None
    table = runs[["run_id", "label"]].assign(rule=rules, detail=details, has_value=runs["is_trained"])
    return runs, table[table["rule"] != ""].reset_index(drop=True)


def _warmup(science: dict[str, str]) -> float:
    try:
        return float(science.get("train.optimiser.warmup_steps", 0))
    except ValueError:
        return 0.0


def stopped_early(runs: pd.DataFrame) -> str:
    """How many of these runs ended before their planned budget, in words; "" if none did."""
    count = int(runs["stopped_early"].sum())
    return f"{count} of {len(runs)} runs stopped early (train.early_stopping)" if count else ""


# --- laws of the loss ----------------------------------------------------------------------


def _loss_against_size(runs: pd.DataFrame, measure: str, settings: Settings) -> Claim:
    chosen, about = at_one_budget(runs)
    chosen = chosen.assign(N=chosen[measure].astype(float))
    return _claim(VALIDATION_LOSS, loss_law("N"), chosen, about, measure, settings, {"the largest size": "N"})


def _loss_against_data(runs: pd.DataFrame, data: str, settings: Settings) -> Claim:
    kept = runs[runs["excluded"] == ""]
    counts = kept.groupby("size")["D"].agg(lambda d: len(levels_of(d)))
    sizes = kept.groupby("size")["macs_per_second"].first()
    best = pd.DataFrame({"levels": counts, "macs": sizes}).sort_values(["levels", "macs"])
    size = best.index[-1] if len(best) else None
    chosen, held = at_one_level(runs[runs["size"] == size], data)
    about = f"{DATA[data]} at size {size}{held}"
    return _claim(
        VALIDATION_LOSS,
        loss_law("D"),
        chosen,
        about,
        settings.size,
        settings,
        {"the largest budget": "D"},
        is_of_length=data == "audio_hours_seen",
    )


def _loss_against_compute(runs: pd.DataFrame, settings: Settings) -> Claim:
    kept = runs[(runs["excluded"] == "") & np.isfinite(runs["C"]) & (runs["C"] > 0)]  # earlier plans lack it
    means = kept.groupby("cell").agg(C=("C", "first"), loss=("validation_loss", "mean")).sort_values("C")
    means["level"] = np.searchsorted(levels_of(means["C"]), means["C"], side="right")
    best = means.sort_values(["level", "loss"]).drop_duplicates("level")  # a cell a level

    def frontier(of: pd.DataFrame) -> list[Any]:
        before = of["loss"].cummin().shift(fill_value=np.inf)
        return list(of.index[of["loss"] < before])

    # What the test is to predict is there whether or not a cheaper cell beats it: it must not choose itself.
    tested = [*frontier(best[:-1]), *best.index[-1:]]
    return _claim(
        VALIDATION_LOSS,
        loss_law("C"),
        runs[runs["cell"].isin(frontier(best))],
        "the cells that no cheaper cell beats",
        settings.size,
        settings,
        {"the largest budget of compute": "C"},
        tested=runs[runs["cell"].isin(tested)],
        is_of_length=True,
    )


def _joint(runs: pd.DataFrame, measure: str, data: str, settings: Settings) -> Claim:
    chosen, held = at_one_level(runs, data)
    chosen = chosen.assign(N=chosen[measure].astype(float))
    return _claim(
        VALIDATION_LOSS,
        joint_loss_law(),
        chosen,
        f"all cells{held}; D is {DATA[data]}",
        measure,
        settings,
        {"the largest size": "N", "the largest budget of data": "D", "the largest budget of compute": "C"},
        is_of_length=data == "audio_hours_seen",
    )


# --- laws of metrics -----------------------------------------------------------------------


def _metric_claims(runs: pd.DataFrame, metric: Quantity, settings: Settings) -> list[Claim]:
    chosen, about = at_one_budget(runs)
    ceiling = CEILINGS.get(metric.key)
    laws = [metric_law("N"), metric_sigmoid("N")]
    if ceiling is not None:
        laws += [metric_law("N", ceiling), metric_sigmoid("N", ceiling)]
    found = [_claim(metric, law, chosen, about, settings.size, settings, {"the largest size": "N"}) for law in laws]
    losses = runs.loc[runs["excluded"] == "", "validation_loss"]
    spread = float(losses.std()) if losses.nunique() > 1 else 1.0
    everything = runs.assign(L=runs["validation_loss"].astype(float))
    everything = everything[np.isfinite(everything["L"])]
    left_out = {"the largest size": "N"}
    found.append(_claim(metric, metric_loss_law(spread), everything, "all cells", settings.size, settings, left_out))
    return found


# --- one claim -----------------------------------------------------------------------------


def _claim(
    quantity: Quantity,
    law: Law,
    runs: pd.DataFrame,
    about: str,
    measure: str,
    settings: Settings,
    left_out: dict[str, str],
    tested: pd.DataFrame | None = None,
    is_of_length: bool = False,
) -> Claim:
    """tested: the runs of the held-out tests, where they are not those of the law.

    is_of_length: whether a variable is how long runs trained, which is none of those that stopped early. Loss against
    size, or against distinct audio, is of early-stopped runs what it is in Kaplan et al. 2020.
    """

    def usable_of(some: pd.DataFrame) -> pd.DataFrame:
        names = (quantity.key, *law.variables, *left_out.values())  # a plan of an earlier version may lack train_macs
        keep = np.isfinite(some[list(names)].to_numpy(dtype=float)).all(axis=1)
        return some[keep & (some[quantity.key] > 0)] if law.has_log_residuals else some[keep]

    usable = usable_of(runs)
    kept = usable[usable["excluded"] == ""]
    both = usable[(usable["excluded"] == "") | usable["is_trained"]]
    if is_loss := quantity is VALIDATION_LOSS:
        quantity = loss_of(runs["train_on_validation"])
    told = stopped_early(kept)

    def fitted(
        chosen: pd.DataFrame,
        bootstraps: int = settings.bootstraps,
        huber: float | None = HUBER_DELTA if is_loss else None,
    ) -> Fit:
        data = to_data(chosen, law, quantity)
        if told and is_of_length:
            return Fit(law, data, UNIDENTIFIABLE, f"{told}: {RESULTS}", huber=huber)
        return fit(law, data, huber=huber, bootstraps=bootstraps, seed=settings.seed)

    squares = fitted(kept, 0, None) if is_loss else None
    whole = fitted(kept)
    seen = kept if tested is None else usable_of(tested[tested["excluded"] == ""])
    tests = tuple(
        _held_out(seen, quantity, law, what, column, whole, fitted, settings) for what, column in left_out.items()
    )
    return Claim(
        quantity,
        law,
        f"{about}; {told}" if told else about,
        measure,
        whole,
        squares,
        fitted(both, 0) if len(both) > len(kept) else None,
        tests,
        tuple(kept["run_id"]),
        tuple(both.loc[both["excluded"] != "", "run_id"]),
    )


def to_data(runs: pd.DataFrame, law: Law, quantity: Quantity) -> Data:
    """The rows of a fit: x and y of each run, and which cell it is of."""
    x = {name: runs[name].to_numpy(dtype=float) for name in law.variables}
    return Data(x, runs[quantity.key].to_numpy(dtype=float), runs["cell"].to_numpy())


def _held_out(
    runs: pd.DataFrame,
    quantity: Quantity,
    law: Law,
    what: str,
    column: str,
    whole: Fit,
    fitted: Callable[..., Fit],
    settings: Settings,
) -> HeldOut:
    """whole: the law of all cells."""
    columns = ["label", "N", "D", "C", "seeds", "run_ids", "observed", "predicted", "low", "high"]
    columns += ["error", "half_width", "naive", "naive_run_ids", "naive_error", "is_covered"]
    empty = pd.DataFrame(columns=columns)
    levels = levels_of(runs[column])
    if len(levels) < 2:
        return HeldOut(what, "not possible", f"{column} has {len(levels)} level{'s' * (len(levels) != 1)}", empty)
    is_last = runs[column] >= levels[-1] * (1 - 1e-9)
    seen, unseen = runs[~is_last], runs[is_last]
    name = _largest(unseen, column)
    trial = fitted(seen)
    if not trial.is_usable:
        return HeldOut(f"{what} ({name})", "not possible", f"without it: {trial.status}, {trial.reason}", empty)
    if not trial.has_interval:
        return HeldOut(f"{what} ({name})", "not possible", f"without it: {trial.why_no_interval}", empty)
    ceiling = CEILINGS.get(quantity.key, np.inf)
    rows = []
    # Intervals that together hold with the level's probability, so that many cells do not fail by chance.
    level = settings.level ** (1 / unseen["cell"].nunique())
    for _, cell in unseen.groupby("cell"):
        # A cell's x is the same for all its seeds, but for the loss, of which it is the mean.
        x = {name: np.array([cell[name].astype(float).mean()]) for name in law.variables}
        observed, predicted = float(cell[quantity.key].mean()), float(trial.predict(x)[0])
        low, high = trial.prediction_interval(x, level, seeds=len(cell), seed=settings.seed)
        unit = observed if law.has_log_residuals else 1.0
        nearest = _nearest(seen, cell, column)
        naive = float(nearest[quantity.key].mean())
        low, high = np.minimum(low, ceiling), np.minimum(high, ceiling)
        rows.append(
            {
                "label": cell["label"].iloc[0],
                "N": cell["N"].iloc[0],
                "D": cell["D"].iloc[0],
                "C": cell["C"].iloc[0],
                "seeds": len(cell),
                "run_ids": " ".join(cell["run_id"]),
                "observed": observed,
                "predicted": predicted,
                "low": float(low[0]),
                "high": float(high[0]),
                "error": (predicted - observed) / unit,
                "half_width": float(high[0] - low[0]) / 2 / unit,
                "naive": naive,
                "naive_run_ids": " ".join(nearest["run_id"]),
                "naive_error": (naive - observed) / unit,
                "is_covered": bool(low[0] <= observed <= high[0]),
            }
        )
    cells = pd.DataFrame(rows)
    if not np.isfinite(cells[["low", "high"]].to_numpy(dtype=float)).all():
        return HeldOut(f"{what} ({name})", "not possible", "without it: an interval without an end", empty)
    covered = bool(cells["is_covered"].all())
    beats = bool(cells["error"].abs().mean() < cells["naive_error"].abs().mean())
    failures = [] if covered else [f"{(~cells['is_covered']).sum()} of {len(cells)} cells outside the interval"]
    failures += [] if beats else ["no nearer than the nearest cell that was seen"]
    verdict, reasons = ("fail" if failures else "pass"), failures
    if not failures:
        # A curve that its cells do not show may come near by chance: of that no pass is made.
        unshown = {"the law of all cells": whole, "the law without it": trial}
        reasons = [f"{which} is {law.status} ({law.reason})" for which, law in unshown.items() if not law.is_shown]
        verdict = "not possible" if reasons else "pass"
    return HeldOut(f"{what} ({name})", verdict, "; ".join(reasons), cells, tuple(seen["run_id"]))


def _nearest(seen: pd.DataFrame, cell: pd.DataFrame, column: str) -> pd.DataFrame:
    """The runs of the cell by which a naive reader would predict one that is held out: a rule, not hindsight.

    Of the next level down of what is held out it is the cell of the nearest size, then of the nearest data, as factors.
    """
    near = seen[seen[column] >= levels_of(seen[column])[-1] * (1 - 1e-9)]
    for name in [name for name in ("N", "D") if name != column]:
        away = np.abs(np.log(near[name].astype(float) / float(cell[name].iloc[0])))
        near = near[away <= away.min() + 1e-9]
    return near[near["cell"] == near["cell"].iloc[0]]


def _largest(runs: pd.DataFrame, column: str) -> str:
    if column == "N":
        return ", ".join(dict.fromkeys(runs["size"]))
    if column == "D":
        return f"{human_hours(runs['D'].max())} h"
    return human_macs(runs["C"].max())
