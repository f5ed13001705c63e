"""Fitting a law: one optimum out of many starts, a status, and intervals from thousands of bootstraps.

1. `fit` first asks whether the cells can determine the law at all: too few, too few levels of a
   variable, or collinear variables make it "unidentifiable", with the reason in place of numbers.
2. Variable projection finds where to start: for given shapes (exponents) the coefficients are the
   solution of a non-negative least-squares problem of at most three unknowns, so a grid over the one
   or two shapes sees every valley. Variables are centred at their geometric mean, which takes the
   condition of the problem from 10^11 to 10 or so.
3. The best starts go through Newton's method in all parameters, with analytic gradient and Hessian,
   damped and projected on the bounds, all of them at once in numpy.
4. Bootstraps are the same problem with other weights, so thousands run as one batch from the optimum.

The objective is sum_i w_i rho(r_i), with r the residual of log y (of y, for metrics) and rho Huber's
function, r^2/2 up to delta and linear beyond, or r^2/2 everywhere.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.laws import Array, Law

HUBER_DELTA = 1e-3  # of residuals of log loss, as Hoffmann et al. 2022
STARTS = {1: 48, 2: 14}  # grid points a shape, by the number of shapes
BEST_STARTS = 6
STEPS, TOLERANCE = 200, 1e-10  # of Newton's method; of the objective that another step would gain, relative
BOOTSTRAP_STEPS, BOOTSTRAP_TOLERANCE = 60, 1e-6  # far below what samples differ by
EXACT = 1e-10  # a residual that counts as none
AT_BOUND = 1e-6
MOST_CORRELATION = 0.98  # of two variables' logarithms; beyond, their exponents cannot be told apart
WORST_CONDITION = 1e13  # of the curvature in units of its diagonal
CHUNK = 128  # bootstraps that are worked on together: their arrays stay in the cache

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

    def where(self, keep: NDArray[np.bool_]) -> Data:
        return Data({name: values[keep] for name, values in self.x.items()}, self.y[keep], self.cell[keep])

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
class Fit:
    """A law fitted to data.

    status: converged, at a bound (then `reason` names the parameters), not converged, or
        unidentifiable (then there are no parameters).
    parameters: name → value. objective: of the optimum. huber: delta, or None for least squares.
    bootstrap: name → (B,) values of the bootstraps; empty if there were none.
    resampled: "seeds" or "cells", what the bootstraps drew.
    residuals: (cells,) of the cells' means, of log y or y.
    """

    law: Law
    data: Data
    status: str
    reason: str = ""
    parameters: dict[str, float] = field(default_factory=dict)
    objective: float = np.nan
    huber: float | None = None
    residuals: Array = field(default_factory=lambda: np.empty(0))
    bootstrap: dict[str, Array] = field(default_factory=dict)
    resampled: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether the curve means something (a parameter at its bound may not)."""
        return self.status in (CONVERGED, BOUND)

    def standard_errors(self) -> dict[str, float]:
        return {name: float(np.std(values, ddof=1)) for name, values in self.bootstrap.items()}

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        return quantiles(self.bootstrap[name], level)

    def predict(self, x: Mapping[str, ArrayLike]) -> Array:
        """The law at x (m,)."""
        return self.law.predict(x, self.parameters)

    def predict_bootstraps(self, x: Mapping[str, ArrayLike]) -> Array:
        """The bootstraps' laws at x: (B, m)."""
        points = {name: np.atleast_1d(np.asarray(values, dtype=float))[None] for name, values in x.items()}
        return self.law.predict(points, {name: values[:, None] for name, values in self.bootstrap.items()})

    def band(self, x: Mapping[str, ArrayLike], level: float = 0.95) -> tuple[Array, Array]:
        """Interval of the law itself at x: (m,), (m,)."""
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
        noise = deviation * np.random.default_rng(seed).standard_t(freedom, curves.shape)
        return _quantiles(curves * np.exp(noise) if self.law.is_log else curves + noise, level)

    def scatter(self, seeds: int = 1) -> tuple[float, int]:
        """Standard deviation of a new cell's mean over so many seeds about the law, and its degrees of freedom."""
        data, freedom = self.data, len(self.residuals) - self.law.num_parameters
        estimates = [(float(np.sqrt(np.sum(self.residuals**2) / max(freedom, 1))), max(freedom, 1))]
        within = len(data.y) - data.num_cells
        if within > 0:
            y = np.log(data.y) if self.law.is_log else data.y
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
        again = fit(self.law, self.data.cell_means(self.law.is_log), huber=None)
        if not again.is_usable:
            return np.nan
        squares = float(np.sum(again.residuals**2))
        if squares <= 0:
            return np.nan
        return n * np.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def quantiles(values: Array, level: float = 0.95) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _quantiles(values: Array, level: float) -> tuple[Array, Array]:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def fit(
    law: Law,
    data: Data,
    *,
    huber: float | None = HUBER_DELTA,
    bootstraps: int = 0,
    resample: str = "auto",
    seed: int = 0,
) -> Fit:
    """Fit a law to the means of cells, each with the weight of its seeds; see `Fit` for what comes back.

    huber: delta of the robust loss in units of the residual (log y; y for metrics), None for least squares
    bootstraps: how many, for intervals
    resample: "seeds" within each cell, "cells", or "auto": seeds where every cell has several and x is the same
        for all of them, else cells
    """
    means = data.cell_means(law.is_log)
    why = unidentifiable(law, means)
    if why:
        return Fit(law, data, UNIDENTIFIABLE, why, huber=huber)
    problem = _Problem(law, means, huber)
    weights = data.counts.astype(float)
    starts = problem.starts(weights)
    points, objectives, converged = problem.minimise(starts, np.tile(weights, (len(starts), 1)))
    best = int(np.argmin(objectives))
    point = points[best]
    status, reason = problem.status(point, bool(converged[best]))
    if status == UNIDENTIFIABLE:
        return Fit(law, data, status, reason, huber=huber)
    residuals = problem.residuals(point[None])[0]
    values = {name: float(value[0]) for name, value in problem.named(point[None]).items()}
    drawn: dict[str, Array] = {}
    if bootstraps:
        if resample == "auto":
            resample = "seeds" if (data.counts > 1).all() and "L" not in law.variables else "cells"
        rng = np.random.default_rng(seed)
        if resample == "seeds":
            draws, y = np.tile(weights, (bootstraps, 1)), draw_seeds(data, bootstraps, law.is_log, rng)
        elif resample == "cells":
            chosen = rng.multinomial(len(weights), np.full(len(weights), 1 / len(weights)), bootstraps)
            draws, y = chosen * weights, None
        else:
            raise ValueError(f"resample = {resample!r}: expected seeds, cells or auto")
        # The runner-up valley too: another sample may prefer it.
        order = np.argsort(objectives)
        others = [points[i] for i in order[1:] if not np.allclose(points[i], point, rtol=1e-3, atol=1e-6)][:1]
        drawn = problem.named(problem.minimise_all([point, *others], draws, y))
    return Fit(
        law,
        data,
        status,
        reason,
        values,
        float(objectives[best]),
        huber,
        residuals,
        drawn,
        resample if bootstraps else "",
    )


def draw_seeds(data: Data, bootstraps: int, is_log: bool, rng: np.random.Generator) -> Array:
    """Means of the cells (B, cells), each over seeds drawn again from its own.

    Of k seeds k - 1 are drawn, with replacement, which makes the variance of the mean unbiased for small k
    (Rao & Wu 1988); a cell's only seed stays as it is.
    """
    y = np.log(data.y) if is_log else np.asarray(data.y, dtype=float)
    means = np.empty((bootstraps, data.num_cells))
    for cell, k in enumerate(data.counts):
        seeds = y[data.codes == cell]
        if k == 1:
            means[:, cell] = seeds[0]
        else:
            means[:, cell] = seeds[rng.integers(k, size=(bootstraps, k - 1))].mean(axis=1)
    return np.exp(means) if is_log else means


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


# --- the problem in numbers ----------------------------------------------------------------


class _Problem:
    """One law, one set of rows, many weightings. Points p (B, P) are coefficients, then shapes."""

    def __init__(self, law: Law, data: Data, huber: float | None) -> None:
        self.law, self.huber = law, huber
        coordinates = law.coordinates(data.x)
        self.centres = {name: float(np.mean(values)) for name, values in coordinates.items()}
        columns = {name: values - self.centres[name] for name, values in coordinates.items()} | {"1": 1.0}
        self.y = np.asarray(data.y, dtype=float)
        self.log_y = np.log(self.y) if law.is_log else self.y
        self.scale = float(np.exp(np.mean(np.log(self.y)))) if law.is_log else 1.0
        self.n, self.K, self.T = len(self.y), len(law.terms), len(law.shapes)
        self.directions = np.zeros((self.K, self.T, self.n))
        for k, term in enumerate(law.terms):
            for shape, variable, factor in term.directions:
                self.directions[k, law.shapes.index(shape)] = factor * np.asarray(columns[variable])
        self.lower = np.array([-np.inf if t.coefficient in law.unbounded else 0.0 for t in law.terms])
        self.lower = np.concatenate([self.lower, [low for low, _ in law.bounds]])
        self.upper = np.concatenate([np.full(self.K, np.inf), [high for _, high in law.bounds]])

    def named(self, points: Array) -> dict[str, Array]:
        return self.law.named(points[:, : self.K], points[:, self.K :], self.centres)

    # values and derivatives

    def _links(self, shapes: Array, order: int) -> list[tuple[Array, ...]]:
        """Of each term: sign * link and its derivatives by z up to `order`, (B, n) each."""
        links: list[tuple[Array, ...]] = []
        for k, term in enumerate(self.law.terms):
            if term.link == "one":
                links.append((np.broadcast_to(np.float64(term.sign), (len(shapes), self.n)),))
                continue
            z = shapes @ self.directions[k]  # (B, n)
            if term.link == "exp":
                value = term.sign * np.exp(np.clip(z, -600, 600))
                links.append((value,) * (order + 1))
            else:
                s = 1 / (1 + np.exp(-np.clip(z, -600, 600)))
                first = s * (1 - s)
                both = (term.sign * s, term.sign * first, term.sign * first * (1 - 2 * s))
                links.append(both[: order + 1])
        return links

    def _predicted(self, points: Array, links: Sequence[tuple[Array, ...]]) -> Array:
        predicted = np.full((len(points), self.n), self.law.offset)
        for k, link in enumerate(links):
            predicted += points[:, k, None] * link[0]
        return predicted

    def _residual(self, predicted: Array, target: Array | None) -> Array:
        """target: y (B, n) of each point where it is not the data's, of its logarithm where residuals are."""
        if not self.law.is_log:
            return predicted - (self.y if target is None else target)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(predicted) - (self.log_y if target is None else target)

    def residuals(self, points: Array, target: Array | None = None) -> Array:
        return self._residual(self._predicted(points, self._links(points[:, self.K :], 0)), target)

    def _rho(self, residual: Array) -> Array:
        if self.huber is None:
            return residual**2 / 2
        size = np.abs(residual)
        inner = np.minimum(size, self.huber)
        return inner * (size - inner / 2)

    def objective(self, points: Array, weights: Array, target: Array | None = None) -> Array:
        """(B,); infinite where a predicted loss is not above 0."""
        total = np.einsum("bn,bn->b", weights, self._rho(self.residuals(points, target)))
        return np.where(np.isfinite(total), total, np.inf)

    def derivatives(
        self, points: Array, weights: Array, target: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Objective (B,), gradient (B, P), Hessian and robust Gauss-Newton matrix (B, P, P)."""
        K, T, B = self.K, self.T, len(points)
        links = self._links(points[:, K:], 2)
        predicted = self._predicted(points, links)
        residual = self._residual(predicted, target)
        psi = residual if self.huber is None else np.clip(residual, -self.huber, self.huber)
        objective = np.einsum("bn,bn->b", weights, self._rho(residual))
        jacobian = np.empty((B, K + T, self.n))
        jacobian[:, K:] = 0
        pull = weights * psi  # (B, n), of the objective by the residual
        if self.law.is_log:
            inverse = 1 / predicted
            pull_predicted = pull * inverse
        else:
            inverse = None
            pull_predicted = pull
        second = np.zeros((B, K + T, K + T))
        for k, link in enumerate(links):
            jacobian[:, k] = link[0]
            if len(link) == 1:
                continue
            slope = pull_predicted * link[1]  # (B, n)
            bend = pull_predicted * link[2] * points[:, k, None]
            for j in range(T):
                direction = self.directions[k, j]
                if not direction.any():
                    continue
                jacobian[:, K + j] += points[:, k, None] * link[1] * direction
                second[:, k, K + j] += slope @ direction
                for i in range(j + 1):
                    if self.directions[k, i].any():
                        second[:, K + i, K + j] += bend @ (direction * self.directions[k, i])
        upper = np.triu(second, 1)
        second = upper + np.swapaxes(upper, 1, 2) + second * np.eye(K + T)
        if inverse is not None:
            jacobian *= inverse[:, None]
        gradient = np.einsum("bpn,bn->bp", jacobian, pull)
        curvature = weights if self.huber is None else weights * (np.abs(residual) <= self.huber)
        size = np.maximum(np.abs(residual), 1e-300)
        robust = weights if self.huber is None else weights * np.minimum(1.0, self.huber / size)
        transposed = np.swapaxes(jacobian, 1, 2)
        if self.law.is_log:
            curvature = curvature - pull
        hessian = (jacobian * curvature[:, None]) @ transposed + second
        gauss_newton = (jacobian * robust[:, None]) @ transposed
        return objective, gradient, hessian, gauss_newton

    # starts by variable projection

    def starts(self, weights: Array) -> Array:
        """The best points (S, P) of a grid over the shapes, coefficients projected out."""
        axes = []
        for (low, high), name in zip(self.law.bounds, self.law.shapes, strict=True):
            count = STARTS[self.T]
            log_spaced = low > 0 and name != "shift"
            # not at the bounds themselves, where every step would be a projected one
            axes.append(np.geomspace(low * 1.5, high / 1.5, count) if log_spaced else np.linspace(low, high, count))
        shapes = np.array(list(itertools.product(*axes)))
        coefficients = self.projected(shapes, np.broadcast_to(weights, (len(shapes), self.n)))
        points = np.concatenate([coefficients, shapes], axis=1)
        objective = self.objective(points, np.broadcast_to(weights, (len(shapes), self.n)))
        return points[np.argsort(objective, kind="stable")[:BEST_STARTS]]

    def projected(self, shapes: Array, weights: Array, rounds: int = 4) -> Array:
        """The coefficients (B, K) for given shapes (B, T): reweighted non-negative least squares of relative residuals.

        With at most three coefficients all sets of them that may be 0 are tried, so it is exact.
        """
        basis = np.stack([np.broadcast_to(link[0], (len(shapes), self.n)) for link in self._links(shapes, 0)], axis=1)
        size = self.y if self.law.is_log else np.ones(self.n)
        basis, target = basis / size, (self.y - self.law.offset) / size
        robust = weights
        for _ in range(rounds if self.huber is not None else 1):
            coefficients = self._nonnegative(basis, target, robust)
            residual = np.abs(np.einsum("bk,bkn->bn", coefficients, basis) - target)
            if self.huber is not None:
                robust = weights * np.minimum(1.0, self.huber / np.maximum(residual, 1e-300))
        if self.law.is_log:  # a law of all zeros has no logarithm
            coefficients[:, 0] = np.where(coefficients.sum(axis=1) > 0, coefficients[:, 0], self.y.min() / 2)
        return coefficients

    def _nonnegative(self, basis: Array, target: Array, weights: Array) -> Array:
        weighted = basis * weights[:, None]
        normal = weighted @ np.swapaxes(basis, 1, 2)
        right = weighted @ target
        best = np.zeros(right.shape)
        lowest = np.zeros(len(best))
        free = self.lower[: self.K] < 0
        for count in range(1, self.K + 1):
            for support in itertools.combinations(range(self.K), count):
                chosen = list(support)
                part = normal[:, chosen][:, :, chosen] + 1e-13 * np.eye(count) * np.trace(normal[0]) / self.K
                solution = np.linalg.solve(part, right[:, chosen][..., None])[..., 0]
                # of sum w (basis c - target)^2, without its constant
                value = -np.einsum("bk,bk->b", solution, right[:, chosen])
                good = ((solution >= 0) | free[chosen]).all(axis=1) & (value < lowest)
                best[good] = 0
                best[np.ix_(good, chosen)] = solution[good]
                lowest[good] = value[good]
        return best

    # Newton's method on a batch

    @np.errstate(all="ignore")  # a step too far has no logarithm, and is refused for it
    def minimise(
        self,
        points: Array,
        weights: Array,
        target: Array | None = None,
        steps: int = STEPS,
        tolerance: float = TOLERANCE,
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """From points (B, P) under weights (B, n): points, objectives (B,), whether each has converged (B,)."""
        points = np.clip(points, self.lower, self.upper)
        done = np.zeros(len(points), dtype=bool)
        active = np.arange(len(points))
        damping = np.full(len(points), 1e-3)
        objective, gradient, hessian, gauss_newton = self.derivatives(points, weights, target)
        eye = np.eye(points.shape[1])
        for _ in range(steps):
            here = points[active]
            held = ((here <= self.lower) & (gradient > 0)) | ((here >= self.upper) & (gradient < 0))
            diagonal = np.einsum("bpp->bp", gauss_newton)
            scale = np.sqrt(np.maximum(diagonal, 1e-300))
            # in units in which the Gauss-Newton matrix has a unit diagonal, held parameters taken out
            slope = np.where(held, 0.0, gradient / scale)
            loose = ~held[:, :, None] & ~held[:, None, :]
            outer = scale[:, :, None] * scale[:, None, :]
            curved = np.where(loose, hessian / outer, 0.0) + eye * held[:, :, None]
            metric = np.where(loose, gauss_newton / outer, 0.0) + eye * held[:, :, None]
            gain = np.einsum("bp,bp->b", slope, _solved(metric + 1e-14 * eye, slope)) / 2
            finished = gain <= tolerance * objective + self.n * EXACT**2
            done[active[finished]] = True
            keep = ~finished & (damping[active] < 1e9)
            if not keep.any():
                break
            active, here = active[keep], here[keep]
            objective, gradient, hessian = objective[keep], gradient[keep], hessian[keep]
            gauss_newton, scale, slope, curved = gauss_newton[keep], scale[keep], slope[keep], curved[keep]
            step = -_solved(curved + damping[active, None, None] * eye, slope) / scale
            candidate = np.clip(here + step, self.lower, self.upper)
            new = self.derivatives(candidate, weights[active], None if target is None else target[active])
            better = new[0] < objective  # nan is not
            points[active[better]] = candidate[better]
            damping[active] = np.where(better, damping[active] / 5, damping[active] * 4)
            stuck = ~better & (np.abs(step) <= 1e-13 * (np.abs(here) + 1e-13)).all(axis=1)
            damping[active[stuck]] = np.inf
            objective = np.where(better, new[0], objective)
            gradient = np.where(better[:, None], new[1], gradient)
            hessian = np.where(better[:, None, None], new[2], hessian)
            gauss_newton = np.where(better[:, None, None], new[3], gauss_newton)
        return points, self.objective(points, weights, target), done

    def minimise_all(self, starts: Sequence[Array], weights: Array, y: Array | None = None) -> Array:
        """The best point (B, P) of each sample, over the starts; in threads, chunk by chunk.

        weights (B, n); y (B, n) of each sample where it is not the data's
        """
        target = None if y is None else np.log(y) if self.law.is_log else y

        def one(chunk: slice) -> Array:
            sample = weights[chunk], None if target is None else target[chunk]
            count = len(sample[0])
            end = BOOTSTRAP_STEPS, BOOTSTRAP_TOLERANCE
            results = [self.minimise(np.repeat(start[None], count, axis=0), *sample, *end) for start in starts]
            best = np.argmin([objective for _, objective, _ in results], axis=0)
            return np.stack([points for points, _, _ in results])[best, np.arange(count)]

        chunks = [slice(first, first + CHUNK) for first in range(0, len(weights), CHUNK)]
        with ThreadPoolExecutor(_num_threads()) as pool:
            return np.concatenate(list(pool.map(one, chunks)))

    def status(self, point: Array, converged: bool) -> tuple[str, str]:
        """What the optimum is worth, and why."""
        _, _, _, gauss_newton = self.derivatives(point[None], np.ones((1, self.n)))
        matrix = gauss_newton[0]
        names = [*(term.coefficient for term in self.law.terms), *self.law.shapes]
        low = point - self.lower <= AT_BOUND * np.where(np.arange(len(point)) < self.K, self.scale, 1.0)
        high = np.isfinite(self.upper) & (point >= self.upper * (1 - AT_BOUND))
        bounded = [name for name, is_low, is_high in zip(names, low, high, strict=True) if is_low or is_high]
        free = np.flatnonzero(~(low | high))
        scale = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
        part = (matrix / np.outer(scale, scale))[np.ix_(free, free)]
        if np.diag(matrix)[free].min(initial=np.inf) <= 0 or (len(free) and np.linalg.cond(part) > WORST_CONDITION):
            return UNIDENTIFIABLE, "the cells do not determine the law: different parameters fit them equally well"
        if bounded:
            values = dict(zip(names, point, strict=True))
            told = ", ".join(f"{name} = {values[name]:.3g}" for name in bounded)
            return BOUND, f"{told}: the cells show no other end of it"
        return (CONVERGED, "") if converged else (UNFINISHED, f"no optimum within {STEPS} steps")


def _solved(matrices: Array, vectors: Array) -> Array:
    """Solutions (B, P) of (B, P, P) x = (B, P); zeros where a matrix is singular."""
    try:
        return np.asarray(np.linalg.solve(matrices, vectors[..., None])[..., 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        rows: list[Array] = [np.linalg.lstsq(m, v, rcond=None)[0] for m, v in zip(matrices, vectors, strict=True)]
        return np.stack(rows)


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parameter_row(fitted: Fit, name: str, level: float = 0.95) -> dict[str, Any]:
    """A parameter with its standard error and interval, for a table."""
    row: dict[str, Any] = {"parameter": name, "value": fitted.parameters.get(name, np.nan)}
    if name in fitted.bootstrap:
        low, high = fitted.interval(name, level)
        row |= {"standard_error": fitted.standard_errors()[name], "low": low, "high": high}
    return row
