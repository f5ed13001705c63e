"""Speedup and efficiency over processes are of runs that are alike in all else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis.gather import gather
from analysis.process_scaling import process_figure, process_scaling
from analysis.quantities import axis_value
from analysis.result_tables import process_table
from scaling.records import Record, StudyDirectory
from tests.analysis.generated import lines, run_record, write_run


def write_measured(
    study: StudyDirectory,
    plan: Record,
    processes: int,
    nodes: int,
    speed: float,
    rng: np.random.Generator,
    **hardware: str,
) -> None:
    """A run of so many processes and audio-seconds per second."""
    write_run(study, plan, 0.04, rng)
    run = study.run(plan["run_id"])
    events = run.read_events()
    events[1] |= {"world_size": processes, "nodes": nodes, "hardware": events[1]["hardware"] | hardware}
    run.events.write_text(lines(events))
    rows = run.read_metrics()
    for row in rows:
        row |= {"audio_seconds_per_second": speed, "step_seconds": 1.0, "communication_seconds": 0.05 * processes}
    run.metrics.write_text(lines(rows))


def test_speedup_and_efficiency_over_processes_strong_and_weak(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for weak in (False, True):
        for processes, speed in ((1, 10.0), (2, 19.0), (4, 32.0)):
            plan = run_record("t", 1.0 + weak, processes=processes, axes={"cluster.nodes": processes})
            plan["global_batch"] = 64 * (processes if weak else 1) * (1 + weak)
            write_measured(study, plan, processes, processes, speed, rng)
            plans.append(plan)
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    for scaling in ("strong", "weak"):
        rows_of = table[table["scaling"] == scaling]
        assert list(rows_of["processes"]) == [1, 2, 4]
        assert list(rows_of["speedup"]) == pytest.approx([1, 1.9, 3.2])
        assert list(rows_of["efficiency"]) == pytest.approx([1, 0.95, 0.8])
        assert list(rows_of["communication_share"]) == pytest.approx([0.05, 0.1, 0.2])
        assert list(rows_of["nodes"]) == [1, 2, 4]


@pytest.mark.parametrize(
    ("axis", "values"),
    [("execution.zero_stage", (0, 2)), ("train.precision", ("bf16", "fp32")), ("train.crop_seconds", (None, 2.0))],
)
def test_settings_of_another_axis_scale_each_by_itself(axis: str, values: tuple[object, object], tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    speeds = {values[0]: {1: 90.0, 2: 180.0}, values[1]: {1: 50.0, 2: 80.0}}
    for nodes in (1, 2):
        for value in values:
            for seed in (0, 1):
                plan = run_record("t", 1.0, seed, axes={"cluster.nodes": nodes, axis: value})
                plan["run_id"] += f"-{nodes}-{value}"
                write_measured(study, plan, nodes, nodes, speeds[value][nodes], rng)
                plans.append(plan)
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    names = [f"{axis}={axis_value(value)}" for value in values]
    assert list(table["setting"]) == [names[0]] * 2 + [names[1]] * 2
    assert list(table["audio_seconds_per_second"]) == [90, 180, 50, 80]
    assert list(table["efficiency"]) == pytest.approx([1, 1, 1, 0.8])
    assert list(table["runs"]) == [2] * 4
    shown = process_table(table).text
    assert list(shown["Setting"]) == list(table["setting"])
    figure = process_figure(table)
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"t, {name}, strong: 64 crops" for name in names
    ]


def write_merged(path: Path, group: str, name: str, cells: Sequence[tuple[object, int, float]]) -> StudyDirectory:
    """A run each of (the value of a setting that no axis names, nodes, speed)."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(0), []
    for value, nodes, speed in cells:
        plan = run_record("t", 1.0, axes={"cluster.nodes": nodes})
        plan["run_id"] += f"-{nodes}-{value}"
        plan["config"] = {group: {name: value}}
        if group == "train":
            plan["science"]["train"][name] = value
        write_measured(study, plan, nodes, nodes, speed, rng)
        plans.append(plan)
    study.plan.write_text(lines(plans))
    return study


SETTINGS_OF_NO_AXIS = [("train", "precision", ("bf16", "fp32")), ("execution", "compile", (True, False))]


@pytest.mark.parametrize(("group", "name", "values"), SETTINGS_OF_NO_AXIS)
def test_merged_folders_that_differ_in_a_setting_scale_each_by_itself(
    group: str, name: str, values: tuple[object, object], tmp_path: Path
):
    cells = [(values[0], 1, 90.0), (values[0], 2, 180.0), (values[1], 1, 50.0), (values[1], 2, 80.0)]
    table = process_scaling(gather(write_merged(tmp_path / "study", group, name, cells).path))
    names = [f"{group}.{name}={str(value).lower()}" for value in values]
    assert list(table["setting"]) == [names[0]] * 2 + [names[1]] * 2
    assert list(table["audio_seconds_per_second"]) == [90, 180, 50, 80]
    assert list(table["efficiency"]) == pytest.approx([1, 1, 1, 0.8])
    assert list(table["runs"]) == [1] * 4


def test_a_plan_made_anew_with_another_execution_does_not_rename_what_was_measured(tmp_path: Path):
    cells = [(False, 1, 90.0), (False, 2, 180.0), (True, 1, 50.0), (True, 2, 80.0)]
    study = write_merged(tmp_path / "study", "execution", "compile", cells)
    plans = study.read_plan()
    for plan in plans:
        plan["config"]["execution"]["compile"] = True
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    assert list(table["setting"]) == ["execution.compile=false"] * 2 + ["execution.compile=true"] * 2


@pytest.mark.parametrize(("group", "name", "values"), SETTINGS_OF_NO_AXIS)
def test_a_speed_on_two_nodes_is_not_measured_by_one_of_another_setting_on_one(
    group: str, name: str, values: tuple[object, object], tmp_path: Path
):
    study = write_merged(tmp_path / "study", group, name, [(values[0], 1, 50.0), (values[1], 2, 180.0)])
    assert process_scaling(gather(study.path)).empty


@pytest.mark.parametrize("part", ["gpu", "cpu"])
def test_speeds_of_two_kinds_of_hardware_are_neither_pooled_nor_compared(part: str, tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for kind, nodes, speed in (("fast", 1, 90.0), ("slow", 1, 20.0), ("slow", 2, 36.0), ("third", 4, 300.0)):
        plan = run_record("t", 1.0, axes={"cluster.nodes": nodes})
        plan["run_id"] += f"-{nodes}-{kind}"
        write_measured(study, plan, nodes, nodes, speed, rng, **{part: kind})
        plans.append(plan)
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    assert list(table["setting"]) == [f"hardware.{part}=slow"] * 2
    assert list(table["efficiency"]) == pytest.approx([1, 0.9])


def test_the_kind_of_cpu_beside_a_gpu_tells_no_speeds_apart(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for cpu, nodes, speed in (("one", 1, 90.0), ("another", 2, 162.0)):
        plan = run_record("t", 1.0, axes={"cluster.nodes": nodes})
        plan["run_id"] += f"-{nodes}"
        write_measured(study, plan, nodes, nodes, speed, rng, gpu="a GPU", cpu=cpu)
        plans.append(plan)
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    assert table[["setting", "efficiency"]].to_numpy().tolist() == [["", 1.0], ["", 0.9]]


def test_processes_of_one_node_and_of_several_are_rows_of_their_own(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for nodes, on_each, speed in ((1, 1, 10.0), (1, 2, 20.0), (2, 1, 15.0)):
        plan = run_record("t", 1.0, axes={"cluster.nodes": nodes, "cluster.processes_per_node": on_each})
        plan["run_id"] += f"-{nodes}-{on_each}"
        write_measured(study, plan, nodes * on_each, nodes, speed, rng)
        plans.append(plan)
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    rows = table[["processes", "nodes", "efficiency", "setting"]].to_numpy().tolist()
    assert rows == [[1, 1, 1.0, ""], [2, 1, 1.0, ""], [2, 2, 0.75, ""]]
    assert "Setting" not in process_table(table).text


def test_a_run_that_did_not_finish_has_no_speed_to_compare(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for seed, speed in enumerate((20.0, 8.0)):
        for nodes in (1, 2):
            plan = run_record("t", 1.0, seed, axes={"cluster.nodes": nodes})
            plan["run_id"] += f"-{nodes}"
            write_measured(study, plan, nodes, nodes, speed * nodes, rng)
            plans.append(plan)
            if seed == 1:
                run = study.run(plan["run_id"])
                failed = {"event": "failed", "failure": "out of memory", "reason": "at step 3", "time": 1.8e9}
                run.events.write_text(lines([*run.read_events()[:3], failed]))
    study.plan.write_text(lines(plans))
    table = process_scaling(gather(study.path))
    assert list(table["audio_seconds_per_second"]) == [20, 40]
    assert [row.split() for row in table["run_ids"]] == [[plans[0]["run_id"]], [plans[1]["run_id"]]]
