"""What a sweep plans: every cell as if it were the only one, every run's cost from what was measured of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import scaling.plan
from launch.config import StudyConfig
from launch.costs import Costs
from launch.planning import load_study, plan_study
from launch.slurm import shape_record
from launch.sweep import _spelt_for_hydra
from launch.throughput import add_measurement
from scaling.errors import UserError
from scaling.plan import RunPlan
from scaling.records import append_record, read_records

RATES = "sweep.axes={model: [xxt,xt], train.optimiser.learning_rate: [0.001,0.003], seed: [1]}"


@pytest.fixture
def planned(tiny_data: list[str], tmp_path: Path):
    """The configuration and the runs of a sweep, as its command plans them."""

    def plan(*said: str) -> tuple[StudyConfig, list[RunPlan]]:
        words = ["+sweep=sizes", *tiny_data, f"study={tmp_path / 'study'}"]
        words += [f"cluster.throughput={tmp_path / 'throughput.jsonl'}", *map(_spelt_for_hydra, said)]
        config = load_study(words)
        return config, plan_study(config, words)

    return plan


def only(plans: list[RunPlan], **axes: object) -> RunPlan:
    """The one run of these axes, dots written as double underscores."""
    wanted = {name.replace("__", "."): value for name, value in axes.items()}
    (plan,) = [plan for plan in plans if plan.axes == wanted]
    return plan


# --- cells ---------------------------------------------------------------------------------


def test_a_point_takes_the_recipes_value_where_it_gives_none_and_not_another_cells(planned):
    _, plans = planned(RATES, "sweep.points=[{model: xt, seed: 7}, {model: xt}]")
    (alone,) = planned("sweep.axes={model: [xt], seed: [7]}")[1]
    point = only(plans, model="xt", seed=7)
    assert point.config.train.optimiser.learning_rate == 0.002
    assert point.run_id == alone.run_id
    assert only(plans, model="xt").config.seed == 0
    assert only(plans, model="xt", seed=1, train__optimiser__learning_rate=0.003).config.seed == 1


def test_a_point_that_names_the_first_cells_settings_in_part_keeps_the_others_of_the_recipe(planned):
    axes = "sweep.axes={model: [xxt], train.losses.waveform: [0.5], train.crop_seconds: [0.5], seed: [1]}"
    _, plans = planned(axes, "sweep.points=[{model: xxt, train.losses.waveform: 0.7}]")
    point = only(plans, model="xxt", train__losses__waveform=0.7).config
    assert (point.train.losses.waveform, point.train.crop_seconds, point.seed) == (0.7, 1.0, 0)


def test_a_point_without_a_shape_has_the_clusters_and_not_the_first_cells(planned):
    axes = "sweep.axes={model: [xxt], cluster.nodes: [2], seed: [0]}"
    config, plans = planned(axes, "sweep.points=[{model: xt, seed: 0}]", "cluster=slurm")
    costs = Costs(config.cluster)
    assert costs.shape(only(plans, model="xt", seed=0)).nodes == 1
    assert costs.shape(only(plans, model="xxt", seed=0, cluster__nodes=2)).nodes == 2


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("execution.micro_batch=2", "its batch norms span 4 processes and there are 1"),
        ("cluster.processes_per_node=4 execution.micro_batch=4", "2 micro-batches of 4 crops cannot be shared out"),
        ("cluster.processes_per_node=2 execution.audit=true", "execution.audit needs whole norm batches in a process"),
        ("data.samples=[p999_001]", "data.samples: p999_001 is not a test utterance"),
        ("train.optimiser.groups=[{pattern:none}]", "pattern 'none' is the first match of no parameter"),
    ],
)
def test_what_no_job_could_execute_is_refused_when_it_is_planned(planned, said: str, told: str):
    with pytest.raises(UserError, match=re.escape(told)):
        planned("sweep.axes={model: [xt], seed: [0]}", *said.split())


def test_a_setting_in_a_list_may_be_an_axis(planned):
    groups = "train.optimiser.groups=[{pattern: '*bias*', weight_decay: 0}]"
    _, plans = planned(groups, "sweep.axes={model: [xt], train.optimiser.groups.0.lr_scale: [0.5, 1]}")
    assert sorted(plan.config.train.optimiser.groups[0].lr_scale for plan in plans) == [0.5, 1]
    assert {plan.config.train.optimiser.groups[0].weight_decay for plan in plans} == {0}


def test_a_cluster_that_no_run_has_needs_to_make_no_sense(planned):
    axes = "sweep.axes={model: [xxt,xt], cluster.timeout_min: [3000], seed: [0]}"
    too_long = "cluster.signal_seconds=100000"  # for the 1440 minutes that no cell has
    config, plans = planned(axes, "cluster=slurm", too_long)
    assert {Costs(config.cluster).shape(plan).timeout_min for plan in plans} == {3000}
    with pytest.raises(UserError, match=r"signal_seconds = 100000 is not shorter than cluster.timeout_min = 1440"):
        planned(axes, "sweep.points=[{model: t, seed: 0}]", "cluster=slurm", too_long)


# --- identity ------------------------------------------------------------------------------


def test_unlike_cells_whose_short_hashes_are_alike_are_not_taken_for_one_run(
    planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(scaling.plan, "HASH_DIGITS", 1)
    rates = ",".join(f"{0.001 + number / 1e5:g}" for number in range(17))  # one more than there are digits
    with pytest.raises(UserError, match=r"are two runs of one name, xxt-seed0-[0-9a-f], whose hash is too short"):
        planned(f"sweep.axes={{model: [xxt], seed: [0], train.optimiser.learning_rate: [{rates}]}}")
    _, plans = planned("sweep.axes.model=[xxt]", f"sweep.axes.seed=[{','.join(map(str, range(17)))}]")
    assert len({plan.run_id for plan in plans}) == 17, "names that differ elsewhere tell runs apart"
    with pytest.raises(UserError, match=r"are the same run xxt-seed0-"):
        planned("sweep.axes={model: [xxt], seed: [0], execution.num_workers: [0,1]}")

    monkeypatch.setattr(scaling.plan, "HASH_DIGITS", 0)
    _, (one, other) = planned("sweep.axes={model: [xxt], seed: [0,1]}")
    other = replace(other, folder=str(one.write().path))
    with pytest.raises(UserError, match=r"holds another run .seed = 0 there and 1 here."):
        other.check_folder()


def test_more_values_of_an_axis_of_execution_rename_no_run(planned):
    def names(nodes: str) -> set[str]:
        words = (f"sweep.axes={{model: [xxt], cluster.nodes: {nodes}}}", "sweep.compares_execution=true")
        return {plan.run_id for plan in planned("cluster=slurm", *words)[1]}

    (alone,) = names("[1]")
    assert alone.startswith("xxt-seed0-nodes1-")
    assert alone in names("[1,2]")


def test_a_value_that_is_no_part_of_a_path_makes_a_name_that_is(planned):
    images = "cluster.container: ['apptainer exec /a/b.sif','apptainer exec /a-b.sif',null]"
    words = (f"sweep.axes={{model: [xxt], {images}, cluster.nodes: [2]}}", "sweep.compares_execution=true")
    names = [plan.name for plan in planned("cluster=slurm", *words)[1]]
    assert len(set(names)) == 3
    assert "xxt-seed0-containerNone-nodes2" in names
    assert all(re.fullmatch(r"xxt-seed0-container[\w.-]+-nodes2", name) for name in names)


# --- costs ---------------------------------------------------------------------------------

MEASURED = ("cluster=slurm", "sweep.axes={model: [ses_medium], seed: [0]}", "train=fastenhancer")
OTHERS = (
    "train.global_batch=8 train.norm_batch=8",
    "train.norm_batch=32",
    "train.crop_seconds=1",
    "train.losses.pesq=0",
    "train.precision=bf16",
    "execution.micro_batch=64",
    "execution.compile=true",
    "deepspeed=zero2",
    "cluster.gpus_per_node=2",
    "execution.device=cpu",
)


def hours_at(speed: float, plan: RunPlan) -> float:
    return pytest.approx(plan.audio_seconds_seen / speed / 3600)


def measure(config: StudyConfig, plan: RunPlan, speed: float) -> None:
    """Put a speed on record as a preflight does, audio-seconds per second."""
    shape = shape_record(Costs(config.cluster).shape(plan))
    add_measurement(Path(config.cluster.throughput), plan.to_record(), shape, speed, "preflight")


def test_variants_of_one_width_and_depth_have_each_its_own_speed_in_any_order(planned):
    config, plans = planned(*MEASURED, "sweep.axes.model=[ses_medium,ses_medium_noncausal]")
    speeds = {plan.config.model.name: 100.0 - 60 * number for number, plan in enumerate(plans)}
    for plan in plans:
        measure(config, plan, speeds[plan.config.model.name])
    for order in (speeds, reversed(speeds)):
        for plan in planned(*MEASURED, f"sweep.axes.model=[{','.join(order)}]")[1]:
            assert plan.estimated_hours == hours_at(speeds[plan.config.model.name], plan)


def test_a_speed_holds_for_the_recipe_and_the_execution_it_was_measured_of(planned):
    config, (plan,) = planned(*MEASURED)
    measure(config, plan, 100.0)
    for number, words in enumerate(OTHERS):
        others, (other,) = planned(*MEASURED, *words.split())
        assert other.estimated_hours is None, words
        measure(others, other, 1.0 + number)
    _, (again,) = planned(*MEASURED, "train.budget.epochs=9", "train.optimiser.learning_rate=0.001", "cluster.mem_gb=9")
    assert again.estimated_hours == hours_at(100.0, again), "what decides no speed"
    _, (again,) = planned(*MEASURED, *OTHERS[0].split())
    assert again.estimated_hours == hours_at(1.0, again), "what was measured after that"


def test_a_measurement_that_does_not_say_of_which_recipe_it_is_counts_for_none(planned):
    config, (plan,) = planned(*MEASURED)
    old = {"model": plan.science["model"], "precision": "fp32", "audio_seconds_per_second": 100.0}
    append_record(Path(config.cluster.throughput), old | {"shape": shape_record(config.cluster)})
    assert planned(*MEASURED)[1][0].estimated_hours is None


def test_a_speed_on_a_cpu_prices_no_run_on_the_gpus_of_the_same_partition(planned):
    words = (*MEASURED, "cluster.gpus_per_node=1", "cluster.processes_per_node=1")
    config, (plan,) = planned(*words, "execution.device=cpu")
    measure(config, plan, 100.0)
    assert planned(*words, "execution.device=cpu")[1][0].estimated_hours == hours_at(100.0, plan)
    assert planned(*words)[1][0].estimated_hours is None
    (record,) = read_records(Path(config.cluster.throughput))
    assert record["execution"].pop("device") == "cpu"
    Path(config.cluster.throughput).unlink()
    append_record(Path(config.cluster.throughput), record)
    assert planned(*words)[1][0].estimated_hours is None, "as an earlier version filed it, without the device"


def test_runs_on_this_machines_gpus_cost_what_was_measured_there_and_not_what_a_cpu_takes(
    planned, monkeypatch: pytest.MonkeyPatch
):
    words = ("sweep.axes={model: [xt], seed: [0]}",)
    _, (on_cpu,) = planned(*words)
    assert on_cpu.estimated_hours is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("launch.costs.model_of", lambda gpus: "A100" if gpus == ["0"] else None)
    config, (plan,) = planned(*words)
    assert plan.estimated_hours is None
    costs = Costs(config.cluster)
    assert costs.in_words([plan]) == "time of xt unknown: measure them with python -m launch.preflight"
    costs.require_within([plan], None)
    with pytest.raises(
        UserError, match=r"launch.max_gpu_hours = 1, and time of xt unknown: measure them with python -m"
    ):
        costs.require_within([plan], 1.0)
    _, (again,) = planned(*words, "execution.device=cpu")
    assert again.estimated_hours == on_cpu.estimated_hours
    shape = costs.filed_as(plan)
    assert shape is not None
    add_measurement(Path(config.cluster.throughput), plan.to_record(), shape, 100.0, "run")
    assert planned(*words)[1][0].estimated_hours == hours_at(100.0, plan)
    assert planned(*words, "cluster.processes_per_node=2")[1][0].estimated_hours is None
    for other in ("T4", None):
        monkeypatch.setattr("launch.costs.model_of", lambda gpus, other=other: other)
        assert planned(*words)[1][0].estimated_hours is None
