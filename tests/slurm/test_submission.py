"""A sweep puts every cell into SLURM's queue once, in arrays of one shape, and comes back at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.queue import read_queue
from launch.submission import Submission
from scaling.records import StudyDirectory
from tests.slurm.cluster import MAX_ARRAY_SIZE, MOST_SUBMITTED, wait_until
from tests.slurm.conftest import events_of, job_of, launch, runs_of

# Jobs that are queued and do not start, as when a cluster is full.
LATER = "cluster.additional_parameters={begin:'now+1hour'}"


@pytest.fixture
def study(tmp_path: Path):
    """A study's folder; what it has in the queue is taken out at the end."""
    folder = tmp_path / "study"
    yield folder
    if (folder / "plan.jsonl").exists():
        launch("cancel", f"study={folder}")


def elements_of(study: Path) -> dict[str, str]:
    """Job → run of everything of a study that is in the queue, by SLURM's own account."""
    tokens = {path.name: Submission(path) for path in (study / "jobs").iterdir()}
    jobs = [job for job in read_queue().values() if job.is_live and job.comment in tokens]
    return {job.id: tokens[job.comment].run_ids()[int(job.id.partition("_")[2])] for job in jobs}


def show(job: str) -> str:
    return subprocess.run(
        ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True
    ).stdout


def test_cells_of_one_shape_share_arrays_within_the_sites_limit_and_the_cap(slurm_words: list[str], study: Path):
    seeds = MAX_ARRAY_SIZE + 3
    words = [*slurm_words, LATER, f"study={study}", "sweep.axes.model=[xxt,xt]"]
    words += [f"sweep.axes.seed=[{','.join(map(str, range(seeds)))}]", "cluster.max_parallel=2"]
    words += ["cluster.sizes={xt:{nodes:1,cpus_per_task:2,timeout_min:7}}"]
    begun = time.monotonic()
    done = launch("sweep", *words)
    assert time.monotonic() - begun < 60
    assert "python -m launch.status" in done.stdout
    submissions = [Submission(path) for path in sorted((study / "jobs").iterdir())]
    assert sorted(len(each.run_ids()) for each in submissions) == [3, 3, MAX_ARRAY_SIZE, MAX_ARRAY_SIZE]
    assert all(f"{each.job}_[0-" in done.stdout for each in submissions)
    elements = elements_of(study)
    assert sorted(elements.values()) == sorted(run.run_id for run in runs_of(study))
    assert len(elements) == 2 * seeds
    for each in submissions:
        said = show(each.job)
        is_xt = each.run_ids()[0].startswith("xt-")
        for name in each.run_ids():
            assert name.startswith("xt-") == is_xt, "an array is of one shape"
        assert f"NumNodes={1 if is_xt else 2}" in said
        assert f"TimeLimit={'00:07:00' if is_xt else '00:20:00'}" in said
        assert re.search(r"ArrayTaskThrottle=1\b", said), said
    # No more than two arrays side by side, one element of each at a time.
    assert sum("Dependency=afterany" in show(each.job) for each in submissions) == 2

    again = launch("sweep", *words)
    assert f"{2 * seeds} runs are already queued or running" in again.stdout
    assert elements_of(study) == elements


def test_a_study_of_more_runs_than_a_user_may_submit_is_queued_as_far_as_the_limit_goes(
    slurm_words: list[str], study: Path
):
    seeds = ",".join(map(str, range(MOST_SUBMITTED + 3)))
    words = [*slurm_words, LATER, f"study={study}", f"sweep.axes.seed=[{seeds}]", "cluster.partition=few"]
    for told in (
        f"submitted {MOST_SUBMITTED - 2} runs as job array",
        f"{MOST_SUBMITTED} runs are already queued or running",
    ):
        done = launch("sweep", *words, check=False)  # the second time while none has ended
        assert done.returncode == 75
        assert told in done.stdout
        assert "launch.status" in done.stdout
        assert "3 of 10 runs are not queued: SLURM takes no more jobs (QOSMaxSubmitJobPerUserLimit; " in done.stderr
        elements = elements_of(study)
        assert len(elements) == len(set(elements.values())) == MOST_SUBMITTED
    ended = min(elements)
    subprocess.run(["scancel", ended], check=True)
    wait_until(lambda: ended not in elements_of(study), "the job left the queue")
    launch("sweep", *words, check=False)
    assert len(set(elements_of(study).values())) == MOST_SUBMITTED


def test_a_shape_that_slurm_refuses_is_one_line_before_anything_is_queued(slurm_words: list[str], study: Path):
    for words, said in (
        (["cluster.partition=nowhere"], "partition=nowhere: invalid partition"),
        (["cluster.sizes={xt:{mem_gb:900}}"], "mem=921600M"),
        (["cluster.timeout_min=5000"], "is beyond partition main's limit of 1440 minutes"),
    ):
        done = launch("sweep", *slurm_words, f"study={study}", "sweep.axes.model=[xxt,xt]", *words, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert said in lines[0], lines[0]
        assert not (study / "jobs").exists(), "nothing is left of it"
        assert not any(job.is_live and job.reason == "BeginTime" for job in read_queue().values())


def test_processes_that_cannot_share_the_batch_are_refused_before_anything_is_queued(slurm_words, study: Path):
    done = launch("sweep", *slurm_words, f"study={study}", "cluster.nodes=3", check=False)
    assert done.returncode == 2
    assert "cannot be shared out to 3 processes" in done.stderr


def test_two_sweeps_started_at_once_submit_each_cell_once(slurm_words: list[str], study: Path):
    words = [*slurm_words, LATER, f"study={study}", "sweep.axes.seed=[0,1,2,3,4]"]
    both = [
        subprocess.Popen([sys.executable, "-m", "launch.sweep", *words], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [each.communicate(timeout=200)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert sum("submitted 5 runs" in text for text in said) == 1
    assert sum("5 runs are already queued or running" in text for text in said) == 1
    assert len(elements_of(study)) == 5
    assert all(len(events_of(run, "submitted")) == 1 for run in runs_of(study))


@pytest.mark.parametrize("when", ["before sbatch", "after sbatch"])
def test_a_sweep_killed_between_submit_and_record_leaves_neither_orphan_nor_double(
    when: str, slurm_words: list[str], study: Path, tmp_path: Path
):
    """sbatch itself, in front of the real one on the PATH, kills the sweep that called it."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    order = ["kill -9 $PPID", "sleep 1", f'{real} "$@"']
    if when == "after sbatch":
        order = [order[2], order[0]]
    script = ["#!/bin/bash", f'case "$*" in *test-only*) exec {real} "$@";; esac', *order]
    (bin_folder / "sbatch").write_text("\n".join(script) + "\n")
    (bin_folder / "sbatch").chmod(0o755)
    words = [*slurm_words, LATER, f"study={study}", "sweep.axes.seed=[0,1,2]"]
    path = f"{bin_folder}:{os.environ['PATH']}"
    killed = launch("sweep", *words, check=False, PATH=path)
    assert killed.returncode == -signal.SIGKILL
    assert not (study / "runs").exists(), "no run knows of its job"
    again = launch("sweep", *words)
    assert "3 runs are already queued or running" in again.stdout, again.stdout
    elements = elements_of(study)
    assert len(elements) == len(set(elements.values())) == 3
    assert {job_of(run): run.run_id for run in runs_of(study)} == elements
    assert len(list((study / "jobs").iterdir())) == 1


def test_a_sweep_killed_before_slurm_heard_of_it_leaves_nothing(slurm_words: list[str], study: Path, tmp_path: Path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    script = ["#!/bin/bash", f'case "$*" in *test-only*) exec {real} "$@";; esac', "kill -9 $PPID"]
    (bin_folder / "sbatch").write_text("\n".join(script) + "\n")
    (bin_folder / "sbatch").chmod(0o755)
    words = [*slurm_words, LATER, f"study={study}", "sweep.axes.seed=[0,1]"]
    launch("sweep", *words, check=False, PATH=f"{bin_folder}:{os.environ['PATH']}")
    assert len(list((study / "jobs").iterdir())) == 1
    again = launch("sweep", *words)
    assert "submitted 2 runs" in again.stdout
    assert len(list((study / "jobs").iterdir())) == 1, "what SLURM never saw is cleared away"
    assert len(elements_of(study)) == 2


def test_a_sweep_over_its_cost_is_refused_before_anything_is_queued(slurm_words: list[str], study: Path):
    words = [*slurm_words, f"study={study}", "launch.max_gpu_hours=0.01"]
    unknown = launch("sweep", *words, "sweep.axes.model=[t]", check=False)
    assert unknown.returncode == 2
    assert (
        "launch.max_gpu_hours = 0.01, and time of t unknown: measure them with python -m launch.pre" in unknown.stderr
    )
    known = ["cluster.seconds_per_layer=1", "cluster.seconds_per_gmac=1"]
    over = launch("sweep", *words, "sweep.axes.model=[t]", *known, check=False)
    assert over.returncode == 2
    assert "core-hours, above launch.max_gpu_hours = 0.01" in over.stderr
    assert not StudyDirectory(study).plan.exists()
