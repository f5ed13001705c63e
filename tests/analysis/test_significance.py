"""A difference between two sizes is called one only where the seeds of both bear it out, at one budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import significance
from analysis.claims import claims
from analysis.comparable import comparable
from analysis.gather import gather
from analysis.isoflop import isoflop
from analysis.process_scaling import process_scaling
from analysis.quantities import METRICS
from analysis.report_table import ReportTable
from analysis.result_tables import breakdown_table, report_tables, significance_table
from analysis.settings import Settings
from analysis.significance import holm, paired
from scaling.records import StudyDirectory
from tests.analysis.generated import grid_study, lines, run_record, true_loss, write_run


def no_difference(rng: np.random.Generator, seeds: tuple[int, int], scatter: tuple[float, float]) -> pd.DataFrame:
    """Scores of two sizes of the same mean, whose seeds scatter differently."""
    hardness = rng.normal(0, 0.5, 20)
    rows = [
        {"size": size, "N": n, "run_id": f"{size}{seed}", "id": number, "pesq_wb": score}
        for size, n, count, spread in zip(("small", "large"), (1.0, 2.0), seeds, scatter, strict=True)
        for seed in range(count)
        for number, score in enumerate(3 + hardness + rng.normal(0, spread) + rng.normal(0, 0.02, 20))
    ]
    return pd.DataFrame(rows)


def test_two_seeds_of_an_unsteady_size_do_not_pass_for_the_scatter_of_five_of_a_steady_one(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(significance, "FEWEST_SAMPLES", 1000)  # there is no pair beside this
    rng, rejected, trials = np.random.default_rng(2), 0, 300
    for trial in range(trials):
        scores = no_difference(rng, (5, 2), (0.03, 0.09))
        table = paired(scores, METRICS[:1], bootstraps=1000, level=0.95, seed=trial)
        rejected += int(table.loc[0, "p"] < 0.05)
    assert rejected / trials <= 0.15, "Welch's rejects 10 %, pooled variances 22 %"


@pytest.mark.parametrize(("seeds", "has_p"), [((3, 1), False), ((1, 5), False), ((2, 2), True)])
def test_there_is_a_p_only_where_both_sizes_have_two_seeds(seeds: tuple[int, int], has_p: bool):
    scores = no_difference(np.random.default_rng(0), seeds, (0.1, 0.1))
    (row,) = paired(scores, METRICS[:1], bootstraps=100, level=0.95, seed=0).to_dict("records")
    assert np.isfinite([row["p"], row["p_holm"]]).tolist() == [has_p, has_p]
    assert (row["of_runs_alone"], bool(row["is_bound"])) == (not has_p, False)


def test_seeds_without_any_scatter_leave_that_of_utterances():
    scores = no_difference(np.random.default_rng(0), (2, 2), (0.0, 0.0))
    scores["pesq_wb"] = scores.groupby(["size", "id"])["pesq_wb"].transform("mean")
    (row,) = paired(scores, METRICS[:1], bootstraps=100, level=0.95, seed=0).to_dict("records")
    assert 0 < row["high"] - row["low"] < 0.03
    assert np.isfinite(row["p"])


# --- at one budget -------------------------------------------------------------------------


def of_cells(path: Path, cells: Sequence[tuple[str, float]]) -> tuple[ReportTable, ReportTable, dict[str, float]]:
    """Significance and breakdown of a study of sizes and hours seen, of two seeds; and the hours of its runs."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(0), []
    for size, hours_seen in cells:
        for seed in (0, 1):
            plans.append(run_record(size, hours_seen, seed))
            write_run(study, plans[-1], true_loss(size, hours_seen), rng)
    study.plan.write_text(lines(plans))
    hours = {plan["run_id"]: plan["audio_hours_seen"] for plan in plans}
    gathered = gather(path)
    found = claims(gathered, Settings(path, bootstraps=100))
    compared = comparable(gathered, found)
    return (
        significance_table(compared, gathered.metrics, found.settings),
        breakdown_table(compared, gathered.metrics),
        hours,
    )


def test_sizes_are_compared_at_the_largest_budget_that_the_most_of_them_share(tmp_path: Path):
    cells = [(size, hours) for size in ("c8", "xt", "c24") for hours in (10.0, 40.0, 100.0)]
    cells += [("t", 10.0), ("t", 40.0), ("s", 5.0)]
    table, breakdown, hours = of_cells(tmp_path / "study", cells)
    for one in (table, breakdown):
        runs = {run_id for ids in one.sources.to_numpy().ravel() for run_id in ids.split()}
        assert {hours[run_id] for run_id in runs} == {40.0}, "four sizes share 40 h, three 100 h"
        assert "at 40 h seen, of 9 h of audio; without s, which lacks it" in one.caption
    assert set(table.text["Size"]) | set(table.text["against"]) == {"c8", "xt", "c24", "t"}
    assert "Hours seen" not in table.text
    assert table.data["p"].notna().all()


def test_a_study_of_equal_compute_is_compared_at_one_level_of_it(tmp_path: Path):
    path = grid_study(tmp_path / "study", sizes=("c8", "xt", "t"), pmacs=(0.3, 1.0), seeds=2).path
    study = gather(path)
    study.runs.loc[study.runs["run_id"].str.startswith("t-") & (study.runs["train_macs"] > 5e14), "state"] = "failed"
    found = claims(study, Settings(path, bootstraps=100))
    cells = comparable(study, found)
    assert found.runs.set_index("run_id").loc[cells.runs["run_id"], "C"].round(-9).unique() == pytest.approx([3e14])
    table = significance_table(comparable(study, found), study.metrics, found.settings)
    assert "at 300 TMACs each; " in table.caption
    assert table.data["hours_seen"].to_numpy() == pytest.approx(
        [3e14 / 10_800 / {"xt": 244.8e6, "t": 961.9e6}[size] for size in table.data["size"]]
    )
    xt = table.text[(table.text["Size"] == "xt") & (table.text["against"] == "c8")]
    assert set(xt["Hours seen"]) == {"113 and 438"}


def test_sizes_that_share_no_budget_have_both_hours_in_the_table_and_no_p(tmp_path: Path):
    table, breakdown, _ = of_cells(tmp_path / "study", [("c8", 10.0), ("c8", 20.0), ("xt", 30.0), ("t", 90.0)])
    assert list(table.text.loc[table.text["Metric"] == "PESQ-WB", "Hours seen"]) == [
        "30 and 20",
        "90 and 20",
        "90 and 30",
    ]
    assert table.data[["p", "p_holm"]].isna().all(axis=None)
    assert set(table.text["p"]) == {"–"}
    for one in (table, breakdown):
        assert "no two sizes share a budget of audio or compute" in one.caption


def test_runs_without_scores_do_not_make_a_budget_shared(tmp_path: Path):
    path = grid_study(tmp_path / "study", sizes=("c8", "xt"), pmacs=(0.3, 1.0), seeds=2).path
    for scores in path.glob("runs/xt-*/scores.jsonl"):
        if float(scores.parent.name.split("-")[1][:-1]) > 200:
            scores.write_text("")
    study = gather(path)
    found = claims(study, Settings(path, bootstraps=100))
    assert comparable(study, found).caption == "at 300 TMACs each"


def scored(shift: float, seeds: int, spread: float) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    hardness = rng.normal(0, 0.5, 40)  # an utterance is as hard for one size as for the other
    rows = []
    for size, n, gain in (("small", 1.0, 0.0), ("large", 2.0, shift)):
        for seed in range(seeds):
            values = 3 + gain + hardness + rng.normal(0, spread) + rng.normal(0, 0.02, 40)
            rows += [
                {"size": size, "N": n, "run_id": f"{size}{seed}", "id": number, "pesq_wb": value}
                for number, value in enumerate(values)
            ]
    return pd.DataFrame(rows)


def test_pairing_finds_a_difference_much_smaller_than_the_spread_of_utterances():
    (row,) = paired(scored(0.05, 3, 0.0), METRICS[:1], bootstraps=2000, level=0.95, seed=0).to_dict("records")
    assert row["difference"] == pytest.approx(0.05, abs=0.02)
    assert row["low"] > 0
    assert row["p"] <= 0.01


def test_a_difference_within_the_spread_of_seeds_is_not_significant():
    (row,) = paired(scored(0.05, 3, 0.15), METRICS[:1], bootstraps=2000, level=0.95, seed=0).to_dict("records")
    assert row["low"] < 0 < row["high"]
    assert row["p"] > 0.05


def test_holms_correction_is_the_published_one():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    corrected = holm([0.01, np.nan, 0.03])
    assert (corrected[0], corrected[2], np.isnan(corrected[1])) == (pytest.approx(0.02), pytest.approx(0.03), True)


def test_a_p_that_no_sample_contradicts_is_written_as_a_bound_whatever_the_bootstraps(tmp_path: Path):
    path = grid_study(tmp_path / "study", sizes=("c8", "xt", "c24", "t", "c48"), pmacs=(0.3, 3.0), utterances=40).path
    study = gather(path)
    found = claims(study, Settings(path, bootstraps=100))
    tables = report_tables(
        study, found, isoflop(found.kept, bootstraps=100, seed=0), process_scaling(study), comparable(study, found)
    )
    (table,) = (table for table in tables if table.name == "significance")
    bound = table.data["is_bound"]
    assert bound.sum() > 10
    assert table.data.loc[bound, "p"].to_numpy() == pytest.approx(2 / 10_001)
    assert set(table.text.loc[bound.to_numpy(), "p"]) == {"<0.0002"}
    assert table.text.loc[bound.to_numpy(), "p (Holm)"].str.startswith("<0.00").all()
    assert not table.text.loc[~bound.to_numpy(), "p"].str.startswith("<").any()


def test_a_size_without_a_metric_is_left_out_of_its_pairs_alone_and_named(tmp_path: Path):
    """PESQ found no speech in any output of the smallest size."""
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for size in ("c8", "xt", "t"):
        for seed in (0, 1):
            plans.append(run_record(size, 50.0, seed))
            write_run(study, plans[-1], true_loss(size, 50.0), rng)
            if size == "c8":
                run = study.run(plans[-1]["run_id"])
                none = {"pesq_wb": None, "refused": {"pesq_wb": "no speech"}}
                run.scores.write_text(lines([row | none for row in run.read_scores()]))
    study.plan.write_text(lines(plans))
    gathered = gather(study.path)
    found = claims(gathered, Settings(study.path, bootstraps=100))
    table = significance_table(comparable(gathered, found), gathered.metrics, found.settings)
    pairs = table.data.groupby("metric", sort=False).apply(lambda of: list(zip(of["size"], of["against"], strict=True)))
    assert pairs["pesq_wb"] == [("t", "xt")]
    assert pairs["stoi"] == [("xt", "c8"), ("t", "c8"), ("t", "xt")]
    assert "PESQ-WB: without c8, of which it has no score." in table.caption
    assert "STOI: without" not in table.caption
    two = comparable(gathered, found).scores
    assert "pesq_wb" not in set(paired(two[two["size"] != "t"], METRICS, bootstraps=100, level=0.95, seed=0)["metric"])
