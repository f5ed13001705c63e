"""A law's fit as a problem in numbers: objective, derivatives, where to start, and Newton's method in batches.

The objective is sum_i w_i rho(r_i), with r the residual of log y (of y, for metrics) and rho Huber's
function, r^2/2 up to delta and linear beyond, or r^2/2 everywhere. Bootstraps are the same problem with
other weights or other y, so everything here works on a batch of points, one row each.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from analysis.laws import Array, Law
from analysis.workers import num_cores

STARTS = {1: 48, 2: 14}  # grid points a shape, by the number of shapes
BEST_STARTS = 6
REWEIGHTINGS = 4
STEPS, TOLERANCE = 200, 1e-10  # of Newton's method; of the objective that another step would gain, relative
BOOTSTRAP_STEPS, BOOTSTRAP_TOLERANCE = 300, 1e-6  # far below what samples differ by
MOST_UNFINISHED = 0.05  # of the bootstraps: beyond, those that found no optimum make the intervals too narrow
EXACT = 1e-10  # a residual that counts as none
AT_BOUND = 1e-6
WORST_CONDITION = 1e13  # of the curvature in units of its diagonal
CHUNK = 128  # bootstraps that are worked on together: their arrays stay in the cache


class Problem:
    """One law, one set of rows, many weightings. Points p (B, P) are coefficients, then shapes."""

    def __init__(self, law: Law, x: Mapping[str, Array], y: Array, huber: float | None) -> None:
        self.law, self.huber = law, huber
        coordinates = law.coordinates(x)
        self.centres = {name: float(np.mean(values)) for name, values in coordinates.items()}
        columns = {name: values - self.centres[name] for name, values in coordinates.items()} | {"1": 1.0}
        self.y = np.asarray(y, dtype=float)
        self.log_y = np.log(self.y) if law.has_log_residuals else self.y
        self.scale = float(np.exp(np.mean(np.log(self.y)))) if law.has_log_residuals else 1.0
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
        if not self.law.has_log_residuals:
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
        if self.law.has_log_residuals:
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
        if self.law.has_log_residuals:
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

    def projected(self, shapes: Array, weights: Array) -> Array:
        """The coefficients (B, K) for given shapes (B, T): reweighted non-negative least squares of relative residuals.

        With at most three coefficients all sets of them that may be 0 are tried, so it is exact.
        """
        basis = np.stack([np.broadcast_to(link[0], (len(shapes), self.n)) for link in self._links(shapes, 0)], axis=1)
        size = self.y if self.law.has_log_residuals else np.ones(self.n)
        basis, target = basis / size, (self.y - self.law.offset) / size
        robust = weights
        for _ in range(REWEIGHTINGS if self.huber is not None else 1):
            coefficients = self._nonnegative(basis, target, robust)
            residual = np.abs(np.einsum("bk,bkn->bn", coefficients, basis) - target)
            if self.huber is not None:
                robust = weights * np.minimum(1.0, self.huber / np.maximum(residual, 1e-300))
        if self.law.has_log_residuals:  # a law of all zeros has no logarithm
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

    def minimise_all(self, starts: Sequence[Array], weights: Array, y: Array | None = None) -> tuple[Array, float]:
        """The best point (B, P) of each sample, over the starts, and the share of samples that found no optimum.

        weights (B, n); y (B, n) of each sample where it is not the data's. In threads, chunk by chunk; where far too
        many of the first chunk find none, only that.
        """
        target = None if y is None else np.log(y) if self.law.has_log_residuals else y

        def one(chunk: slice) -> tuple[Array, NDArray[np.bool_]]:
            sample = weights[chunk], None if target is None else target[chunk]
            count = len(sample[0])
            end = BOOTSTRAP_STEPS, BOOTSTRAP_TOLERANCE
            results = [self.minimise(np.repeat(start[None], count, axis=0), *sample, *end) for start in starts]
            best = np.argmin([objective for _, objective, _ in results], axis=0), np.arange(count)
            return np.stack([points for points, *_ in results])[best], np.stack([done for *_, done in results])[best]

        first, *others = [slice(first, first + CHUNK) for first in range(0, len(weights), CHUNK)]
        found = [one(first)]
        if np.mean(~found[0][1]) <= 2 * MOST_UNFINISHED:
            with ThreadPoolExecutor(num_cores()) as pool:
                found += pool.map(one, others)
        points, done = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return points, float(np.mean(~done))

    def at_bounds(self, point: Array) -> dict[str, float]:
        """The law's parameters that stopped, at a point (P,), at the end of their range, and where."""
        shown_as, named = dict(self.law.shown_as), self.named(point[None])
        names = [*(term.coefficient for term in self.law.terms), *(shown_as.get(s, s) for s in self.law.shapes)]
        return {name: float(named[name][0]) for name, held in zip(names, self._held(point), strict=True) if held}

    def free_shapes(self, point: Array) -> NDArray[np.intp]:
        """Which shapes of a point (P,) are neither at their bounds nor of terms that are 0."""
        held = self._held(point)
        used = {
            shape
            for term, is_zero in zip(self.law.terms, held, strict=False)
            if not is_zero
            for shape, *_ in term.directions
        }
        return np.array(
            [t for t, shape in enumerate(self.law.shapes) if shape in used and not held[self.K + t]], dtype=np.intp
        )

    def is_determined(self, point: Array) -> bool:
        """Whether the rows fix all parameters of a point (P,) that are not at their bounds."""
        _, _, _, gauss_newton = self.derivatives(point[None], np.ones((1, self.n)))
        diagonal = np.diag(gauss_newton[0])
        free = np.flatnonzero(~self._held(point))
        scale = np.sqrt(np.maximum(diagonal, 1e-300))
        part = (gauss_newton[0] / np.outer(scale, scale))[np.ix_(free, free)]
        if not len(free):
            return True
        return bool(diagonal[free].min() > 0 and np.linalg.cond(part) <= WORST_CONDITION)

    def _held(self, point: Array) -> NDArray[np.bool_]:
        unit = np.where(np.arange(len(point)) < self.K, self.scale, 1.0)
        low = point - self.lower <= AT_BOUND * unit
        return low | (np.isfinite(self.upper) & (point >= self.upper * (1 - AT_BOUND)))


def _solved(matrices: Array, vectors: Array) -> Array:
    """Solutions (B, P) of (B, P, P) x = (B, P); zeros where a matrix is singular."""
    try:
        return np.asarray(np.linalg.solve(matrices, vectors[..., None])[..., 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        rows: list[Array] = [np.linalg.lstsq(m, v, rcond=None)[0] for m, v in zip(matrices, vectors, strict=True)]
        return np.stack(rows)
