"""The tables of what is claimed say of what, name the runs behind each row, and have the numbers in their CSV."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.claims import Claims, claims
from analysis.gather import gather
from analysis.isoflop import IsoFlop, isoflop
from analysis.law_tables import exclusions_effect_table, held_out_table, isoflop_table, laws_table
from analysis.quantities import MISSING
from analysis.report_table import ReportTable
from analysis.result_tables import joint_table
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import FAMILY, grid_study, lines, run_record, true_loss, write_run


def sizes_study(path: Path, seeds: dict[str, int]) -> StudyDirectory:
    """Sizes at one budget of audio, of so many seeds each."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(1), []
    for size, count in seeds.items():
        for seed in range(count):
            plans.append(run_record(size, 100.0, seed))
            write_run(study, plans[-1], true_loss(size, 100.0) * float(np.exp(rng.normal(0, 0.003))), rng)
    study.plan.write_text(lines(plans))
    return study


@pytest.mark.parametrize(("seeds", "said"), [((1, 1), "one seed"), ((3, 1), "1 to 3 seeds")])
def test_why_a_law_has_no_intervals_counts_the_seeds_that_its_cells_have(
    tmp_path: Path, seeds: tuple[int, int], said: str
):
    path = sizes_study(tmp_path / "study", dict.fromkeys(("c8", "xt", "c24"), seeds[0]) | {"t": seeds[1]}).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    table = laws_table(found.losses, "laws", "Laws", found.settings.level, found.data)
    assert f"no intervals: 4 cells of {said} leave 1 degree of freedom, of at least 3" in table.text.loc[0, "Status"]


def test_a_law_whose_bootstraps_find_no_optimum_has_no_interval_and_the_reason_is_in_the_table(tmp_path: Path):
    study = sizes_study(tmp_path / "study", dict.fromkeys(FAMILY, 3))
    metrics = claims(gather(study.path), Settings(study.path, bootstraps=200)).metrics
    table = laws_table(metrics, "laws", "Laws", 0.95, "audio_hours_seen")
    unfinished = [claim.fitted for claim in metrics if claim.fitted.bootstraps.unfinished > 0.05]
    assert unfinished
    for law in unfinished:
        assert not law.has_interval
        assert np.isnan(law.interval(law.law.parameters[0])).all()
    said = table.text["Status"].str.contains(r"no intervals: \d+% of the bootstraps found no optimum in 300 steps")
    assert said.sum() == len(unfinished)


@pytest.mark.parametrize(
    ("draw", "text"),
    [(0.0, "below the smallest"), (np.inf, "beyond the largest"), (3e8, "300 M to 300 M")],
)
def test_an_interval_of_which_all_draws_lie_on_one_side_is_that_side(tmp_path: Path, draw: float, text: str):
    path = grid_study(tmp_path / "study", sizes=("c8", "xt", "c24", "t"), pmacs=(0.3,), seeds=2).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    iso = isoflop(found.kept, bootstraps=100, seed=0)
    drawn = IsoFlop([replace(p, bootstrap=np.full(100, draw)) for p in iso.curves], iso.path, freedom=iso.freedom)
    assert list(isoflop_table(drawn, found).text["Interval"]) == [text]


# --- what laws are of, and the runs behind each row ----------------------------------------


@pytest.fixture(scope="module")
def two_axes(tmp_path_factory: pytest.TempPathFactory) -> Claims:
    """Sizes x hours seen x hours of data, two seeds of each; the shortest runs have too few steps for a fit."""
    study = StudyDirectory(tmp_path_factory.mktemp("two") / "study")
    rng, plans = np.random.default_rng(1), []
    for size in ("c8", "xt", "c24", "t", "s"):
        for hours_seen in (0.6, 10.0, 30.0, 100.0, 300.0):
            for hours, seed in ((9.0, 0), (9.0, 1), (3.0, 0), (3.0, 1)):
                plan = run_record(size, hours_seen, seed, hours=hours, axes={"data.hours": hours})
                plan["run_id"] += f"-of-{hours:g}h"
                write_run(study, plan, true_loss(size, hours_seen) * float(np.exp(rng.normal(0, 0.004))), rng)
                plans.append(plan)
    study.plan.write_text(lines(plans))
    return claims(gather(study.path), Settings(study.path, bootstraps=100))


def read_csv(table: ReportTable) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(table.to_csv()))


def test_the_table_of_laws_says_which_cells_each_is_of_and_in_which_units(two_axes: Claims):
    table = laws_table(two_axes.losses, "laws", "Laws", 0.95, two_axes.data)
    of = dict(zip(table.text["Law"], table.text["Of"], strict=True))
    assert of["Validation loss: L(N)"] == "300 h seen, of 9 h of audio"
    assert of["Validation loss: L(D)"] == "hours of audio seen in training at size s of 9 h of distinct audio"
    assert set(read_csv(table)["of"]) <= set(of.values())
    units = table.caption.partition("Units: ")[2].partition(".")[0]
    assert units.split("; ") == [
        "N in the unit of its column",
        "D in hours of audio seen in training",
        "C in multiply-accumulates of training",
        "the validation loss is as it was trained, without a unit",
    ]
    metrics = laws_table(two_axes.metrics, "metric_laws", "Laws", 0.95, two_axes.data).caption
    assert "L the validation loss as it was trained; m: PESQ-WB, STOI, ESTOI, SI-SDR (dB). " in metrics


def test_a_fit_with_the_excluded_runs_lists_those_that_it_used(two_axes: Claims):
    table = exclusions_effect_table(two_axes)
    excluded = set(two_axes.exclusions["run_id"])
    assert len(excluded) == 20
    read = read_csv(table)
    assert list(read["run_ids"]) == list(table.sources["Law"])
    claimed = {(claim.law.name, claim.measure): claim for claim in two_axes.losses}
    assert {"as claimed", "least squares", "with the excluded runs"} == set(read["fit"])
    for row in read.to_dict("records"):
        claim, ids = claimed[row["law"], row["measure"]], row["run_ids"].split()
        fitted = {"as claimed": claim.fitted, "least squares": claim.squares}.get(row["fit"], claim.with_excluded)
        assert fitted is not None
        values = two_axes.runs.set_index("run_id").loc[ids, "validation_loss"]
        assert sorted(values) == sorted(fitted.data.y)
        assert bool(excluded & set(ids)) == (row["fit"] == "with the excluded runs")
        assert row["E"] == pytest.approx(fitted.parameters["E"], rel=1e-12)


def test_a_held_out_cell_lists_the_runs_observed_and_those_that_predict_it(two_axes: Claims):
    table = held_out_table(two_axes)
    read, runs = read_csv(table), two_axes.runs.set_index("run_id")
    assert len(read) > 40
    for row in read.to_dict("records"):
        ids, fitted = row["run_ids"].split(), row["fitted_run_ids"].split()
        assert len(ids) == row["seeds"] == 2
        assert runs.loc[ids, "cell"].nunique() == 1
        assert runs.loc[ids, row["quantity"]].mean() == pytest.approx(row["observed"], rel=1e-12)
        assert not set(ids) & set(fitted)
    last = table.text["Observed"] != MISSING
    assert set(table.sources.loc[last, "Observed"]) <= set(read["run_ids"])
    assert set(table.sources.loc[last, "Predicted"]) == set(read["fitted_run_ids"])


def test_the_numbers_of_best_sizes_and_of_the_grid_are_in_full_with_their_runs(tmp_path: Path):
    path = grid_study(tmp_path / "study", sizes=("c8", "xt", "c24", "t", "c48"), pmacs=(0.3, 1.0), seeds=2).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    iso = isoflop(found.kept, bootstraps=100, seed=0)
    read = read_csv(isoflop_table(iso, found))
    for curve, row in zip(iso.curves, read.to_dict("records"), strict=True):
        assert (row["low"], row["high"]) == pytest.approx(curve.interval(0.95), rel=1e-12)
        u = np.log10(row["best_size"]) - row["log10_n_centre"]
        log_loss = row["cube"] * u**3 + row["square"] * u**2 + row["slope"] * u + row["constant"]
        assert np.exp(log_loss) == pytest.approx(row["best_loss"], rel=1e-9)
        assert set(found.runs.set_index("run_id").loc[row["run_ids"].split(), "cell"]) == set(curve.cells.index)
        assert row["path_exponent"] == pytest.approx(iso.path.exponent, rel=1e-12)
    joint = read_csv(joint_table(found))
    losses = found.runs.set_index("run_id")["validation_loss"]
    for row in joint.to_dict("records"):
        assert losses[row["run_ids"].split()].mean() == pytest.approx(row["mean"], rel=1e-12)
        assert len(row["run_ids"].split()) == row["count"] == 2


def test_why_bootstraps_draw_cells_is_what_holds_of_these_laws(tmp_path: Path):
    """Every cell has three seeds: only m(L), whose x is a mean over them, is of draws of cells."""
    path = grid_study(tmp_path / "study", sizes=("c8", "xt", "c24", "t"), pmacs=(0.3, 1.0), seeds=3).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    caption = laws_table(found.metrics, "laws", "Laws", 0.95, found.data).caption
    assert "bootstraps over cells (their x is a mean over seeds)" in caption
    single = sizes_study(tmp_path / "single", dict.fromkeys(FAMILY, 2) | {"s": 1}).path
    of_one = claims(gather(single), Settings(single, bootstraps=100))
    caption = laws_table(of_one.losses, "laws", "Laws", 0.95, of_one.data).caption
    assert "bootstraps over cells (not every cell has several seeds)" in caption


def test_errors_of_losses_are_shares_and_those_of_metrics_have_a_unit(two_axes: Claims):
    losses = laws_table(two_axes.losses, "laws", "Laws", 0.95, two_axes.data)
    assert losses.text["Held-out error"].str.fullmatch(r"(\d+\.\d\d%, without the largest .*|–)").all()
    metrics = laws_table(two_axes.metrics, "metric_laws", "Laws", 0.95, two_axes.data)
    of_si_sdr = metrics.text.loc[metrics.text["Law"].str.startswith("SI-SDR"), "Held-out error"]
    assert of_si_sdr.str.fullmatch(r"(\d+\.\d\d dB, without the largest .*|–)").all()
    assert (of_si_sdr != MISSING).any()
    assert "of losses as a share of what was observed, of metrics in their unit" in losses.caption
