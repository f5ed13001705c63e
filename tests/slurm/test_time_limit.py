"""What takes SLURM minutes: the time limit, and a job that goes first. `make reliability` runs these."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import events_of, launch, runs_of, story, train_losses, wait_for

ONE_PROCESS = ("cluster.nodes=1", "execution.checkpoint_every=1000")


@pytest.fixture(autouse=True)
def _only_in_full(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--reliability") != "full":
        pytest.skip("takes minutes: make reliability")


def test_a_run_that_meets_its_time_limit_saves_goes_back_into_the_queue_and_goes_on(
    slurm_words: list[str], tmp_path: Path
):
    study = tmp_path / "study"
    # Told to stop 100 seconds before the limit of three minutes, or up to a minute earlier still.
    limit = ["cluster.timeout_min=3", "cluster.signal_seconds=100", "cluster.max_fruitless_attempts=2"]
    launch("sweep", *slurm_words, *ONE_PROCESS, *limit, "train.budget.steps=1500", f"study={study}")
    (run,) = runs_of(study)
    wait_for(lambda: events_of(run, "requeued"), "the first attempt is over", seconds=200)
    first = events_of(run, "ended")[0]
    assert (first["failure"], first["exit_status"]) == ("time limit", 75), story(run)
    saved = events_of(run, "checkpointed")[-1]["step"]
    assert saved > 1
    wait_for(lambda: events_of(run, "resumed"), "the second attempt goes on", seconds=200)
    assert events_of(run, "resumed")[0]["step"] == saved
    wait_for(lambda: len(train_losses(run)) > saved + 10, "it trains")
    launch("cancel", f"study={study}")
    wait_for(lambda: "1 cancelled" in launch("status", f"study={study}").stdout, "it is cancelled")
    assert run.state()[1]["reason"] == "its job was cancelled"
    assert events_of(run, "checkpointed")[-1]["step"] > saved, "a run that is cancelled saves first"


@pytest.mark.parametrize(("partition", "by"), [("main", "SLURM"), ("spot", "this job")])  # spot: PreemptMode=CANCEL
def test_a_job_that_goes_first_takes_the_nodes_and_gives_them_back(
    partition: str, by: str, slurm_words: list[str], tmp_path: Path
):
    study = tmp_path / "study"
    words = [*slurm_words, *ONE_PROCESS, f"cluster.partition={partition}", "train.budget.steps=400"]
    launch("sweep", *words, f"study={study}")
    (run,) = runs_of(study)
    wait_for(lambda: len(train_losses(run)) > 10, "it trains")
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--time=1", "--wrap=sleep 5", "--output=/dev/null"]
    subprocess.run(["sbatch", *urgent], check=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(events_of(run, "ended")) == 2, "it is finished after all", seconds=300)
    assert run.state()[0] == "finished", story(run)
    first = events_of(run, "ended")[0]
    assert (first["failure"], first["exit_status"]) == ("preempted", 75), story(run)
    assert events_of(run, "requeued")[0]["by"] == by
    assert [step for step, _ in train_losses(run)] == list(range(1, 401))
