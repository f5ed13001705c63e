"""Runs that train.early_stopping ended before their budget: what they took is told, and passes for no budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.advise import RefusalError, advise
from analysis.claims import claims
from analysis.comparable import comparable
from analysis.gather import gather
from analysis.report import main
from analysis.scaling_table import scaling_table
from analysis.scaling_table_text import written
from analysis.settings import Settings
from scaling.records import Record, StudyDirectory, to_json, write_records
from tests.analysis.generated import COST, grid_study, lines, run_record, sizes_study, true_loss, write_run

REFUSED = r"stopped early \(train\.early_stopping\): hours seen and compute are results of their losses, not budgets"


def stop_early(study: StudyDirectory, share: Callable[[Record], float]) -> None:
    """Leave of each run what it would have had it stopped after a share of its steps, a worse validation last."""
    plans = study.read_plan()
    for plan in plans:
        plan["science"]["train"]["early_stopping"] = {"interval": 10, "patience": 3}
        run, steps = study.run(plan["run_id"]), round(plan["steps"] * share(plan))
        run.plan.write_text(to_json(plan))
        rows = [row for row in run.read_metrics() if row["step"] <= steps]
        best = min(row["loss"] for row in rows if row["kind"] == "validation")
        if steps < plan["steps"]:
            rows.append({"kind": "validation", "step": steps, "loss": best * 2, "unprocessed_loss": 0.0567})
        write_records(run.metrics, rows)
        events = [event | {"step": steps} if event["event"] == "finished" else event for event in run.read_events()]
        run.events.write_text(lines(events))
    study.plan.write_text(lines(plans))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """4 sizes x 3 budgets of equal compute x 2 seeds, whose runs stopped after 50 or 60 % of their steps."""
    study = grid_study(tmp_path_factory.mktemp("stopped") / "study", ("c8", "xt", "t", "c48"), (0.3, 1.0, 3.0), seeds=2)
    stop_early(study, lambda plan: 0.5 + 0.1 * plan["seed"])
    return study


def test_hours_seen_and_compute_are_those_of_the_steps_taken(stopped: StudyDirectory):
    study = gather(stopped.path)
    found = claims(study, Settings(stopped.path, bootstraps=100))
    for _, run in found.runs.iterrows():
        share = 0.5 + 0.1 * run["seed"]
        assert run["D"] == pytest.approx(run["audio_hours_seen"] * share, rel=0.01)
        assert run["C"] == pytest.approx(COST * run["macs_per_second"] * run["D"], rel=1e-9)
        assert run["validation_step"] < run["last_validation_step"] == run["steps_taken"]
    taken = written(scaling_table(study))["Steps"].iloc[1]
    first = found.runs.iloc[0]["steps"]
    assert taken == f"{round(first * 0.55):,} of {first:,}"


def test_the_report_tells_of_runs_that_stopped_early_and_its_costs_are_theirs(
    stopped: StudyDirectory, capsys: pytest.CaptureFixture[str]
):
    assert main([f"study={stopped.path}", "bootstraps=100"]) == 0
    out = capsys.readouterr().out
    assert "note: 24 of 24 runs stopped early (train.early_stopping), after 50% to 60% of their planned steps" in out
    assert "its last validation is at step" not in out
    costs = (stopped.report / "tables" / "efficiency_table.md").read_text()
    assert "| 165 TMACs |" in costs, "55 % of 300"
    assert "| 300 TMACs |" not in costs


def test_laws_of_what_was_seen_and_spent_minima_and_advice_are_refused_in_a_line(stopped: StudyDirectory):
    found = claims(gather(stopped.path), Settings(stopped.path, bootstraps=100))
    for name in ("L(D)", "L(C)", "L(N, D)"):
        claim = found.loss(name)
        assert claim is not None
        assert not claim.fitted.is_usable
        assert claim.fitted.reason.endswith("not budgets"), name
        assert all(test.verdict == "not possible" for test in claim.held_out)
    with pytest.raises(RefusalError, match=f"^24 of 24 runs {REFUSED}$"):
        advise(found, 1.0)
    assert main([f"study={stopped.path}", "bootstraps=100"]) == 0
    assert "No isoflop curves figure: 24 of 24 runs stopped early" in (stopped.report / "report.html").read_text()


def test_sizes_are_compared_at_their_planned_budget_and_its_law_of_size_is_fitted(tmp_path: Path):
    study = sizes_study(tmp_path / "study")
    stop_early(study, lambda plan: {0: 1.0, 1: 0.5, 2: 0.75}[plan["seed"]])
    gathered = gather(study.path)
    found = claims(gathered, Settings(study.path, bootstraps=100))
    law = found.loss("L(N)")
    assert law is not None
    assert law.fitted.is_usable
    assert (len(law.run_ids), law.about) == (
        18,
        "100 h seen, of 9 h of audio; 12 of 18 runs stopped early (train.early_stopping)",
    )
    cells = comparable(gathered, found)
    assert cells.is_shared
    assert len(cells.runs) == 18
    assert cells.caption == f"at {law.about}"


def test_a_law_of_distinct_audio_is_one_of_early_stopped_runs(tmp_path: Path):
    study, plans = StudyDirectory(tmp_path / "study"), []
    study.path.mkdir()
    for hours in (1.0, 2.0, 4.0, 8.0, 16.0):
        for seed in range(2):
            plan = run_record("xt", 50.0, seed, hours=hours, axes={"data.hours": hours})
            plan["run_id"] += f"-{hours:g}"
            write_run(study, plan, true_loss("xt", hours * (1 + 0.001 * seed)), np.random.default_rng(seed))
            plans.append(plan)
    study.plan.write_text(lines(plans))
    stop_early(study, lambda plan: 0.5)
    law = claims(gather(study.path), Settings(study.path, bootstraps=100)).loss("L(D)")
    assert law is not None
    assert (law.fitted.is_usable, law.fitted.data.num_cells) == (True, 5)


def test_a_run_with_patience_that_trained_to_its_end_is_no_early_stop(tmp_path: Path):
    study = sizes_study(tmp_path / "study", seeds=1)
    stop_early(study, lambda plan: 1.0)
    found = claims(gather(study.path), Settings(study.path, bootstraps=100))
    assert (found.refusal, found.runs["stopped_early"].any()) == ("", False)
    assert list(found.runs["D"]) == [100.0] * 6
