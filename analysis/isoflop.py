"""isoFLOP curves: at each budget of training compute, which size is best, and the path through the best sizes.

At one budget C loss against log N is a parabola about its best size N*(C) (Hoffmann et al. 2022, approach 2); the
minima follow N* = k C^a, and with D* = C / (cost N*) the audio grows as C^(1 - a). Intervals are of draws from the
multivariate Student distribution of the coefficients, with the residuals of all runs about the parabolas of all
budgets; a parabola whose minimum lies outside of the sizes that were trained, or opens downwards, has no minimum to
report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import CONVERGED, FEWEST_FREEDOM, UNIDENTIFIABLE, Data
from analysis.laws import Array

SAME_BUDGET = 0.1  # relative: steps are whole numbers, so the cells of a budget differ by some percent in compute
FEWEST_SIZES = 4  # a parabola through three points has nothing left to say how good it is
MOST_LOST = 0.05  # of the draws of a path: beyond, what is left of them says nothing of the rest
AT_EDGE = "at an edge"


@dataclass(frozen=True)
class Parabola:
    """Loss over log10 N at one budget.

    compute: mean training compute of its cells, in multiply-accumulates. coefficients: (3,) of log loss in
    log10 N - centre, highest power first. best_size, best_loss: at the minimum, with intervals; NaN without one.
    bootstrap: (B,) draws of best_size: 0 where it lies below the sizes trained, infinite where beyond; None where the
        degrees of freedom are too few.
    status: converged; at an edge: the best size may lie beyond those trained; unidentifiable, with the reason.
    """

    compute: float
    cells: pd.DataFrame  # N, D, C, loss, seeds, size
    status: str
    reason: str
    centre: float = np.nan
    coefficients: tuple[float, ...] = ()
    best_size: float = np.nan
    best_loss: float = np.nan
    squares: float = np.nan  # of the residuals of log loss of its runs
    freedom: int = 0  # runs without the three that the parabola takes
    covariance: Array | None = None  # of the coefficients, for a scatter of 1
    bootstrap: Array | None = None

    def loss(self, sizes: Array) -> Array:
        return np.exp(np.polyval(self.coefficients, np.log10(sizes) - self.centre))

    def interval(self, level: float) -> tuple[float, float]:
        """Of best_size: 0 or infinite where it is open on that side, NaN without one."""
        if self.bootstrap is None:
            return np.nan, np.nan
        low, high = np.quantile(self.bootstrap, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        return float(low), float(high)


@dataclass(frozen=True)
class Path:
    """N*(C) = size_at(C): a power law through the minima, of which `exponent` is a."""

    status: str
    reason: str
    exponent: float = np.nan
    intercept: float = np.nan  # log10 N* at log10 C = 0
    bootstrap: tuple[Array, Array] | None = None  # exponents, intercepts

    def size_at(self, compute: Array) -> Array:
        return 10 ** (self.intercept + self.exponent * np.log10(compute))

    def band(self, compute: Array, level: float) -> tuple[Array, Array]:
        assert self.bootstrap is not None
        exponents, intercepts = self.bootstrap
        sizes = 10 ** (intercepts[:, None] + exponents[:, None] * np.log10(compute)[None])
        low, high = np.nanquantile(sizes, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


@dataclass(frozen=True)
class IsoFlop:
    parabolas: list[Parabola]
    path: Path
    reason: str = ""  # why there are no parabolas
    freedom: int = 0  # degrees of freedom of the scatter about them


def isoflop(runs: pd.DataFrame, *, bootstraps: int, seed: int) -> IsoFlop:
    """Parabolas and path of runs as `analysis.claims` prepares them, without those that a rule excludes."""
    values = runs[np.isfinite(runs["validation_loss"]) & (runs["validation_loss"] > 0)]
    shared = [budget for budget in budgets(values) if budget["N"].nunique() > 1]
    if not shared:
        reason = "no budget of compute is shared by cells of different sizes (+sweep=isoflop plans such cells)"
        return IsoFlop([], Path(UNIDENTIFIABLE, reason), reason)
    found = [_parabola(budget) for budget in shared]
    parabolas, freedom = _with_draws(found, bootstraps, np.random.default_rng(seed))
    return IsoFlop(parabolas, _path(parabolas), freedom=freedom)


def budgets(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Runs by budget: as planned where compute is an axis, else those whose compute is nearly the same.

    Where cells of a budget differ in the hours of data, those with the hours that the most sizes have, then the most.
    """
    axis = "axes.train.budget.train_pmacs"
    if axis in runs and runs[axis].notna().any():
        return [_of_one_data_budget(budget) for _, budget in runs.groupby(axis)]
    if runs.empty:
        return []
    ordered = runs.sort_values("C")
    group = np.concatenate([[0], np.cumsum(np.diff(np.log(ordered["C"].to_numpy(dtype=float))) > SAME_BUDGET)])
    return [_of_one_data_budget(budget) for _, budget in ordered.groupby(group)]


def _of_one_data_budget(runs: pd.DataFrame) -> pd.DataFrame:
    if (runs.groupby("size")["budget_hours"].nunique() <= 1).all():
        return runs
    sizes = runs.groupby("budget_hours")["size"].nunique()
    return runs[runs["budget_hours"] == sizes[sizes == sizes.max()].index.max()]


def _with_draws(parabolas: list[Parabola], bootstraps: int, rng: np.random.Generator) -> tuple[list[Parabola], int]:
    """The parabolas with draws of their best sizes, and the degrees of freedom of the scatter that they share."""
    fitted = [parabola for parabola in parabolas if parabola.coefficients]
    freedom = sum(parabola.freedom for parabola in fitted)
    if freedom < FEWEST_FREEDOM:
        return parabolas, freedom
    variance = sum(parabola.squares for parabola in fitted) / freedom
    tails = np.sqrt(freedom * variance / rng.chisquare(freedom, bootstraps))
    drawn = []
    for parabola in parabolas:
        if parabola.coefficients:
            root = np.linalg.cholesky(np.asarray(parabola.covariance))
            scatter = tails[:, None] * (rng.normal(size=(bootstraps, 3)) @ root.T)
            u = np.log10(parabola.cells["N"].to_numpy(dtype=float)) - parabola.centre
            at = _least(parabola.coefficients + scatter, u.min(), u.max())
            drawn.append(replace(parabola, bootstrap=10 ** (at + parabola.centre)))
        else:
            drawn.append(parabola)
    return drawn, freedom


def _parabola(runs: pd.DataFrame) -> Parabola:
    ordered = runs.sort_values("N", kind="stable")
    data = Data(
        {"N": ordered["N"].to_numpy(float)}, ordered["validation_loss"].to_numpy(float), ordered["cell"].to_numpy()
    )
    means = data.cell_means(is_log=True)
    first = ordered.drop_duplicates("cell").set_index("cell")
    cells = (
        first.loc[list(means.cell)][["size", "N", "D", "C"]].assign(loss=means.y, seeds=data.counts).sort_values("N")
    )
    compute = float(cells["C"].mean())
    sizes = np.unique(means.x["N"])
    if len(sizes) < FEWEST_SIZES:
        reason = f"{len(sizes)} sizes; a parabola needs {FEWEST_SIZES}, for one more point than coefficients"
        return Parabola(compute, cells, UNIDENTIFIABLE, reason)
    u = np.log10(means.x["N"])
    centre = float(u.mean())
    design = np.vander(u - centre, 3)
    covariance = np.linalg.inv(design.T @ (design * data.counts[:, None]))
    coefficients = covariance @ (design.T @ (data.counts * np.log(means.y)))
    low, high = u.min() - centre, u.max() - centre
    best = float(_least(np.asarray(coefficients[None], dtype=np.float64), low, high)[0])
    residuals = np.log(data.y) - (design @ coefficients)[data.codes]
    shape = (float(coefficients[0]), float(coefficients[1]), float(coefficients[2]))
    about: dict[str, Any] = {
        "squares": float(residuals @ residuals),
        "freedom": len(data.y) - 3,
        "covariance": covariance,
    }
    if not np.isfinite(best):
        side = "opens downwards" if coefficients[0] <= 0 else "has its minimum outside of the sizes trained"
        falls = np.polyval(coefficients, high) < np.polyval(coefficients, low)
        needed = (
            "larger sizes are needed, or smaller budgets" if falls else "smaller sizes are needed, or larger budgets"
        )
        reason = f"the parabola {side}; {needed}"
        return Parabola(compute, cells, AT_EDGE, reason, centre, shape, **about)
    size = 10 ** (best + centre)
    loss = float(np.exp(np.polyval(coefficients, best)))
    return Parabola(compute, cells, CONVERGED, "", centre, shape, size, loss, **about)


def _least(coefficients: Array, low: float, high: float) -> Array:
    """Where parabolas (B, 3) are least; -inf or inf outside of [low, high], or where they open downwards."""
    with np.errstate(all="ignore"):
        at = -coefficients[:, 1] / (2 * coefficients[:, 0])
    falls = coefficients @ (np.array([high**2, high, 1.0]) - np.array([low**2, low, 1.0])) < 0
    within = (coefficients[:, 0] > 0) & (at >= low) & (at <= high)
    return np.where(within, at, np.where(falls, np.inf, -np.inf))


def _path(parabolas: list[Parabola]) -> Path:
    found = [parabola for parabola in parabolas if parabola.status == CONVERGED]
    if len(found) < 2:
        return Path(UNIDENTIFIABLE, f"{len(found)} of {len(parabolas)} budgets have a minimum; a path needs 2")
    compute = np.log10([parabola.compute for parabola in found])
    exponent, intercept = np.polyfit(compute, np.log10([parabola.best_size for parabola in found]), 1)
    few = "" if len(found) > 2 else "two budgets: nothing shows whether the path is a power law"
    draws = [parabola.bootstrap for parabola in found if parabola.bootstrap is not None]
    if not draws:
        return Path(CONVERGED, few, float(exponent), float(intercept))
    with np.errstate(divide="ignore"):
        drawn = np.log10(np.stack(draws))
    whole = np.asarray(np.isfinite(drawn).all(axis=0))
    lost = f"in {1 - whole.mean():.1%} of the draws a budget has no minimum within the sizes trained"
    if 1 - whole.mean() > MOST_LOST:
        return Path(UNIDENTIFIABLE, f"no interval: {lost}", float(exponent), float(intercept))
    exponents, intercepts = np.polyfit(compute, drawn[:, whole], 1)
    reason = "; ".join(filter(None, [few, "" if whole.all() else f"{lost}, left out of the interval"]))
    return Path(CONVERGED, reason, float(exponent), float(intercept), (exponents, intercepts))
