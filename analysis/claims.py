"""From a study's runs to what may be claimed of them: laws with intervals, and their test on what they did not see.

1. Rules leave runs out of every fit, each with the rule on record (`analysis.exclusions`); every law is fitted both
   ways. Of the settings that any further axes make, one is fitted (`analysis.other_axes`).
2. L(N) is fitted at one budget (of the budgets, the one with the most sizes), L(D) at one size, L(C) to
   the cells that no cheaper cell beats, L(N, D) to all. Where audio seen and distinct audio vary apart from one
   another, L(D) and L(N, D) are of one level of the one that D is not.
3. Metrics follow bounded laws of N, and of the loss.
4. Each law is fitted again without the largest size, or budget, and has to predict it (`analysis.held_out`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.budgets import at_one_budget, at_one_level, levels_of
from analysis.cells import cell_numbers
from analysis.exclusions import stopped_early, with_exclusions
from analysis.families import with_families
from analysis.fit import HUBER_DELTA, UNIDENTIFIABLE, Data, Fit, fit
from analysis.gather import Study
from analysis.held_out import HeldOut, held_out
from analysis.laws import Law, joint_loss_law, loss_law, metric_law, metric_loss_law, metric_sigmoid
from analysis.other_axes import OtherAxes, one_setting
from analysis.quantities import CEILINGS, VALIDATION_LOSS, Quantity, loss_of
from analysis.settings import DATA, SIZES, Settings
from analysis.variables import varying_data, with_variables

NO_BUDGETS = "hours seen and compute are results of their losses, not budgets"


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

    data: what D is, a key of DATA.
    runs: all of the study's, with what `variables.with_variables`, `exclusions.with_exclusions` and
        `families.with_families` add, cell, and is_chosen (of the setting that is fitted).
    exclusions: run_id, label, rule, detail, has_value (a loss at the end of its training nonetheless).
    """

    settings: Settings
    data: str
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
        kept, reasons = self.kept, []
        if told := stopped_early(kept):
            reasons.append(f"{told}: {NO_BUDGETS}")
        if trained := int(kept["train_on_validation"].sum()):
            speakers = f"{trained} of {len(kept)} runs trained on the speakers of validation (data.train_on_validation)"
            reasons.append(f"{speakers}: their loss chooses nothing")
        return "; ".join(reasons)

    def loss(self, name: str) -> Claim | None:
        """The claim of a law by its name ("L(N)"), with N as the settings have it."""
        return next((c for c in self.losses if c.law.name == name and c.measure == self.settings.size), None)


def claims(study: Study, settings: Settings) -> Claims:
    """Fit and test every law that the study's axes allow."""
    data = varying_data(study.runs) if settings.data == "auto" else settings.data
    everything = with_variables(study, settings.size, data)
    everything, exclusions = with_exclusions(everything, study, settings.fewest_warmups)
    everything, axes = with_families(everything, study)
    everything["cell"] = cell_numbers(everything, axes)
    is_chosen, other_axes = one_setting(everything, axes, study.science)
    runs = everything[is_chosen]
    measures = (settings.size, *(name for name in SIZES if name != settings.size))
    losses = [_loss_against_size(runs, measure) for measure in measures]
    losses += [_loss_against_data(runs, settings.size, data), _loss_against_compute(runs, settings.size)]
    losses += [_joint(runs, measure, data) for measure in measures]
    metrics: list[_Subject] = []
    for metric in study.metrics:
        if (runs[metric.key].notna() & (runs["excluded"] == "")).any():
            metrics += _of_metric(runs, metric, settings.size)
    return Claims(
        settings,
        data,
        everything.assign(is_chosen=is_chosen),
        exclusions,
        [_claim(subject, settings) for subject in losses],
        [_claim(subject, settings) for subject in metrics],
        other_axes,
    )


@dataclass(frozen=True)
class _Subject:
    """What a law is fitted to, and what it is tested on.

    runs: of its cells, those that a rule excludes too. about: which cells, in words; measure: what N is.
    left_out: what the held-out tests leave out, in words → the variable of which it is the largest level.
    tested: the runs of these tests, where they are not those of the law.
    is_of_length: whether a variable is how long runs trained, which is none of those that stopped early. Loss against
        size, or against distinct audio, is of early-stopped runs what it is in Kaplan et al. 2020.
    """

    quantity: Quantity
    law: Law
    runs: pd.DataFrame
    about: str
    measure: str
    left_out: dict[str, str]
    tested: pd.DataFrame | None = None
    is_of_length: bool = False

    def usable(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Of these runs those that have the quantity and all variables, and a logarithm where residuals are of it."""
        names = [self.quantity.key, *self.law.variables, *self.left_out.values()]  # earlier plans lack train_macs
        runs = runs[np.isfinite(runs[names].to_numpy(dtype=float)).all(axis=1)]
        return runs[runs[self.quantity.key] > 0] if self.law.has_log_residuals else runs


# --- laws of the loss ----------------------------------------------------------------------


def _loss_against_size(runs: pd.DataFrame, measure: str) -> _Subject:
    chosen, about = at_one_budget(runs)
    chosen = chosen.assign(N=chosen[measure].astype(float))
    return _Subject(VALIDATION_LOSS, loss_law("N"), chosen, about, measure, {"the largest size": "N"})


def _loss_against_data(runs: pd.DataFrame, measure: str, data: str) -> _Subject:
    """Of the size with the most budgets, of several the largest."""
    kept = runs[runs["excluded"] == ""]
    counts = kept.groupby("size")["D"].agg(lambda d: len(levels_of(d)))
    sizes = kept.groupby("size")["macs_per_second"].first()
    best = pd.DataFrame({"levels": counts, "macs": sizes}).sort_values(["levels", "macs"])
    size = best.index[-1] if len(best) else None
    chosen, held = at_one_level(runs[runs["size"] == size], data)
    about, left_out = f"{DATA[data]} at size {size}{held}", {"the largest budget": "D"}
    is_of_length = data == "audio_hours_seen"
    return _Subject(VALIDATION_LOSS, loss_law("D"), chosen, about, measure, left_out, is_of_length=is_of_length)


def _loss_against_compute(runs: pd.DataFrame, measure: str) -> _Subject:
    kept = runs[(runs["excluded"] == "") & np.isfinite(runs["C"]) & (runs["C"] > 0)]  # earlier plans lack it
    means = kept.groupby("cell").agg(C=("C", "first"), loss=("validation_loss", "mean")).sort_values("C")
    means["level"] = np.searchsorted(levels_of(means["C"]), means["C"], side="right")
    best = means.sort_values(["level", "loss"]).drop_duplicates("level")  # a cell a level
    # What the test is to predict is there whether or not a cheaper cell beats it: it must not choose itself.
    tested = [*_frontier(best[:-1]), *best.index[-1:]]
    return _Subject(
        VALIDATION_LOSS,
        loss_law("C"),
        runs[runs["cell"].isin(_frontier(best))],
        "the cells that no cheaper cell beats",
        measure,
        {"the largest budget of compute": "C"},
        tested=runs[runs["cell"].isin(tested)],
        is_of_length=True,
    )


def _frontier(cells: pd.DataFrame) -> list[Any]:
    """Which cells, in the order of their compute, have a lower loss than all before them."""
    before = cells["loss"].cummin().shift(fill_value=np.inf)
    return list(cells.index[cells["loss"] < before])


def _joint(runs: pd.DataFrame, measure: str, data: str) -> _Subject:
    chosen, held = at_one_level(runs, data)
    chosen = chosen.assign(N=chosen[measure].astype(float))
    about = f"all cells{held}; D is {DATA[data]}"
    left_out = {"the largest size": "N", "the largest budget of data": "D", "the largest budget of compute": "C"}
    is_of_length = data == "audio_hours_seen"
    return _Subject(VALIDATION_LOSS, joint_loss_law(), chosen, about, measure, left_out, is_of_length=is_of_length)


# --- laws of metrics -----------------------------------------------------------------------


def _of_metric(runs: pd.DataFrame, metric: Quantity, measure: str) -> list[_Subject]:
    chosen, about = at_one_budget(runs)
    ceiling = CEILINGS.get(metric.key)
    laws = [metric_law("N"), metric_sigmoid("N")]
    if ceiling is not None:
        laws += [metric_law("N", ceiling), metric_sigmoid("N", ceiling)]
    left_out = {"the largest size": "N"}
    subjects = [_Subject(metric, law, chosen, about, measure, left_out) for law in laws]
    losses = runs.loc[runs["excluded"] == "", "validation_loss"]
    spread = float(losses.std()) if losses.nunique() > 1 else 1.0
    everything = runs.assign(L=runs["validation_loss"].astype(float))
    everything = everything[np.isfinite(everything["L"])]
    return [*subjects, _Subject(metric, metric_loss_law(spread), everything, "all cells", measure, left_out)]


# --- one claim -----------------------------------------------------------------------------


def _claim(subject: _Subject, settings: Settings) -> Claim:
    law, is_loss = subject.law, subject.quantity is VALIDATION_LOSS
    quantity = loss_of(subject.runs["train_on_validation"]) if is_loss else subject.quantity
    robust = HUBER_DELTA if is_loss else None
    usable = subject.usable(subject.runs)
    kept = usable[usable["excluded"] == ""]
    both = usable[(usable["excluded"] == "") | usable["is_trained"]]
    told = stopped_early(kept)

    def fitted(runs: pd.DataFrame, bootstraps: int = settings.bootstraps, huber: float | None = robust) -> Fit:
        data = _data(runs, law, quantity)
        if told and subject.is_of_length:
            return Fit(law, data, UNIDENTIFIABLE, f"{told}: {NO_BUDGETS}", huber=huber)
        return fit(law, data, huber=huber, bootstraps=bootstraps, seed=settings.seed)

    whole = fitted(kept)
    tested = kept
    if subject.tested is not None:
        tested = subject.usable(subject.tested[subject.tested["excluded"] == ""])
    return Claim(
        quantity=quantity,
        law=law,
        about=f"{subject.about}; {told}" if told else subject.about,
        measure=subject.measure,
        fitted=whole,
        squares=fitted(kept, 0, None) if is_loss else None,
        with_excluded=fitted(both, 0) if len(both) > len(kept) else None,
        held_out=tuple(
            held_out(tested, quantity, what, variable, whole, fitted, settings)
            for what, variable in subject.left_out.items()
        ),
        run_ids=tuple(kept["run_id"]),
        excluded_run_ids=tuple(both.loc[both["excluded"] != "", "run_id"]),
    )


def _data(runs: pd.DataFrame, law: Law, quantity: Quantity) -> Data:
    """The rows of a fit: x and y of each run, and which cell it is of."""
    x = {name: runs[name].to_numpy(dtype=float) for name in law.variables}
    return Data(x, runs[quantity.key].to_numpy(dtype=float), runs["cell"].to_numpy())
