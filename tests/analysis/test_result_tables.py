"""The report's tables of results have the numbers of the runs that they name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.claims import Claims, claims
from analysis.comparable import comparable
from analysis.gather import gather
from analysis.isoflop import isoflop
from analysis.process_scaling import process_scaling
from analysis.quantities import human_count
from analysis.result_tables import efficiency_table, report_tables
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import FAMILY, lines, run_record, sizes_study, write_run


def test_every_table_cell_with_a_number_names_the_runs_that_it_comes_from(grid: StudyDirectory, found: Claims):
    study = gather(grid.path)
    iso = isoflop(found.kept, bootstraps=100, seed=0)
    tables = {
        table.name: table
        for table in report_tables(study, found, iso, process_scaling(study), comparable(study, found))
    }
    wanted = {"data_table", "joint_table", "efficiency_table", "laws", "metric_laws", "held_out", "isoflop"}
    assert wanted | {"significance", "breakdown", "fits_both_ways"} <= set(tables)
    run_ids = set(study.runs["run_id"])
    for table in tables.values():
        assert table.text.shape == table.sources.shape
        for text, ids in zip(table.text.to_numpy().ravel(), table.sources.to_numpy().ravel(), strict=True):
            assert set(ids.split()) <= run_ids
            assert ids or not any(letter.isdigit() for letter in text) or table.name == "breakdown", (table.name, text)
        latex = table.to_latex()
        assert latex.count(r" \\") == len(table.text) + 1
        assert r"\toprule" in latex
        assert len(table.to_csv().splitlines()) > 1
    joint = tables["joint_table"]
    cell = study.runs[(study.runs["size"] == "t") & (study.runs["axes.train.budget.train_pmacs"] == 1.0)]
    row = joint.text.index[joint.text["Size"] == "t"][0]
    assert joint.text.loc[row, "1.00 PMACs"].startswith(f"{cell['validation_loss'].mean():.4f}")
    assert set(joint.sources.loc[row, "1.00 PMACs"].split()) == set(cell["run_id"])


def test_training_macs_per_wall_second_are_three_forward_passes_at_the_speed_of_training(tmp_path: Path):
    path = sizes_study(tmp_path / "study", seeds=1, sizes=("c8", "t")).path
    study = gather(path)
    table = efficiency_table(study, claims(study, Settings(path, bootstraps=100)))
    assert "MACs/s achieved" not in table.text
    for row, size in zip(table.data.to_dict("records"), ("c8", "t"), strict=True):
        speed = study.runs.loc[study.runs["size"] == size, "audio_seconds_per_second"].item()
        assert row["training_macs_per_wall_second"] == pytest.approx(3 * FAMILY[size][4] * speed)
    shown = human_count(table.data["training_macs_per_wall_second"][1])
    assert table.text.loc[1, "Training MACs per wall second"] == shown
    assert "Training MACs per wall second: three times the MACs of a forward pass" in table.caption


def test_an_estimate_that_came_true_is_one_of_what_it_cost_on_any_number_of_processes(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    hours, world_sizes = 0.5, (1, 8, None)  # a record of an earlier version does not say
    for world_size in world_sizes:
        plan = run_record("t", 100.0, axes={"cluster.nodes": world_size}) | {"estimated_hours": hours}
        plan["run_id"] += f"-{world_size}"
        write_run(study, plan, 0.04, rng)
        began = 1.7e9
        events = [
            {"event": "started", "time": began, "world_size": world_size},
            {"event": "evaluating", "time": began + hours * 3600, "step": plan["steps"]},
            {"event": "finished", "time": began + hours * 3600 + 60, "step": plan["steps"]},
        ]
        study.run(plan["run_id"]).events.write_text(lines(events))
        plans.append(plan)
    study.plan.write_text(lines(plans))
    gathered = gather(study.path)
    table = efficiency_table(gathered, claims(gathered, Settings(study.path, bootstraps=100)))
    assert list(table.text["Estimated hours"]) == list(table.text["Actual hours"]) == ["0.5", "4", "0.5"]
    assert set(table.text["Actual / estimated"]) == {"1.00"}
    assert list(table.data["estimated_hours"]) == pytest.approx([0.5, 4.0, 0.5])
    assert "Hours are wall hours times processes" in table.caption
