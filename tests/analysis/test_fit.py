"""Fits find the published optimum, recover what made the data, and refuse what data cannot tell."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import approx_fprime, minimize

from analysis.fit import BOUND, CONVERGED, UNIDENTIFIABLE, Data, draw_seeds, fit
from analysis.laws import (
    Law,
    joint_law,
    joint_loss_law,
    loss_law,
    metric_law,
    metric_loss_law,
    metric_sigmoid,
    power_law,
    saturating_law,
)
from analysis.problem import Problem

# Read aside, never copied: it carries no licence (github.com/epoch-research/analyzing-chinchilla).
CHINCHILLA = Path(__file__).parents[3] / "shared" / "data" / "chinchilla_points.csv"
LAWS = [loss_law("N"), joint_loss_law(), metric_law("N"), metric_law("N", 4.64), metric_sigmoid("N")]
LAWS += [metric_sigmoid("N", 4.64), metric_loss_law(0.02)]


def chinchilla(rows: int | None = -5) -> Data:
    """Points read off Hoffmann et al.'s figure, without the five highest losses."""
    path = Path(os.environ.get("CHINCHILLA_POINTS", CHINCHILLA))
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{path} is missing: CI needs the Chinchilla points (CHINCHILLA_POINTS=FILE)")
        pytest.skip(f"needs the Chinchilla points at {path}, or CHINCHILLA_POINTS=FILE")
    points = pd.read_csv(path).sort_values("loss", kind="stable")[:rows]
    n = points["Model Size"].to_numpy(float)
    return Data({"N": n, "D": points["Training FLOP"] / (6 * n)}, points["loss"].to_numpy(), np.arange(len(n)))


def grid(noise: float = 0.0, seeds: int = 1, rng: np.random.Generator | None = None) -> Data:
    """N and D varied independently of each other: 6 x 5 cells of a known law."""
    n, d, _ = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(1, 100, 5), range(seeds)))
    y = joint_law(n, d, E=0.02, A=0.9, alpha=0.25, B=0.03, beta=0.5)
    scatter = np.zeros(len(n)) if rng is None else rng.normal(0, noise, len(n))
    return Data({"N": n, "D": d}, y * np.exp(scatter), np.array([f"{a}/{b}" for a, b in zip(n, d, strict=True)]))


def some(law: Law) -> Data:
    rng = np.random.default_rng(1)
    x = {"N": np.geomspace(1e8, 1e10, 9), "D": rng.permutation(np.geomspace(1, 50, 9)), "L": np.linspace(0.02, 0.08, 9)}
    y = rng.uniform(1.0, 3.0, 9)
    return Data({name: x[name] for name in law.variables}, y, np.arange(9))


# --- the arithmetic ------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("huber", [None, 0.1])
def test_gradient_and_hessian_are_the_derivatives_of_the_objective(law: Law, huber: float | None):
    problem = Problem(law, some(law).x, some(law).y, huber)
    weights = np.random.default_rng(0).uniform(0.5, 2, (1, 9))
    shapes = [1.3 * low if low > 0 else 0.4 for low, _ in law.bounds]
    point = np.array([0.8 / (1 + k) for k in range(problem.K)] + shapes)
    _, gradient, hessian, _ = problem.derivatives(point[None], weights)

    def slope(p: np.ndarray) -> np.ndarray:
        return problem.derivatives(p[None], weights)[1][0]

    numeric = approx_fprime(point, lambda p: problem.objective(p[None], weights)[0], 1e-7)
    np.testing.assert_allclose(gradient[0], numeric, rtol=2e-4, atol=1e-5 * np.abs(numeric).max())
    numeric = approx_fprime(point, slope, 1e-7)
    np.testing.assert_allclose(hessian[0], numeric, rtol=2e-4, atol=1e-4 * np.abs(numeric).max())


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_fitted_form_is_the_law_as_written(law: Law):
    data = some(law)
    problem = Problem(law, data.x, data.y, None)
    shapes = [1.3 * low if low > 0 else 0.4 for low, _ in law.bounds]
    points = np.array([[0.8 / (1 + k) for k in range(problem.K)] + shapes])
    fitted = problem._predicted(points, problem._links(points[:, problem.K :], 0))[0]
    named = {name: float(value[0]) for name, value in problem.named(points).items()}
    assert set(named) == set(law.parameters)
    np.testing.assert_allclose(law.predict(data.x, named), fitted, rtol=1e-9)


# --- published figures ---------------------------------------------------------------------


def test_the_chinchilla_points_give_the_published_optimum_and_standard_errors():
    fitted = fit(joint_loss_law(), chinchilla(), bootstraps=4000)
    assert fitted.status == CONVERGED
    assert fitted.objective == pytest.approx(1.018274e-3, rel=1e-6)
    found = fitted.parameters
    assert found["E"] == pytest.approx(1.81724, abs=1e-4)
    assert found["alpha"] == pytest.approx(0.34731, abs=1e-4)
    assert found["beta"] == pytest.approx(0.36718, abs=1e-4)
    assert found["A"] == pytest.approx(477.84, rel=1e-3)
    assert found["B"] == pytest.approx(2143.9, rel=2e-3)
    errors = fitted.standard_errors()
    for name, published in {"E": 0.0257, "alpha": 0.0154, "beta": 0.0206}.items():
        assert errors[name] == pytest.approx(published, rel=0.05), name
    assert fitted.interval("alpha") == pytest.approx((0.317, 0.373), abs=0.003)


def test_all_of_the_chinchilla_points_give_another_law_so_exclusions_matter():
    found = fit(joint_loss_law(), chinchilla(None)).parameters
    assert found["E"] == pytest.approx(1.8913, abs=1e-3)
    assert found["B"] == pytest.approx(12845.6, rel=2e-3)


def test_no_general_purpose_optimiser_finds_a_better_bootstrap():
    data = chinchilla()
    problem = Problem(joint_loss_law(), data.x, data.y, 1e-3)
    weights = np.random.default_rng(3).multinomial(240, np.full(240, 1 / 240), 4).astype(float)
    start = problem.starts(np.ones(len(data.y)))[0]
    found, unfinished = problem.minimise_all([start], weights)
    assert unfinished == 0
    for point, weight in zip(found, weights, strict=True):
        ours = problem.objective(point[None], weight[None])[0]

        def objective(p: np.ndarray, w: np.ndarray = weight) -> float:
            return float(problem.objective(p[None], w[None])[0]) * 1e3

        theirs = minimize(objective, point, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).fun / 1e3
        assert ours <= theirs * (1 + 1e-6)


# --- known laws ----------------------------------------------------------------------------


def test_what_made_the_data_is_recovered():
    fitted = fit(joint_loss_law(), grid())
    assert fitted.status == CONVERGED
    expected = {"E": 0.02, "A": 0.9, "alpha": 0.25, "B": 0.03, "beta": 0.5}
    assert fitted.parameters == pytest.approx(expected, rel=1e-4)
    x = np.geomspace(1e8, 1e10, 8)
    loss = fit(loss_law("N"), Data({"N": x}, power_law(x, E=0.03, A=2.0, alpha=0.2), np.arange(8)))
    assert loss.parameters == pytest.approx({"E": 0.03, "A": 2.0, "alpha": 0.2}, rel=1e-4)
    m = saturating_law(x, ceiling=3.3, k=900.0, gamma=0.35)
    metric = fit(metric_law("N"), Data({"N": x}, m, np.arange(8)), huber=None)
    assert metric.parameters == pytest.approx({"ceiling": 3.3, "k": 900.0, "gamma": 0.35}, rel=1e-4)


def test_one_wild_cell_moves_the_robust_fit_less_than_least_squares():
    data = grid(0.002, 3, np.random.default_rng(0))
    y = data.y.copy()
    y[:3] *= 1.5
    wild = Data(data.x, y, data.cell)
    robust, squares = (abs(fit(joint_loss_law(), wild, huber=h).parameters["alpha"] - 0.25) for h in (1e-3, None))
    assert robust < 0.02 < squares


def test_intervals_cover_what_made_the_data():
    rng = np.random.default_rng(5)
    truth = power_law(2e10, E=0.02, A=0.9, alpha=0.25)
    hits, predictions, trials = 0, 0, 60
    x = np.repeat(np.geomspace(1e8, 1e10, 7), 5)
    for trial in range(trials):
        y = power_law(x, E=0.02, A=0.9, alpha=0.25) * np.exp(rng.normal(0, 0.01, len(x)))
        fitted = fit(loss_law("N"), Data({"N": x}, y, x), huber=None, bootstraps=200, seed=trial)
        assert fitted.bootstraps.resampled == "seeds"
        low, high = fitted.band({"N": [2e10]})
        hits += bool(low[0] <= truth <= high[0])
        low, high = fitted.prediction_interval({"N": [2e10]})
        predictions += bool(low[0] <= truth * np.exp(rng.normal(0, 0.01)) <= high[0])
    assert 0.85 <= hits / trials <= 1.0
    assert 0.85 <= predictions / trials <= 1.0


def test_seeds_are_drawn_about_their_cells_with_the_variance_of_all_and_students_tails():
    y = np.concatenate([np.random.default_rng(1).normal(mean, 0.1, 3) for mean in (1, 2, 4, 8)])
    data = Data({"N": np.ones(12)}, y, np.repeat(list("abcd"), 3))
    means = draw_seeds(data, 40_000, False, np.random.default_rng(0))
    assert means.shape == (40_000, 4)
    assert means.mean(axis=0) == pytest.approx(y.reshape(4, 3).mean(axis=1), rel=0.01)
    pooled = y.reshape(4, 3).var(axis=1, ddof=1).mean()
    assert means.var(axis=0) == pytest.approx(np.full(4, pooled / 3 * 8 / (8 - 2)), rel=0.05)  # of t with 8 degrees
    logs = draw_seeds(data, 40_000, True, np.random.default_rng(0))
    assert np.log(logs).mean(axis=0) == pytest.approx(np.log(y).reshape(4, 3).mean(axis=1), abs=0.01)


def test_more_seeds_of_the_same_noise_narrow_the_interval():
    widths = []
    for seeds in (2, 32):
        fitted = fit(joint_loss_law(), grid(0.01, seeds, np.random.default_rng(2)), huber=None, bootstraps=300)
        low, high = fitted.interval("alpha")
        widths.append(high - low)
    assert widths[1] < widths[0] / 2.5


def test_a_standard_error_is_the_spread_of_the_bootstraps_with_what_the_law_misses():
    """Cells 3 % off their law, seeds 0.3 % apart; then the same without seeds, of which bootstraps draw the cells."""
    rng = np.random.default_rng(0)
    x = np.repeat(np.geomspace(1e8, 1e10, 8), 3)
    y = power_law(x, E=0.02, A=0.9, alpha=0.25) * np.exp(np.repeat(rng.normal(0, 0.03, 8), 3))
    seeds = fit(loss_law("N"), Data({"N": x}, y * np.exp(rng.normal(0, 0.003, 24)), x), huber=None, bootstraps=100)
    cells = fit(loss_law("N"), Data({"N": x[::3]}, y[::3], x[::3]), huber=None, bootstraps=100)
    assert seeds.lack_of_fit is not None
    assert seeds.lack_of_fit[0] > 50
    for fitted, squared in ((seeds, seeds.lack_of_fit[0]), (cells, 8 / (8 - 3))):
        spread = np.std(fitted.bootstraps.values["alpha"], ddof=1)
        assert fitted.standard_errors()["alpha"] == pytest.approx(squared**0.5 * spread, rel=1e-9)


# --- what data cannot tell -----------------------------------------------------------------


def test_too_few_or_collinear_cells_are_unidentifiable_and_give_no_number():
    few = Data({"N": np.array([1e8, 1e8, 1e9, 1e10])}, np.array([0.31, 0.32, 0.25, 0.22]), np.array([0, 0, 1, 2]))
    fitted = fit(loss_law("N"), few, bootstraps=10)
    assert (fitted.status, fitted.parameters, fitted.bootstraps.values) == (UNIDENTIFIABLE, {}, {})
    assert fitted.reason == "3 distinct points of N for 3 parameters; at least 4 are needed"
    n = np.geomspace(1e8, 1e10, 8)
    y = joint_law(n, n / 1e8, E=0.02, A=0.9, alpha=0.25, B=0.03, beta=0.5)
    together = fit(joint_loss_law(), Data({"N": n, "D": n / 1e8}, y, np.arange(8)))
    assert together.status == UNIDENTIFIABLE
    assert "N and D go together (correlation of logarithms +1.000)" in together.reason
    grown = grid()
    low = grown.x["D"] < 5
    x = {name: values[low] for name, values in grown.x.items()}
    levels = fit(joint_loss_law(), Data(x, grown.y[low], grown.cell[low]))
    assert levels.reason == "D has 2 levels; a power law and its limit need at least 3"


def test_a_flat_valley_gives_no_number():
    """Pairs of cells at one point, of which Huber's loss sees the middle alone: many exponents fit as well."""
    n, d = (axis.ravel() for axis in np.meshgrid([6e7, 2.4e8, 5.4e8], [10.0, 30.0, 100.0, 300.0]))
    y = joint_law(n, d, E=0.02, A=26.0, alpha=0.4, B=0.06, beta=0.45)
    data = Data({"N": np.tile(n, 2), "D": np.tile(d, 2)}, np.concatenate([y, 1.3 * y]), np.arange(24))
    fitted = fit(joint_loss_law(), data)
    assert fitted.status == UNIDENTIFIABLE
    assert "different parameters fit them equally well" in fitted.reason


def test_a_parameter_at_its_bound_is_named():
    x = np.geomspace(1e8, 1e10, 8)
    falling = Data({"N": x}, 5 * x**-0.2 * (1 - 0.02 * np.log10(x / 1e8)), np.arange(8))
    fitted = fit(loss_law("N"), falling)
    assert fitted.status == BOUND
    assert fitted.reason.startswith("E = 0")
    rising = fit(loss_law("N"), Data({"N": x}, 0.1 + 0.01 * np.log10(x), np.arange(8)))
    assert rising.status in (BOUND, UNIDENTIFIABLE), "a loss that rises with size has no falling power law"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_whatever_stops_at_a_bound_is_named_as_a_parameter_of_the_law_with_its_value(law: Law):
    problem = Problem(law, some(law).x, some(law).y, None)
    point = np.array([0.0] * problem.K + [high for _, high in law.bounds])
    named = {name: float(value[0]) for name, value in problem.named(point[None]).items()}
    free = [name for name in law.parameters if name in law.unbounded]
    assert problem.at_bounds(point) == {name: named[name] for name in named if name not in free}


def test_cells_that_show_one_arm_of_a_sigmoid_have_its_midpoint_at_a_bound():
    x = np.geomspace(1e8, 1e10, 8)
    fitted = fit(metric_sigmoid("N"), Data({"N": x}, 2 + 0.1 * (x / 1e9) ** 0.5, np.arange(8)), huber=None)
    assert (fitted.status, fitted.at_bounds) == (BOUND, ("midpoint",))
    assert fitted.reason.startswith(f"midpoint = {fitted.parameters['midpoint']:.3g}: ")


def test_cells_that_are_all_alike_determine_no_exponent():
    x = np.geomspace(1e8, 1e10, 8)
    assert fit(loss_law("N"), Data({"N": x}, np.full(8, 0.3), np.arange(8))).status in (BOUND, UNIDENTIFIABLE)
