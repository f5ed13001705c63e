"""Scaling laws: how loss and metrics depend on size, data and compute.

First the laws as plain functions of their named parameters, vectorised over numpy arrays; then
the same laws in the form that `analysis.fit` fits: a sum of terms whose coefficients enter linearly,

    y(x) = offset + sum_k  coefficient_k * sign_k * link(z_k),      z_k = sum_j shape_j * v_kj(x)

with link one of 1, exp and the logistic function, coefficients >= 0 and shapes within bounds. All
power laws are of that form, x^-alpha = exp(-alpha log x), and so have derivatives of any order.

Sources: L(N), L(D), L(C) Kaplan et al. 2020 (arXiv 2001.08361), with the irreducible term of
Henighan et al. 2020 (arXiv 2010.14701); L(N, D) Hoffmann et al. 2022 (arXiv 2203.15556), eq. 2;
error from loss Gadre et al. 2024 (arXiv 2403.08540), eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# --- the laws ------------------------------------------------------------------------------


def power_law(x: ArrayLike, *, E: float, A: float, alpha: float) -> Array:
    """L(x) = E + A / x^alpha: loss against size, data or compute, above what no amount of x removes."""
    return E + A * np.asarray(x, dtype=float) ** -alpha


def joint_law(n: ArrayLike, d: ArrayLike, *, E: float, A: float, alpha: float, B: float, beta: float) -> Array:
    """L(N, D) = E + A / N^alpha + B / D^beta."""
    return E + A * np.asarray(n, dtype=float) ** -alpha + B * np.asarray(d, dtype=float) ** -beta


def saturating_law(x: ArrayLike, *, ceiling: float, k: float, gamma: float) -> Array:
    """m(x) = ceiling - k / x^gamma, of a metric that is bounded above."""
    return ceiling - k * np.asarray(x, dtype=float) ** -gamma


def sigmoid_law(x: ArrayLike, *, floor: float, span: float, slope: float, midpoint: float) -> Array:
    """m(x) = floor + span / (1 + (midpoint / x)^slope): a logistic function of log x."""
    return floor + span / (1 + (midpoint / np.asarray(x, dtype=float)) ** slope)


def metric_from_loss(loss: ArrayLike, *, floor: float, k: float, gamma: float) -> Array:
    """m(L) = floor + k exp(-gamma L): the error, some ceiling minus m, is epsilon - k exp(-gamma L)."""
    return floor + k * np.exp(-gamma * np.asarray(loss, dtype=float))


# --- the same in the form that is fitted ---------------------------------------------------

EXPONENTS = (0.01, 3.0)  # a power outside of these is no scaling law that this range of x could show


@dataclass(frozen=True)
class Term:
    """coefficient * sign * link(sum_j shape_j * v_j(x)).

    link: "one", "exp" or "logistic"; directions: (shape, variable, factor) of each shape that it depends on, for
    v_j = factor * (log variable - centre), or v_j = factor where the variable is "1".
    """

    coefficient: str
    link: str = "one"
    sign: float = 1.0
    directions: tuple[tuple[str, str, float], ...] = ()


@dataclass(frozen=True)
class Law:
    """A family of curves: see the module. `function` is the law as written, of its `parameters`.

    shown_as: (shape, parameter) of each shape that is no parameter, but with others determines one.
    """

    name: str
    formula: str
    variables: tuple[str, ...]
    terms: tuple[Term, ...]
    shapes: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]  # of the shapes
    function: Callable[..., Array]
    parameters: tuple[str, ...]
    named: Callable[[Array, Array, Mapping[str, float]], dict[str, Array]]
    has_log_residuals: bool = True  # residuals are of log y
    offset: float = 0.0
    unbounded: tuple[str, ...] = ()  # coefficients that may be negative
    shown_as: tuple[tuple[str, str], ...] = ()

    @property
    def num_parameters(self) -> int:
        return len(self.terms) + len(self.shapes)

    def coordinates(self, x: Mapping[str, Array]) -> dict[str, Array]:
        """The variables as the terms see them: logarithms, or the variables themselves."""
        return {
            name: np.log(np.asarray(x[name], dtype=float)) if name != "L" else np.asarray(x[name], dtype=float)
            for name in self.variables
        }

    def predict(self, x: Mapping[str, ArrayLike], parameters: Mapping[str, ArrayLike]) -> Array:
        """The law at x; parameters that are arrays (B, 1) give (B, n)."""
        return self.function(*(np.asarray(x[name], dtype=float) for name in self.variables), **parameters)


def _named_power(amplitudes: Sequence[tuple[str, str, str]], constant: str) -> Callable[..., dict[str, Array]]:
    """Named parameters of a law whose terms are powers of centred variables."""

    def named(coefficients: Array, shapes: Array, centres: Mapping[str, float]) -> dict[str, Array]:
        values = {}
        first = 0
        if constant:
            values[constant], first = coefficients[..., 0], 1
        for number, (amplitude, exponent, variable) in enumerate(amplitudes):
            power = shapes[..., number]
            # c exp(-p (u - u0)) = (c exp(p u0)) exp(-p u)
            with np.errstate(over="ignore"):
                values[amplitude] = coefficients[..., first + number] * np.exp(power * centres[variable])
            values[exponent] = power
        return values

    return named


def loss_law(variable: str) -> Law:
    """L(variable) = E + A / variable^alpha."""
    return Law(
        name=f"L({variable})",
        formula=f"E + A / {variable}^alpha",
        variables=(variable,),
        terms=(Term("E"), Term("A", "exp", 1.0, (("alpha", variable, -1.0),))),
        shapes=("alpha",),
        bounds=(EXPONENTS,),
        function=power_law,
        parameters=("E", "A", "alpha"),
        named=_named_power([("A", "alpha", variable)], "E"),
    )


def joint_loss_law() -> Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""
    return Law(
        name="L(N, D)",
        formula="E + A / N^alpha + B / D^beta",
        variables=("N", "D"),
        terms=(
            Term("E"),
            Term("A", "exp", 1.0, (("alpha", "N", -1.0),)),
            Term("B", "exp", 1.0, (("beta", "D", -1.0),)),
        ),
        shapes=("alpha", "beta"),
        bounds=(EXPONENTS, EXPONENTS),
        function=joint_law,
        parameters=("E", "A", "alpha", "B", "beta"),
        named=_named_power([("A", "alpha", "N"), ("B", "beta", "D")], "E"),
    )


def metric_law(variable: str, ceiling: float | None = None) -> Law:
    """m(variable) = ceiling - k / variable^gamma, the ceiling free or fixed."""
    power = Term("k", "exp", -1.0, (("gamma", variable, -1.0),))
    named = _named_power([("k", "gamma", variable)], "ceiling" if ceiling is None else "")

    def function(x: ArrayLike, **parameters: float) -> Array:
        return saturating_law(x, **({} if ceiling is None else {"ceiling": ceiling}) | parameters)

    return Law(
        name=f"m({variable}), ceiling {'free' if ceiling is None else f'{ceiling:g}'}",
        formula=f"{'ceiling' if ceiling is None else f'{ceiling:g}'} - k / {variable}^gamma",
        variables=(variable,),
        terms=(Term("ceiling"), power) if ceiling is None else (power,),
        shapes=("gamma",),
        bounds=(EXPONENTS,),
        function=function,
        parameters=(*(("ceiling",) if ceiling is None else ()), "k", "gamma"),
        named=named,
        has_log_residuals=False,
        offset=ceiling or 0.0,
        unbounded=("ceiling",) if ceiling is None else (),
    )


def metric_sigmoid(variable: str, ceiling: float | None = None) -> Law:
    """m(variable) = floor + span / (1 + (midpoint / variable)^slope), floor + span free or fixed at the ceiling."""

    def named(coefficients: Array, shapes: Array, centres: Mapping[str, float]) -> dict[str, Array]:
        slope, shift = shapes[..., 0], shapes[..., 1]
        midpoint = np.exp(np.clip(centres[variable] - shift / slope, -700, 700))
        if ceiling is None:
            return {"floor": coefficients[..., 0], "span": coefficients[..., 1], "slope": slope, "midpoint": midpoint}
        return {"span": coefficients[..., 0], "slope": slope, "midpoint": midpoint}

    def function(x: ArrayLike, *, span: float, slope: float, midpoint: float, floor: float | None = None) -> Array:
        low = ceiling - span if floor is None and ceiling is not None else floor
        assert low is not None
        return sigmoid_law(x, floor=low, span=span, slope=slope, midpoint=midpoint)

    directions = (("slope", variable, 1.0), ("shift", "1", 1.0))
    rise = Term("span", "logistic", 1.0, directions)
    # span (s(z) - 1) = -span s(-z): below a fixed ceiling
    below = Term("span", "logistic", -1.0, (("slope", variable, -1.0), ("shift", "1", -1.0)))
    return Law(
        name=f"sigmoid in log {variable}, ceiling {'free' if ceiling is None else f'{ceiling:g}'}",
        formula=f"{'floor + span' if ceiling is None else f'{ceiling:g} - span + span'} "
        f"/ (1 + (midpoint / {variable})^slope)",
        variables=(variable,),
        terms=(Term("floor"), rise) if ceiling is None else (below,),
        shapes=("slope", "shift"),
        bounds=(EXPONENTS, (-8.0, 8.0)),
        function=function,
        parameters=(*(("floor",) if ceiling is None else ()), "span", "slope", "midpoint"),
        named=named,
        has_log_residuals=False,
        offset=ceiling or 0.0,
        unbounded=("floor",) if ceiling is None else (),
        shown_as=(("shift", "midpoint"),),
    )


def metric_loss_law(spread: float) -> Law:
    """m(L) = floor + k exp(-gamma L).

    spread: standard deviation of the losses, by which gamma is bounded: beyond some rises by e^10 there is no curve
    """

    def named(coefficients: Array, shapes: Array, centres: Mapping[str, float]) -> dict[str, Array]:
        gamma = shapes[..., 0]
        k = coefficients[..., 1] * np.exp(np.clip(gamma * centres["L"], -700, 700))
        return {"floor": coefficients[..., 0], "k": k, "gamma": gamma}

    scale = max(spread, 1e-12)
    return Law(
        name="m(L)",
        formula="floor + k exp(-gamma L)",
        variables=("L",),
        terms=(Term("floor"), Term("k", "exp", 1.0, (("gamma", "L", -1.0),))),
        shapes=("gamma",),
        bounds=((1e-2 / scale, 10 / scale),),
        function=metric_from_loss,
        parameters=("floor", "k", "gamma"),
        named=named,
        has_log_residuals=False,
        unbounded=("floor",),
    )
