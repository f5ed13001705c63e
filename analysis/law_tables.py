"""Tables of what is claimed: laws and their parameters, the same fitted the other way, held-out predictions, isoFLOP
minima, and the runs left out of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims import Claim, Claims
from analysis.fit import CONVERGED, FEWEST_FREEDOM, Fit, human_degrees, quantiles, size_interval
from analysis.isoflop import PARABOLA, Curve, IsoFlop, best_by_law
from analysis.quantities import MISSING, VALIDATION_LOSS, Quantity, human_count, human_interval, human_macs
from analysis.report_table import ReportTable, table_of
from analysis.settings import DATA, SIZES


def laws_table(
    found: Sequence[Claim], name: str, title: str, level: float, data: str, loss: Quantity = VALIDATION_LOSS
) -> ReportTable:
    """A row a law; the CSV has a row a parameter. data: what D is, a key of DATA; loss: what L is."""
    rivals = Counter((claim.quantity.key, frozenset(claim.run_ids)) for claim in found)
    rows = [_law_row(claim, level, rivals[claim.quantity.key, frozenset(claim.run_ids)] > 1) for claim in found]
    numbers = [
        _parameter_row(claim, parameter, level)
        for claim in found
        if claim.fitted.is_usable
        for parameter in claim.fitted.parameters
    ]
    return table_of(name, title, _laws_caption(found, level, data, loss), rows, numbers)


def _law_row(claim: Claim, level: float, has_rivals: bool) -> dict[str, tuple[str, str]]:
    law = claim.fitted
    values = MISSING
    if law.is_usable:
        values = "; ".join(_parameter(claim, parameter, level) for parameter in claim.law.parameters)
    aicc = law.aicc if has_rivals else np.nan
    test = next((t for t in claim.held_out if t.verdict != "not possible"), None)
    needs_size = "N" in claim.law.variables
    row = {
        "Law": f"{claim.quantity.label}: {claim.law.name}",
        "Of": claim.about,
        "N is": SIZES[claim.measure] if needs_size else MISSING,
        "Cells": str(law.data.num_cells),
        "Runs": str(len(claim.run_ids)),
        "Lack of fit": _lack_of_fit(law),
        "Status": law.status + (f" ({law.reason})" if law.reason else "") + _no_interval(law),
        "Parameters": values,
        "AICc": f"{aicc:.1f}" if np.isfinite(aicc) else MISSING,
        "Held-out error": f"{error_text(claim, test.error)}, without {test.left_out}" if test else MISSING,
    }
    ids = " ".join(claim.run_ids)
    return {heading: (text, ids) for heading, text in row.items()}


def _parameter_row(claim: Claim, parameter: str, level: float) -> dict[str, Any]:
    law = claim.fitted
    row: dict[str, Any] = {
        "quantity": claim.quantity.key,
        "law": claim.law.name,
        "of": claim.about,
        "measure": claim.measure,
        "status": law.status,
        "lack_of_fit": law.lack_of_fit[0] if law.lack_of_fit else np.nan,
        "parameter": parameter,
        "value": law.parameters[parameter],
        "resampled": law.bootstraps.resampled,
    }
    if law.has_interval:
        low, high = law.interval(parameter, level)
        row |= {"standard_error": law.standard_errors()[parameter], "low": low, "high": high}
    return row | {"run_ids": " ".join(claim.run_ids)}


def _laws_caption(found: Sequence[Claim], level: float, data: str, loss: Quantity) -> str:
    resampled = {c.fitted.bootstraps.resampled for c in found if c.fitted.has_interval}
    drawn = {"seeds": "seeds within cells", "cells": f"cells ({_why_cells(found)})"}
    how = " or ".join(drawn[r] for r in sorted(resampled))
    intervals = f"{level:.0%} intervals in brackets, of bootstraps over {how}, with Student's tails."
    intervals = intervals if how else "No intervals."
    formulas = "; ".join(dict.fromkeys(f"{claim.law.name}: {claim.law.formula}" for claim in found))
    caption = (
        f"{formulas}. {_units(found, data, loss)} {intervals} Losses: Huber on log residuals. "
        "AICc: of laws of the same quantity and the same cells, lower is better; differences below 2 say nothing. "
        "Held-out error: mean distance of the prediction from the cells left out, of losses as a share of what was "
        "observed, of metrics in their unit."
    )
    if any(claim.fitted.lack_of_fit for claim in found):
        caption += (
            " Lack of fit: F of the cells' distance from the law over their seeds' scatter (degrees of freedom of "
            "both), about 1 where the law holds; above 1 it widens the intervals."
        )
    return caption


def _why_cells(found: Sequence[Claim]) -> str:
    """Why the bootstraps of some of these laws draw cells and not their seeds."""
    drawn = [c.fitted for c in found if c.fitted.has_interval and c.fitted.bootstraps.resampled == "cells"]
    of_means = any("L" in law.law.variables for law in drawn)
    of_few = any((law.data.counts == 1).any() for law in drawn)
    why = ["their x is a mean over seeds"] * of_means + ["not every cell has several seeds"] * of_few
    return ", or ".join(why)


def error_text(claim: Claim, error: float) -> str:
    """An error of a prediction: of losses relative, of metrics in their digits and unit."""
    if claim.law.has_log_residuals:
        return f"{error:.2%}"
    unit = f" {claim.quantity.unit}" if claim.quantity.unit else ""
    return f"{error:.{claim.quantity.digits}f}{unit}"


def _units(found: Sequence[Claim], data: str, loss: Quantity) -> str:
    """In what the parameters count the variables of these laws, and what they predict."""
    the_loss = f"the {loss.label[0].lower()}{loss.label[1:]}"
    units = {
        "N": "N in the unit of its column",
        "D": f"D in {DATA[data]}",
        "C": "C in multiply-accumulates of training",
        "L": f"L {the_loss} as it was trained",
    }
    used = {variable for claim in found for variable in claim.law.variables}
    quantities = {claim.quantity.key: claim.quantity for claim in found}
    losses = "" if VALIDATION_LOSS.key not in quantities else f"{the_loss} is as it was trained, without a unit"
    metrics = ", ".join(quantity.axis for key, quantity in quantities.items() if key != VALIDATION_LOSS.key)
    said = [*(unit for variable, unit in units.items() if variable in used), losses, f"m: {metrics}" if metrics else ""]
    return f"Units: {'; '.join(filter(None, said))}."


def _parameter(claim: Claim, name: str, level: float) -> str:
    text = f"{name} {claim.fitted.parameters[name]:.3g}"
    if not claim.fitted.has_interval:
        return text
    low, high = claim.fitted.interval(name, level)
    return f"{text} [{low:.3g}, {high:.3g}]"


def _lack_of_fit(law: Fit) -> str:
    if law.lack_of_fit is None:
        return MISSING
    ratio, between, within = law.lack_of_fit
    return f"{ratio:.3g} ({between}, {within})"


def _no_interval(law: Fit) -> str:
    """Why a law that was fitted has no intervals."""
    if not law.bootstraps.values or law.has_interval:
        return ""
    if law.freedom >= FEWEST_FREEDOM:
        return f"; no intervals: {law.why_no_interval}"
    fewest, most = int(law.data.counts.min()), int(law.data.counts.max())
    seeds = "one seed" if most == 1 else f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    cells = f"{law.data.num_cells} cells of {seeds} leave {human_degrees(law.freedom)}"
    return f"; no intervals: {cells}, of at least {FEWEST_FREEDOM}"


def exclusions_effect_table(found: Claims) -> ReportTable:
    """Fits both ways, without the runs that a rule excludes and with them; and least squares beside the robust."""
    rows, numbers = [], []
    for claim in found.losses:
        if not claim.fitted.is_usable:
            continue
        ways = [
            ("as claimed", claim.fitted),
            ("least squares", claim.squares),
            ("with the excluded runs", claim.with_excluded),
        ]
        for way, fitted in ways:
            if fitted is None:
                continue
            row = {"Law": claim.law.name, "N is": SIZES[claim.measure], "Fit": way, "Status": fitted.status}
            row |= {name: f"{value:.4g}" for name, value in fitted.parameters.items()}
            own = claim.run_ids + (claim.excluded_run_ids if fitted is claim.with_excluded else ())
            ids = " ".join(own)
            rows.append({heading: (text, ids) for heading, text in row.items()})
            entry: dict[str, Any] = {"law": claim.law.name, "measure": claim.measure, "fit": way}
            entry |= {"status": fitted.status, "runs": len(fitted.data.y), **fitted.parameters}
            numbers.append(entry | {"run_ids": ids})
    caption = (
        "What exclusions and the loss function change: "
        "each law of the loss refitted by least squares, and with the excluded runs, those whose last validation is at "
        "the end of their training."
    )
    return table_of("fits_both_ways", "The same laws, fitted the other way", caption, rows, numbers)


def held_out_table(found: Claims) -> ReportTable:
    """A row a test; the CSV has a row a cell, with the runs observed and those of the fit that predicts them."""
    rows, numbers = [], []
    level = found.settings.level
    for claim in [*found.losses, *found.metrics]:
        digits = claim.quantity.digits

        def size_of(errors: pd.Series, claim: Claim = claim) -> str:
            return error_text(claim, float(errors.abs().mean()))

        for test in claim.held_out:
            if test.verdict == "not possible" and not claim.fitted.is_usable:
                continue  # its law is listed as unidentifiable
            cells = test.cells
            fitted = " ".join(test.fitted_run_ids)
            sources = {"Predicted": fitted, "Interval": fitted}
            row = {
                "Law": f"{claim.quantity.label}: {claim.law.name}",
                "N is": SIZES[claim.measure] if "N" in claim.law.variables else MISSING,
                "Without": test.left_out,
                "Verdict": test.verdict,
            }
            if len(cells):
                last = cells.iloc[-1]
                sources["Observed"] = last["run_ids"]
                row |= {
                    "Observed": f"{last['observed']:.{digits}f}",
                    "Predicted": f"{last['predicted']:.{digits}f}",
                    "Interval": f"{last['low']:.{digits}f} to {last['high']:.{digits}f}",
                    "Covered": f"{int(cells['is_covered'].sum())} of {len(cells)}",
                    "Mean error": size_of(cells["error"]),
                    "Interval ±": size_of(cells["half_width"]),
                    "Naive error": size_of(cells["naive_error"]),
                }
                about = {"quantity": claim.quantity.key, "law": claim.law.name, "measure": claim.measure}
                numbers += [
                    about
                    | {"left_out": test.left_out, **cell.to_dict(), "verdict": test.verdict, "fitted_run_ids": fitted}
                    for _, cell in cells.iterrows()
                ]
            row["Why"] = test.reason
            everything = " ".join(claim.run_ids)
            rows.append({heading: (text, sources.get(heading, everything)) for heading, text in row.items()})
    caption = (
        f"Each law is fitted without these cells and predicts their mean. Pass: all lie in their {level:.0%} "
        "prediction intervals (taken together), the mean error is smaller than the naive one, of expecting what the "
        "nearest cell that was seen has (the next level down of what is left out, there the nearest size), and the "
        "law is converged, or at a bound in its floor E alone, with these cells and without. Interval ±: half its "
        "width, a mean over cells. Observed, predicted and interval are of the last cell; the CSV has all."
    )
    return table_of("held_out", "Prediction of what the fit did not see", caption, rows, numbers)


def isoflop_table(iso: IsoFlop, found: Claims) -> ReportTable:
    """A row a budget; the CSV has the curves' coefficients and the path's exponent too."""
    rows, numbers = [], []
    level = found.settings.level
    for curve in iso.curves:
        ids = " ".join(found.kept.loc[found.kept["cell"].isin(curve.cells.index), "run_id"])
        low, high = curve.interval(level)
        has_best = np.isfinite(curve.best_size)
        by_law, law_low, law_high, law_ids = _best_by_law(curve, found)
        row = {
            "Training compute": (human_macs(curve.compute), ids),
            "Sizes": (str(curve.cells["size"].nunique()), ids),
            "Best size": (human_count(curve.best_size) if has_best else MISSING, ids),
            "Interval": (human_interval(low, high), ids),
            "Loss there": (f"{curve.best_loss:.4f}" if has_best else MISSING, ids),
            "Status": (curve.status + (f": {curve.reason}" if curve.reason else ""), ids),
            "By L(N, D)": (human_count(by_law) if 0 < by_law < np.inf else human_interval(by_law, by_law), law_ids),
            "Interval of it": (human_interval(law_low, law_high), law_ids),
        }
        rows.append(row)
        cube, square, slope, constant = curve.coefficients or (np.nan,) * 4
        entry: dict[str, Any] = {"train_macs": curve.compute, "sizes": curve.cells["size"].nunique()}
        entry |= {"best_size": curve.best_size, "low": low, "high": high, "best_loss": curve.best_loss}
        entry |= {"status": curve.status, "reason": curve.reason, "log10_n_centre": curve.centre}
        entry |= {"cube": cube, "square": square, "slope": slope, "constant": constant}
        entry |= {"law_best_size": by_law, "law_low": law_low, "law_high": law_high}
        numbers.append(entry | _path_numbers(iso, level) | {"run_ids": ids, "law_run_ids": law_ids})
    path = iso.path
    if np.isfinite(path.exponent):
        bounds = ""
        if path.bootstrap is not None:
            low, high = quantiles(path.bootstrap[0], level)
            bounds = f" ({low:.3f} to {high:.3f})"
        told = f"N* grows as C^{path.exponent:.3f}{bounds}{f'; {path.reason}' if path.reason else ''}."
    else:
        told = f"No path: {path.reason}."
    caption = f"The best size is in {SIZES[found.settings.size]}. {told} {_isoflop_intervals(iso, level)}"
    if any(curve.degree == PARABOLA for curve in iso.curves):
        caption += (
            " Of four sizes, or of too few runs for a cubic, a curve is a parabola, whose minimum may lie a fifth "
            "beside the law's, which its interval does not know of."
        )
    return table_of("isoflop", "Best size at each budget of compute", caption, rows, numbers)


def _best_by_law(curve: Curve, found: Claims) -> tuple[float, float, float, str]:
    """(size, its interval, the law's runs) by the study's L(N, D), where it is of this budget's cells."""
    claim = found.loss("L(N, D)")
    assert claim is not None
    of_law = set(found.kept.loc[found.kept["run_id"].isin(claim.run_ids), "cell"])
    if claim.fitted.status != CONVERGED or found.data != "audio_hours_seen" or not of_law.issuperset(curve.cells.index):
        return np.nan, np.nan, np.nan, ""
    best, draws = best_by_law(curve, claim.fitted)
    low, high = size_interval(draws, found.settings.level) if claim.fitted.has_interval else (np.nan, np.nan)
    return best, low, high, " ".join(claim.run_ids)


def _path_numbers(iso: IsoFlop, level: float) -> dict[str, float]:
    """log10 N* = intercept + exponent log10 C, the same for all budgets."""
    low, high = (np.nan, np.nan) if iso.path.bootstrap is None else quantiles(iso.path.bootstrap[0], level)
    about = {"path_exponent": iso.path.exponent, "path_intercept": iso.path.intercept}
    return about | {"path_exponent_low": low, "path_exponent_high": high}


def _isoflop_intervals(iso: IsoFlop, level: float) -> str:
    freedom = human_degrees(iso.freedom)
    if iso.freedom < FEWEST_FREEDOM:
        return f"No intervals: {freedom} of the scatter about the curves, of at least {FEWEST_FREEDOM}."
    return (
        f"{level:.0%} intervals: runs scatter about the curves of all budgets alike, with {freedom}; "
        "open where a share of the draws has its minimum beyond the sizes trained."
    )


def exclusions_table(found: Claims) -> ReportTable:
    """A row a run that a rule excludes."""
    rows = [
        {
            heading: (str(text), run["run_id"])
            for heading, text in (
                ("Run", run["run_id"]),
                ("Cell", run["label"]),
                ("Rule", run["rule"]),
                ("Detail", run["detail"]),
            )
        }
        for _, run in found.exclusions.iterrows()
    ]
    caption = (
        "Left out of every fit by rule; fits with those that have a loss at the end of their training stand beside the "
        "others."
    )
    return table_of("exclusions", "Runs left out of fits", caption, rows, found.exclusions)
