"""isoFLOP curves: at each budget of training compute, which size is best, and the path through the best sizes.

At one budget C loss against log N is a parabola about its best size N*(C) (Hoffmann et al. 2022, approach 2); the
minima follow N* = k C^a, and with D* = C / (cost N*) the audio grows as C^(1 - a). Intervals are of bootstraps over the
seeds of each cell, or where cells have one seed over the residuals about the parabola; a parabola whose minimum
lies outside of the sizes that were trained, or opens downwards, has no minimum to report.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fit import CONVERGED, UNIDENTIFIABLE, Data, draw_seeds, quantiles
from analysis.laws import Array

SAME_BUDGET = 0.1  # relative: steps are whole numbers, so the cells of a budget differ by some percent in compute
FEWEST_SIZES = 4  # a parabola through three points has nothing left to say how good it is
AT_EDGE = "at an edge"


@dataclass(frozen=True)
class Parabola:
    """Loss over log10 N at one budget.

    compute: mean training compute of its cells, in multiply-accumulates. coefficients: (3,) of log loss in
    log10 N - centre, highest power first. best_size, best_loss: at the minimum, with intervals; NaN without one.
    bootstrap: (B,) of best_size, NaN where a bootstrap has no minimum within the sizes.
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
    bootstrap: Array | None = None

    def loss(self, sizes: Array) -> Array:
        return np.exp(np.polyval(self.coefficients, np.log10(sizes) - self.centre))

    def interval(self, level: float) -> tuple[float, float]:
        if self.bootstrap is None or np.isfinite(self.bootstrap).mean() < 0.5:
            return np.nan, np.nan
        return quantiles(self.bootstrap, level)


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


def isoflop(runs: pd.DataFrame, *, bootstraps: int, seed: int) -> IsoFlop:
    """Parabolas and path of runs as `analysis.claims` prepares them, without those that a rule excludes."""
    values = runs[np.isfinite(runs["validation_loss"]) & (runs["validation_loss"] > 0)]
    budgets = [budget for budget in _budgets(values) if budget["N"].nunique() > 1]
    if not budgets:
        reason = "no budget of compute is shared by cells of different sizes (+sweep=isoflop plans such cells)"
        return IsoFlop([], Path(UNIDENTIFIABLE, reason), reason)
    rng = np.random.default_rng(seed)
    parabolas = [_parabola(budget, bootstraps, rng) for budget in budgets]
    return IsoFlop(parabolas, _path(parabolas))


def _budgets(runs: pd.DataFrame) -> list[pd.DataFrame]:
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


def _parabola(runs: pd.DataFrame, bootstraps: int, rng: np.random.Generator) -> Parabola:
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
    weight = np.sqrt(data.counts)
    solver = np.linalg.pinv(design * weight[:, None]) * weight
    y = np.log(means.y)
    coefficients = solver @ y
    low, high = u.min() - centre, u.max() - centre
    best = float(_minimum(np.asarray(coefficients[None], dtype=np.float64), low, high)[0])
    fitted = design @ coefficients
    if (data.counts > 1).all():
        drawn = np.log(draw_seeds(data, bootstraps, True, rng))
    else:  # one seed a cell: its scatter about the parabola is all there is to go by
        residuals = (y - fitted) * np.sqrt(len(y) / (len(y) - 3))
        drawn = fitted + rng.choice(residuals, (bootstraps, len(y)))
    bootstrap = 10 ** (_minimum(drawn @ solver.T, low, high) + centre)
    shape = (float(coefficients[0]), float(coefficients[1]), float(coefficients[2]))
    if not np.isfinite(best):
        side = "opens downwards" if coefficients[0] <= 0 else "has its minimum outside of the sizes trained"
        falls = np.polyval(coefficients, high) < np.polyval(coefficients, low)
        needed = (
            "larger sizes are needed, or smaller budgets" if falls else "smaller sizes are needed, or larger budgets"
        )
        reason = f"the parabola {side}; {needed}"
        return Parabola(compute, cells, AT_EDGE, reason, centre, shape, bootstrap=bootstrap)
    size = 10 ** (best + centre)
    loss = float(np.exp(np.polyval(coefficients, best)))
    return Parabola(compute, cells, CONVERGED, "", centre, shape, size, loss, bootstrap)


def _minimum(coefficients: Array, low: float, high: float) -> Array:
    """Where parabolas (B, 3) are least; NaN if they open downwards or that is outside of [low, high]."""
    with np.errstate(all="ignore"):
        at = -coefficients[:, 1] / (2 * coefficients[:, 0])
    return np.where((coefficients[:, 0] > 0) & (at >= low) & (at <= high), at, np.nan)


def _path(parabolas: list[Parabola]) -> Path:
    found = [parabola for parabola in parabolas if parabola.status == CONVERGED]
    if len(found) < 2:
        return Path(UNIDENTIFIABLE, f"{len(found)} of {len(parabolas)} budgets have a minimum; a path needs 2")
    compute = np.log10([parabola.compute for parabola in found])
    exponent, intercept = np.polyfit(compute, np.log10([parabola.best_size for parabola in found]), 1)
    drawn = np.stack([np.log10(parabola.bootstrap) for parabola in found if parabola.bootstrap is not None])
    whole: NDArray[np.bool_] = np.isfinite(drawn).all(axis=0)
    if whole.mean() < 0.5:
        reason = f"in {1 - whole.mean():.0%} of bootstraps a budget has no minimum within the sizes trained"
        return Path(UNIDENTIFIABLE, reason, float(exponent), float(intercept))
    exponents, intercepts = np.polyfit(compute, drawn[:, whole], 1)
    reason = "" if len(found) > 2 else "two budgets: nothing shows whether the path is a power law"
    return Path(CONVERGED, reason, float(exponent), float(intercept), (exponents, intercepts))
