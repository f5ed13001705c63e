"""The same science is the same run; a changed setting is a new run; an axis is all that differs."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from scaling.cli import compose_config, load_config, to_object, with_values
from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.grid import SweepConfig
from scaling.plan import RunPlan, plan_run, read_planned
from scaling.records import RecordError
from scaling.shards import ShardIndex

EXECUTION = ("execution.num_workers=3", "execution.threads=2", "execution.compile=true", "execution.micro_batch=2",
             "execution.checkpoint_every=7", "execution.num_validations=9", "study=elsewhere",
             "data.cache_gb=1", "data.max_damaged_share=0.5")  # fmt: skip
SCIENCE = ("model=xt", "seed=1", "data.hours=0.02", "data.order_seed=1", "data.block_shards=1",
           "train.budget.steps=9", "train.global_batch=8", "train.norm_batch=4", "train.crop_seconds=1.0",
           "train.precision=bf16", "train.losses.waveform=0.5", "train.optimiser.learning_rate=0.001",
           "train.optimiser.max_gradient_norm=5.0")  # fmt: skip


@pytest.fixture
def plan_of(tiny_run: list[str], tiny_index: ShardIndex):
    def plan(*words: str) -> RunPlan:
        return plan_run(load_config(RunConfig, "run", [*tiny_run, *words]), tiny_index)

    return plan


@pytest.mark.parametrize("word", EXECUTION)
def test_how_a_run_is_executed_leaves_its_identity(plan_of, word: str):
    assert plan_of(word).run_id == plan_of().run_id


def test_every_scientific_setting_makes_another_run(plan_of):
    identities = [plan_of().run_id, *(plan_of(word).run_id for word in SCIENCE)]
    assert len(set(identities)) == len(identities)


def test_a_budget_said_in_another_way_is_the_same_run(plan_of):
    seconds = 24 * 4 * 0.5
    other = plan_of("train.budget.steps=null", f"train.budget.audio_hours={seconds / 3600}")
    assert other.run_id == plan_of().run_id


def test_a_label_is_not_science(plan_of):
    assert plan_of("model.name=mine").run_id.rsplit("-", 1)[1] == plan_of().run_id.rsplit("-", 1)[1]


def test_a_plan_can_be_read_back_from_its_directory(plan_of):
    plan = plan_of()
    directory = plan.write()
    again = read_planned(directory)
    assert again.run_id == plan.run_id
    assert asdict(again.config) == asdict(plan.config)
    record = directory.read_plan()
    assert record["size"]["num_params"] == 254_492
    assert record["provenance"]["packages"]["torch"]
    directory.plan.write_text('{"run_id": "x"}')
    with pytest.raises(RecordError, match="written by another version"):
        read_planned(directory)


def test_shards_other_than_the_planned_are_refused(plan_of, tiny_index: ShardIndex):
    from dataclasses import replace

    with pytest.raises(UserError, match="was planned on shards with index hash"):
        plan_of().check_index(replace(tiny_index, index_hash="0" * 64))


def test_a_budget_beyond_the_data_and_a_warm_up_beyond_the_run_are_refused(plan_of):
    with pytest.raises(UserError, match=r"data.hours = 9 needs 9 h"):
        plan_of("data.hours=9")
    with pytest.raises(UserError, match="warmup_steps = 500 is as long as the whole run of 24 steps of model xxt"):
        plan_of("train.optimiser.warmup_steps=500").check_steps()


def test_sizes_of_one_compute_budget_do_the_same_number_of_multiply_accumulates(plan_of):
    plans = [plan_of("train.budget.steps=null", "train.budget.train_pmacs=1e-3", f"model={m}") for m in ("xxt", "xt")]
    for plan in plans:
        assert plan.train_macs == pytest.approx(1e12, rel=0.5 / plan.steps)
    assert plans[0].steps / plans[1].steps == pytest.approx(
        plans[1].macs_per_second / plans[0].macs_per_second, rel=1e-2
    )


# --- the grid ------------------------------------------------------------------------------


def test_a_sweep_is_the_product_of_its_axes_with_points_and_without_what_is_excluded():
    sweep = SweepConfig(
        "mine",
        axes={"model": ["xxt", "xt"], "data": {"hours": [1, 2]}, "seed": [0]},
        points=[{"model": "t", "data.hours": 2, "seed": 0}],
        exclude=[{"model": "xt", "data.hours": 1}],
    )
    assert sweep.cells() == [
        {"model": "xxt", "data.hours": 1, "seed": 0},
        {"model": "xxt", "data.hours": 2, "seed": 0},
        {"model": "xt", "data.hours": 2, "seed": 0},
        {"model": "t", "data.hours": 2, "seed": 0},
    ]
    assert sweep.axis_names == ["model", "data.hours", "seed"]


def test_a_sweep_without_cells_is_refused():
    with pytest.raises(UserError, match=r"sweep.axes.seed = 3: expected a list"):
        SweepConfig("mine", axes={"seed": 3})
    with pytest.raises(UserError, match=r"sweep.axes.seed = \[\]: expected a list of at least one value"):
        SweepConfig("mine", axes={"seed": []})
    with pytest.raises(UserError, match="neither axes nor points"):
        SweepConfig("mine")
    with pytest.raises(UserError, match=r"sweep.exclude leaves no cell of 1"):
        SweepConfig("mine", axes={"seed": [0]}, exclude=[{"seed": 0}]).cells()


def test_an_axis_takes_any_value_as_it_is(tiny_run: list[str]):
    composed = compose_config(RunConfig, "run", tiny_run)
    cell = {"study": 'a "b" (c)', "seed": 3, "train.optimiser.max_gradient_norm": None, "train.losses.waveform": 0.25}
    config = to_object(RunConfig, with_values(composed, cell, RunConfig))
    assert config.study == 'a "b" (c)'
    assert config.seed == 3
    assert config.train.optimiser.max_gradient_norm is None
    assert config.train.losses.waveform == 0.25
    assert to_object(RunConfig, composed).seed == 0, "the composed configuration was changed"
    with pytest.raises(UserError, match=r"train.sede: no such setting"):
        with_values(composed, {"train.sede": 1}, RunConfig)
    with pytest.raises(UserError, match=r"seed: Value 'one' of type 'str' could not be converted"):
        with_values(composed, {"seed": "one"}, RunConfig)
