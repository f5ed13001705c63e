"""The variants go through the study like any size, and the sizes before them keep their identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsrnn.counting import count_macs
from launch.planning import load_study, plan_study
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.plan import RunPlan, plan_run, read_planned
from scaling.records import StudyDirectory
from scaling.shards import ShardIndex
from scaling.train import main

# run_id of each size for 300 steps of train=demo on a made-up index, before there were variants
IDENTITIES = (
    "xxt-seed0-600d2d90",
    "xt-seed0-edf29387",
    "t-seed0-6aa917f9",
    "s-seed0-90fedb15",
    "m-seed0-97af56b6",
    "l-seed0-6a79b2b7",
    "xl-seed0-fe59a9cf",
)


@pytest.mark.parametrize("run_id", IDENTITIES)
def test_a_size_keeps_the_identity_it_had_before_there_were_variants(run_id: str):
    config = load_config(RunConfig, "run", [f"model={run_id.split('-')[0]}"])
    plan = RunPlan(config, axes={}, index_hash="0" * 64, hours=1.0, num_clips=1, steps=300)
    assert plan.run_id == run_id


def test_each_variant_of_a_size_is_another_run(tiny_run: list[str], tiny_index: ShardIndex):
    words = (["model=ses_xtiny"], ["model=ses_xtiny_noncausal"], ["model=ses_xtiny", "model.norm=cumulative"],
             ["model=xt"], ["model=xt", "model.norm=group"], ["model=xt", "model.causal=false"])  # fmt: skip
    plans = [plan_run(load_config(RunConfig, "run", [*tiny_run, *added]), tiny_index) for added in words]
    assert len({plan.science_hash for plan in plans}) == len(words)


def test_a_sweep_over_the_variants_is_planned_with_their_counts(tiny_run: list[str]):
    words = [
        "+sweep=sizes",
        "sweep.axes.model=[ses_xtiny,ses_tiny]",
        *(word for word in tiny_run if "model" not in word),
    ]
    plans = plan_study(load_study(words), words)
    sizes = {plan.config.model.name: plan.to_record()["size"] for plan in plans}
    assert {name: size["num_params"] for name, size in sizes.items()} == {"ses_xtiny": 469_132, "ses_tiny": 1_311_372}
    assert sizes["ses_xtiny"]["macs_per_second"] == count_macs(plans[-1].config.model.architecture(None)).total
    assert plans[-1].config.model.name == "ses_xtiny", "the longest is not first"


@pytest.mark.parametrize("choice", [("ses_xtiny",), ("ses_xtiny_noncausal", "model.norm=cumulative")])
def test_a_variant_trains_is_scored_and_goes_on_record(choice: tuple[str, ...], tiny_run: list[str], tmp_path: Path):
    words = [word for word in tiny_run if "model" not in word]
    words += [
        f"model={choice[0]}",
        *choice[1:],
        "model.num_layers=1",
        "train.test=true",
        "execution.micro_batch=1",  # below train.norm_batch, of which these norms know nothing
        "execution.scoring_processes=1",
    ]
    assert main(words) == 0
    (directory,) = [StudyDirectory(tmp_path / "study").run(path.name) for path in (tmp_path / "study/runs").iterdir()]
    assert directory.state()[0] == "finished"
    assert len(directory.read_scores()) == 4
    assert read_planned(directory).config.model.front_end == "universal_48khz"
