"""Fitting a law: one optimum out of many starts, a status, and intervals from thousands of bootstraps.

1. `fit` first asks whether the cells can determine the law at all: too few, too few levels of a
   variable, or collinear variables make it "unidentifiable", with the reason in place of numbers.
2. Variable projection finds where to start: for given shapes (exponents) the coefficients are the
   solution of a non-negative least-squares problem of at most three unknowns, so a grid over the one
   or two shapes sees every valley. Variables are centred at their geometric mean, which takes the
   condition of the problem from 10^11 to 10 or so.
3. The best starts go through Newton's method in all parameters, with analytic gradient and Hessian,
   damped and projected on the bounds, all of them at once in numpy.
4. Bootstraps are the same problem with other weights or values, so thousands run as one batch from the optimum. Their
   spread is that of Student's t, since few seeds or cells tell little of the scatter.

`analysis.problem` has the numbers of 2 to 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.laws import Array, Law
from analysis.problem import BOOTSTRAP_STEPS, MOST_UNFINISHED, STEPS, Problem

HUBER_DELTA = 1e-3  # of residuals of log loss, as Hoffmann et al. 2022
FEWEST_FREEDOM = 3  # degrees of freedom of the scatter; with fewer an interval says nothing, and is not given
SAME_OBJECTIVE, SAME_SHAPE = 1e-9, 0.05  # relative: optima of one value whose shapes differ by more are a flat valley
MOST_CORRELATION = 0.98  # of two variables' logarithms; beyond, their exponents cannot be told apart

CONVERGED, BOUND, UNIDENTIFIABLE, UNFINISHED = "converged", "at a bound", "unidentifiable", "not converged"


@dataclass(frozen=True)
class Data:
    """What a law is fitted to: n rows, those of one cell differing in nothing but the seed.

    x: variable → (n,); y: (n,); cell: (n,) labels.
    """

    x: Mapping[str, Array]
    y: Array
    cell: Array

    @cached_property
    def codes(self) -> NDArray[np.intp]:
        return np.unique(self.cell, return_inverse=True)[1]

    @property
    def num_cells(self) -> int:
        return int(self.codes.max()) + 1 if len(self.y) else 0

    @property
    def counts(self) -> NDArray[np.intp]:
        """Seeds in each cell."""
        return np.bincount(self.codes)

    def cell_means(self, is_log: bool) -> Data:
        """One row a cell: the mean of y over its seeds (of log y, back in y's unit), and of x."""
        first = np.unique(self.codes, return_index=True)[1]

        def mean(values: Array) -> Array:
            return np.bincount(self.codes, weights=np.asarray(values, dtype=float)) / self.counts

        y = np.exp(mean(np.log(self.y))) if is_log else mean(self.y)
        # exactly the cell's x where all its seeds have the same, which is all laws but those of the loss
        x = {name: np.asarray(values, dtype=float)[first] for name, values in self.x.items() if name != "L"}
        x |= {name: mean(values) for name, values in self.x.items() if name == "L"}
        return Data(x, y, self.cell[first])


@dataclass(frozen=True)
class Bootstraps:
    """Laws fitted to resampled data, as they are drawn; empty if there were none.

    values: name of a parameter → (B,) values.
    resampled: "seeds" or "cells", what was drawn.
    widening: (B,) by which the distance of each from the optimum counts in an interval.
    scale: what `widening` is without Student's tails, by which their standard deviation counts in a standard error.
    unfinished: share that found no optimum.
    """

    values: dict[str, Array] = field(default_factory=dict)
    resampled: str = ""
    widening: Array = field(default_factory=lambda: np.empty(0))
    scale: float = 1.0
    unfinished: float = 0.0


@dataclass(frozen=True)
class Fit:
    """A law fitted to data.

    status: converged, at a bound (then `reason` names the parameters), not converged, or
        unidentifiable (then there are no parameters).
    parameters: name → value. objective: of the optimum. huber: delta, or None for least squares.
    residuals: (cells,) of the cells' means, of log y or y.
    bootstraps: what intervals and standard errors come from.
    at_bounds: names of the parameters that stopped at the end of their range.
    lack_of_fit: F of the cells' distance from the law over the scatter of seeds within them, about 1 where the law
        holds, and the degrees of freedom of both; None where no cell has several seeds.
    """

    law: Law
    data: Data
    status: str
    reason: str = ""
    parameters: dict[str, float] = field(default_factory=dict)
    objective: float = np.nan
    huber: float | None = None
    residuals: Array = field(default_factory=lambda: np.empty(0))
    bootstraps: Bootstraps = field(default_factory=Bootstraps)
    at_bounds: tuple[str, ...] = ()

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the scatter that the bootstraps draw from."""
        within = len(self.data.y) - self.data.num_cells
        return within if self.bootstraps.resampled == "seeds" else self.data.num_cells - self.law.num_parameters

    @property
    def has_interval(self) -> bool:
        return bool(self.bootstraps.values) and not self.why_no_interval

    @property
    def why_no_interval(self) -> str:
        """Of a law with bootstraps: why they give no interval; "" where they do."""
        if self.freedom < FEWEST_FREEDOM:
            return f"{human_degrees(self.freedom)}, of at least {FEWEST_FREEDOM} for an interval"
        if self.bootstraps.unfinished > MOST_UNFINISHED:
            return f"{self.bootstraps.unfinished:.0%} of the bootstraps found no optimum in {BOOTSTRAP_STEPS} steps"
        return ""

    @property
    def is_usable(self) -> bool:
        """Whether the curve means something (a parameter at its bound may not)."""
        return self.status in (CONVERGED, BOUND)

    @property
    def is_shown(self) -> bool:
        """Whether the cells show all of the law, but for a floor that a power law need not have (E = 0)."""
        return self.status == CONVERGED or (self.status == BOUND and self.at_bounds == ("E",))

    @cached_property
    def lack_of_fit(self) -> tuple[float, int, int] | None:
        return _lack_of_fit(self.law, self.data, self.residuals) if len(self.residuals) else None

    def standard_errors(self) -> dict[str, float]:
        """Of each parameter: the bootstraps' standard deviation times their scale, so with what the law misses.

        NaN where the bootstraps reach beyond what a number can hold.
        """
        drawn = self.bootstraps
        with np.errstate(over="ignore", invalid="ignore"):
            found = {name: drawn.scale * float(np.std(values, ddof=1)) for name, values in drawn.values.items()}
        return {name: value if np.isfinite(value) else np.nan for name, value in found.items()}

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Of a parameter; NaN where there are too few degrees of freedom."""
        if not self.has_interval:
            return np.nan, np.nan
        drawn = self.bootstraps
        return quantiles(_widened(self.parameters[name], drawn.values[name], drawn.widening), level)

    def predict(self, x: Mapping[str, ArrayLike]) -> Array:
        """The law at x (m,)."""
        return self.law.predict(x, self.parameters)

    def predict_bootstraps(self, x: Mapping[str, ArrayLike]) -> Array:
        """The bootstraps' laws at x, as they count in an interval: (B, m)."""
        points = {name: np.atleast_1d(np.asarray(values, dtype=float))[None] for name, values in x.items()}
        curves = self.law.predict(points, {name: values[:, None] for name, values in self.bootstraps.values.items()})
        optimum = self.law.predict(points, {name: np.float64(value) for name, value in self.parameters.items()})
        return _widened(optimum, curves, self.bootstraps.widening[:, None])

    def band(self, x: Mapping[str, ArrayLike], level: float = 0.95) -> tuple[Array, Array]:
        """Interval of the law itself at x: (m,), (m,); see `has_interval`."""
        return _quantiles(self.predict_bootstraps(x), level)

    def prediction_interval(
        self, x: Mapping[str, ArrayLike], level: float = 0.95, seeds: int = 1, seed: int = 0
    ) -> tuple[Array, Array]:
        """Interval of a new cell at x, the mean of so many seeds: the law's, and what cells scatter about it.

        The scatter is the larger of two estimates, each with its degrees of freedom (Student's t): of the cells'
        means about the law, which holds what the law misses, and of seeds within cells over the number of seeds.
        """
        curves = self.predict_bootstraps(x)
        deviation, freedom = self.scatter(seeds)
        # the same for every x, so that a point has one interval whatever others are asked for with it
        noise = deviation * np.random.default_rng(seed).standard_t(freedom, (len(curves), 1))
        return _quantiles(curves * np.exp(noise) if self.law.has_log_residuals else curves + noise, level)

    def scatter(self, seeds: int = 1) -> tuple[float, int]:
        """Standard deviation of a new cell's mean over so many seeds about the law, and its degrees of freedom."""
        data, freedom = self.data, len(self.residuals) - self.law.num_parameters
        estimates = [(float(np.sqrt(np.sum(self.residuals**2) / max(freedom, 1))), max(freedom, 1))]
        within = len(data.y) - data.num_cells
        if within > 0:
            y = np.log(data.y) if self.law.has_log_residuals else data.y
            means = np.bincount(data.codes, weights=y) / data.counts
            spread = float(np.sqrt(np.sum((y - means[data.codes]) ** 2) / within))
            estimates.append((spread / np.sqrt(seeds), within))
        return max(estimates)

    @property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few cells, of the least-squares fit to the cells' means.

        The scale of the residuals counts as a parameter. Comparable between laws of the same y.
        """
        n, k = self.data.num_cells, self.law.num_parameters + 1
        if not self.is_usable or n - k - 1 <= 0:
            return np.nan
        again = fit(self.law, self.data.cell_means(self.law.has_log_residuals), huber=None)
        if not again.is_usable:
            return np.nan
        squares = float(np.sum(again.residuals**2))
        if squares <= 0:
            return np.nan
        return n * np.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def human_degrees(freedom: int) -> str:
    return f"{freedom} degree{'s' * (freedom != 1)} of freedom"


def quantiles(values: Array, level: float = 0.95) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def size_interval(sizes: Array, level: float) -> tuple[float, float]:
    """Of draws of a best size, of which those below the sizes trained are 0 and those beyond them infinite."""
    low, high = np.quantile(sizes, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def _widened(optimum: float | Array, drawn: Array, widening: Array) -> Array:
    """Bootstraps moved away from the optimum by a factor: of their logarithms where all are positive."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.all(drawn > 0) and np.all(np.asarray(optimum) > 0):
            away = (np.log(drawn) - np.log(optimum)) * widening
            return np.asarray(optimum * np.exp(np.clip(away, -600, 600)), dtype=np.float64)
        moved = optimum + (drawn - optimum) * widening
        return np.asarray(np.maximum(moved, 0.0) if np.all(drawn >= 0) else moved, dtype=np.float64)


def _quantiles(values: Array, level: float) -> tuple[Array, Array]:
    """Over the bootstraps; NaN where they reach beyond what a number can hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        ends = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = np.where(np.isfinite(ends), ends, np.nan)
    return low, high


def fit(
    law: Law,
    data: Data,
    *,
    huber: float | None = HUBER_DELTA,
    bootstraps: int = 0,
    seed: int = 0,
) -> Fit:
    """Fit a law to the means of cells, each with the weight of its seeds; see `Fit` for what comes back.

    huber: delta of the robust loss in units of the residual (log y; y for metrics), None for least squares
    bootstraps: how many, for intervals: of the seeds within each cell where every cell has several and x is the same
        for all of them, else of cells
    """
    means = data.cell_means(law.has_log_residuals)
    why = unidentifiable(law, means)
    if why:
        return Fit(law, data, UNIDENTIFIABLE, why, huber=huber)
    problem = Problem(law, means.x, means.y, huber)
    weights = data.counts.astype(float)
    starts = problem.starts(weights)
    points, objectives, converged = problem.minimise(starts, np.tile(weights, (len(starts), 1)))
    best = int(np.argmin(objectives))
    point = points[best]
    as_good = points[converged & (objectives <= objectives[best] * (1 + SAME_OBJECTIVE))]
    status, reason = _status(problem, point, as_good, bool(converged[best]))
    if status == UNIDENTIFIABLE:
        return Fit(law, data, status, reason, huber=huber)
    residuals = problem.residuals(point[None])[0]
    # The runner-up valley too: another sample may prefer it.
    others = points[np.argsort(objectives)[1:]]
    valleys = [point, *[other for other in others if not np.allclose(other, point, rtol=1e-3, atol=1e-6)][:1]]
    return Fit(
        law,
        data,
        status,
        reason,
        parameters={name: float(value[0]) for name, value in problem.named(point[None]).items()},
        objective=float(objectives[best]),
        huber=huber,
        residuals=residuals,
        bootstraps=_bootstrap(problem, data, residuals, valleys, bootstraps, seed) if bootstraps else Bootstraps(),
        at_bounds=tuple(problem.at_bounds(point)),
    )


def _bootstrap(
    problem: Problem, data: Data, residuals: Array, valleys: list[Array], bootstraps: int, seed: int
) -> Bootstraps:
    """Fit the law again to samples of the data. residuals: of the optimum; valleys: where the searches begin."""
    law, weights = problem.law, data.counts.astype(float)
    rng = np.random.default_rng(seed)
    if (data.counts > 1).all() and "L" not in law.variables:
        resampled = "seeds"
        draws, y = np.tile(weights, (bootstraps, 1)), draw_seeds(data, bootstraps, law.has_log_residuals, rng)
        # Seeds know nothing of what the law misses: where cells lie farther from it than seeds do, these count.
        ratio, freedom, _ = _lack_of_fit(law, data, residuals) or (0.0, 1, 0)
        widening, scale = np.ones(bootstraps), float(np.sqrt(max(ratio, 1.0)))
        if ratio > 1:
            widening = np.sqrt(ratio * freedom / rng.chisquare(freedom, bootstraps))
    else:
        resampled = "cells"
        chosen = rng.multinomial(len(weights), np.full(len(weights), 1 / len(weights)), bootstraps)
        draws, y = chosen * weights, None
        # A resample of n cells scatters like the n - p of the residuals, whose own scatter is as chi-squared.
        freedom = len(weights) - law.num_parameters
        widening = np.sqrt(len(weights) / rng.chisquare(freedom, bootstraps))
        scale = float(np.sqrt(len(weights) / freedom))
    points, unfinished = problem.minimise_all(valleys, draws, y)
    return Bootstraps(problem.named(points), resampled, widening[: len(points)], scale, unfinished)


def _lack_of_fit(law: Law, data: Data, residuals: Array) -> tuple[float, int, int] | None:
    """See `Fit.lack_of_fit`."""
    between, within = data.num_cells - law.num_parameters, len(data.y) - data.num_cells
    if between < 1 or within < 1:
        return None
    y = np.log(data.y) if law.has_log_residuals else np.asarray(data.y, dtype=float)
    means = np.bincount(data.codes, weights=y) / data.counts
    variance = float(np.sum((y - means[data.codes]) ** 2)) / within
    if variance <= 0:
        return None
    return float(np.sum(data.counts * residuals**2)) / between / variance, between, within


def _status(problem: Problem, point: Array, as_good: Array, converged: bool) -> tuple[str, str]:
    """What the optimum is worth, and why. as_good: (S, P), where else the search ended as low."""
    free = problem.K + problem.free_shapes(point)
    spread = np.ptp(np.concatenate([as_good, point[None]])[:, free], axis=0)
    if not problem.is_determined(point) or (spread > SAME_SHAPE * np.abs(point[free])).any():
        return UNIDENTIFIABLE, "the cells do not determine the law: different parameters fit them equally well"
    if bounds := problem.at_bounds(point):
        told = ", ".join(f"{name} = {value:.3g}" for name, value in bounds.items())
        return BOUND, f"{told}: the cells show no other end of it"
    return (CONVERGED, "") if converged else (UNFINISHED, f"no optimum within {STEPS} steps")


def draw_seeds(data: Data, bootstraps: int, is_log: bool, rng: np.random.Generator) -> Array:
    """Means of the cells (B, cells) over seeds drawn again: each its cell's mean and a deviation of any cell's seed.

    A few seeds of one cell tell little of their spread, those of all cells together more. Deviations from a mean of k
    seeds count sqrt(k / (k - 1)) times, which makes the variance unbiased, and those of a sample share a factor that
    gives them Student's tails. Every cell needs several seeds.
    """
    y = np.log(data.y) if is_log else np.asarray(data.y, dtype=float)
    counts, codes = data.counts, data.codes
    means = np.bincount(codes, weights=y) / counts
    deviations = (y - means[codes]) * np.sqrt(counts / (counts - 1))[codes]
    freedom = len(y) - len(counts)
    tails = np.sqrt(freedom / rng.chisquare(freedom, bootstraps))
    shares = np.zeros((len(y), len(counts)))
    shares[np.arange(len(y)), codes] = 1 / counts[codes]
    drawn = means + tails[:, None] * (rng.choice(deviations, (bootstraps, len(y))) @ shares)
    return np.exp(drawn) if is_log else drawn


def unidentifiable(law: Law, data: Data) -> str:
    """Why the cells cannot determine the law; "" if they may."""
    if not len(data.y):
        return "no cell has a value"
    points = np.stack([np.asarray(data.x[name], dtype=float) for name in law.variables], axis=1)
    distinct = len(np.unique(np.round(np.log(np.maximum(points, 1e-300)), 6), axis=0))
    if distinct <= law.num_parameters:
        return (
            f"{distinct} distinct point{'s' * (distinct != 1)} of {', '.join(law.variables)} for "
            f"{law.num_parameters} parameters; at least {law.num_parameters + 1} are needed"
        )
    if len(law.variables) > 1:
        for column, name in enumerate(law.variables):
            levels = len(np.unique(np.round(np.log(points[:, column]), 2)))
            if levels < 3:
                return f"{name} has {levels} level{'s' * (levels != 1)}; a power law and its limit need at least 3"
        for one, other in itertools.combinations(range(points.shape[1]), 2):
            correlation = np.corrcoef(np.log(points[:, one]), np.log(points[:, other]))[0, 1]
            if abs(correlation) > MOST_CORRELATION:
                return (
                    f"{law.variables[one]} and {law.variables[other]} go together (correlation of logarithms "
                    f"{correlation:+.3f}): their effects cannot be told apart; vary one with the other held"
                )
    return ""
