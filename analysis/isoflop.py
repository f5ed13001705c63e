"""isoFLOP curves: at each budget of training compute, which size is best, and the path through the best sizes.

At one budget C loss against log N has its minimum at the best size N*(C) (Hoffmann et al. 2022, approach 2); the
minima follow N* = k C^a, and with D* = C / (cost N*) the audio grows as C^(1 - a). The curve of a budget of five sizes
or more is a cubic: that of a law is not symmetric about its minimum, and a parabola's lies up to a fifth beside it
(docs/analysis.md). Of four sizes it is a parabola. Intervals are of draws from the multivariate Student distribution
of the coefficients; a curve that is least at the edge of the sizes trained has no minimum to report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.budgets import of_equal_compute
from analysis.fit import CONVERGED, FEWEST_FREEDOM, UNIDENTIFIABLE, Data, Fit, size_interval
from analysis.laws import Array

FEWEST_SIZES = 4  # a parabola through three points has nothing left to say how good it is
CUBIC, PARABOLA = 3, 2  # degrees of a curve
GRID = 400  # sizes of a budget at which a law is asked for the best
MOST_LOST = 0.05  # of the draws of a path: beyond, what is left of them says nothing of the rest
AT_EDGE = "at an edge"


@dataclass(frozen=True)
class Curve:
    """Loss over log10 N at one budget.

    compute: mean training compute of its cells, in multiply-accumulates. coefficients: (4,) of log loss in
    log10 N - centre, highest power first, which is 0 of a parabola. best_size, best_loss: at the minimum, with
    intervals; NaN without one.
    bootstrap: (B,) draws of best_size: 0 where it lies below the sizes trained, infinite where beyond; None where the
        degrees of freedom are too few.
    status: converged; at an edge: the best size may lie beyond those trained; unidentifiable, with the reason.
    """

    compute: float
    cells: pd.DataFrame  # N, D, C, loss, seeds, size
    status: str
    reason: str
    degree: int = 0
    centre: float = np.nan
    coefficients: tuple[float, ...] = ()
    best_size: float = np.nan
    best_loss: float = np.nan
    misfit: tuple[float, int] = (np.nan, 0)  # of the cells' means: sum of squares of log loss, degrees of freedom
    spread: tuple[float, int] = (np.nan, 0)  # of seeds within cells: the same
    covariance: Array | None = None  # of the coefficients that are free, for a scatter of 1
    bootstrap: Array | None = None

    def loss(self, sizes: Array) -> Array:
        return np.exp(np.polyval(self.coefficients, np.log10(sizes) - self.centre))

    def interval(self, level: float) -> tuple[float, float]:
        """Of best_size: 0 or infinite where it is open on that side, NaN without one."""
        return (np.nan, np.nan) if self.bootstrap is None else size_interval(self.bootstrap, level)


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
    curves: list[Curve]
    path: Path
    reason: str = ""  # why there are no curves
    freedom: int = 0  # degrees of freedom of the scatter about them


def isoflop(runs: pd.DataFrame, *, bootstraps: int, seed: int, refusal: str = "") -> IsoFlop:
    """Curves and path of runs as `analysis.claims` prepares them, without those that a rule excludes.

    refusal: why these runs have none (`Claims.refusal`)
    """
    if refusal:
        return IsoFlop([], Path(UNIDENTIFIABLE, refusal), refusal)
    values = runs[np.isfinite(runs["validation_loss"]) & (runs["validation_loss"] > 0)]
    shared = [budget for budget in of_equal_compute(values) if budget["N"].nunique() > 1]
    if not shared:
        reason = "no budget of compute is shared by cells of different sizes (+sweep=isoflop plans such cells)"
        return IsoFlop([], Path(UNIDENTIFIABLE, reason), reason)
    found = [_curve(budget, CUBIC) for budget in shared]
    if sum(curve.misfit[1] + curve.spread[1] for curve in found) < FEWEST_FREEDOM:
        found = [_curve(budget, PARABOLA) for budget in shared]
    curves, freedom = _with_draws(found, bootstraps, np.random.default_rng(seed))
    return IsoFlop(curves, _path(curves), freedom=freedom)


def best_by_law(curve: Curve, law: Fit) -> tuple[float, Array]:
    """Between the sizes of a budget the one of which L(N, D) predicts the least loss, and its draws, as of a curve.

    The budget's D follows from N by its cells; between them log D is interpolated linearly in log N.
    """
    cells = curve.cells.drop_duplicates("N")
    n = np.geomspace(cells["N"].min(), cells["N"].max(), GRID)
    x = {"N": n, "D": np.exp(np.interp(np.log(n), np.log(cells["N"]), np.log(cells["D"].astype(float))))}
    sizes = np.concatenate([[0.0], n[1:-1], [np.inf]])
    return float(sizes[law.predict(x).argmin()]), sizes[law.predict_bootstraps(x).argmin(axis=1)]


def _with_draws(curves: list[Curve], bootstraps: int, rng: np.random.Generator) -> tuple[list[Curve], int]:
    """The curves with draws of their best sizes, and the degrees of freedom of the scatter that they share.

    The scatter is that of all runs about the curves of all budgets; where the cells' means alone lie farther from them
    than seeds explain, theirs.
    """
    fitted = [curve for curve in curves if curve.coefficients]
    misfit, between = np.sum([curve.misfit for curve in fitted], axis=0) if fitted else (0.0, 0)
    spread, within = np.sum([curve.spread for curve in fitted], axis=0) if fitted else (0.0, 0)
    freedom = int(between + within)
    if freedom < FEWEST_FREEDOM:
        return curves, freedom
    variance = (misfit + spread) / freedom
    if between >= FEWEST_FREEDOM and misfit / between > variance:
        variance, freedom = misfit / between, int(between)
    tails = np.sqrt(freedom * variance / rng.chisquare(freedom, bootstraps))
    drawn = []
    for curve in curves:
        if curve.coefficients:
            root = np.linalg.cholesky(np.asarray(curve.covariance))
            scatter = np.zeros((bootstraps, CUBIC + 1))
            scatter[:, CUBIC - curve.degree :] = tails[:, None] * (rng.normal(size=(bootstraps, len(root))) @ root.T)
            u = np.log10(curve.cells["N"].to_numpy(dtype=float)) - curve.centre
            at = _least(curve.coefficients + scatter, u.min(), u.max())
            drawn.append(replace(curve, bootstrap=10 ** (at + curve.centre)))
        else:
            drawn.append(curve)
    return drawn, freedom


def _curve(runs: pd.DataFrame, degree: int) -> Curve:
    """degree: at most, of four sizes it is 2."""
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
        reason = f"{len(sizes)} sizes; a curve with a minimum needs {FEWEST_SIZES}, for one more than coefficients"
        return Curve(compute, cells, UNIDENTIFIABLE, reason)
    degree = min(degree, len(sizes) - 2)
    u = np.log10(means.x["N"])
    centre = float(u.mean())
    design = np.vander(u - centre, degree + 1)
    covariance = np.linalg.inv(design.T @ (design * data.counts[:, None]))
    free = covariance @ (design.T @ (data.counts * np.log(means.y)))
    low, high = u.min() - centre, u.max() - centre
    coefficients = np.concatenate([np.zeros(CUBIC - degree), free])
    best = float(_least(coefficients[None], low, high)[0])
    about: dict[str, Any] = {
        "misfit": (float(data.counts @ (np.log(means.y) - design @ free) ** 2), len(means.y) - len(free)),
        "spread": (float(np.sum((np.log(data.y) - np.log(means.y)[data.codes]) ** 2)), len(data.y) - len(means.y)),
        "covariance": covariance,
    }
    shape = tuple(float(value) for value in coefficients)
    if not np.isfinite(best):
        larger = "larger sizes are needed, or smaller budgets"
        smaller = "smaller sizes are needed, or larger budgets"
        at, needed = ("largest", larger) if best > 0 else ("smallest", smaller)
        reason = f"the curve is least at the {at} size trained; {needed}"
        return Curve(compute, cells, AT_EDGE, reason, degree, centre, shape, **about)
    size = 10 ** (best + centre)
    loss = float(np.exp(np.polyval(coefficients, best)))
    return Curve(compute, cells, CONVERGED, "", degree, centre, shape, size, loss, **about)


def _least(coefficients: Array, low: float, high: float) -> Array:
    """Where curves (B, 4) are least between low and high, (B,); -inf or inf where that is at an end."""
    a, b, c = coefficients[:, 0], coefficients[:, 1], coefficients[:, 2]
    with np.errstate(all="ignore"):  # a curve without a minimum has no root; it is least at an end
        root = np.sqrt(b**2 - 3 * a * c)  # of the derivative's two the one at which it rises, in the form that is exact
        at = np.where(b > 0, -c / (b + root), (root - b) / (3 * a))

    def value(u: Array | float) -> Array:
        return np.asarray(((a * u + b) * u + c) * u)

    ends = value(low), value(high)
    within = (at >= low) & (at <= high)
    within &= value(np.where(within, at, 0.0)) <= np.minimum(*ends)
    return np.where(within, at, np.where(ends[1] < ends[0], np.inf, -np.inf))


def _path(curves: list[Curve]) -> Path:
    found = [curve for curve in curves if curve.status == CONVERGED]
    if len(found) < 2:
        return Path(UNIDENTIFIABLE, f"{len(found)} of {len(curves)} budgets have a minimum; a path needs 2")
    compute = np.log10([curve.compute for curve in found])
    exponent, intercept = np.polyfit(compute, np.log10([curve.best_size for curve in found]), 1)
    few = "" if len(found) > 2 else "two budgets: nothing shows whether the path is a power law"
    draws = [curve.bootstrap for curve in found if curve.bootstrap is not None]
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
