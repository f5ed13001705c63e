"""A run that is killed, stopped or cut off is the same run when it goes on, and nobody else's meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaling.checkpoint import list_checkpoints, load_newest
from scaling.errors import UserError
from scaling.evaluate import load_model
from scaling.records import RunDirectory, read_records
from tests.scaling.runs import only_run, result_of


def num_rows(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("study/runs/*/metrics.jsonl"))


def test_kills_at_random_moments_change_no_loss_and_no_weight(
    uninterrupted: RunDirectory, tiny_run: list[str], tmp_path: Path
):
    """kill -9, twice at random steps and moments, then to the end: the same run, bit for bit, and its scores too."""
    rng = random.Random(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = 0
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "scaling.train", *tiny_run], env=environment, stderr=subprocess.PIPE, text=True
        )
        if attempt < 2:
            wanted = num_rows(tmp_path) + rng.randint(1, 8)
            while process.poll() is None and num_rows(tmp_path) < wanted:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert kills >= 1
    killed = only_run(tmp_path / "study")
    assert result_of(killed) == result_of(uninterrupted)
    for ours, theirs in zip(killed.read_scores(), uninterrupted.read_scores(), strict=True):
        # the metrics' own sums in double precision may differ in their last bits
        assert ours["si_sdr"] == pytest.approx(theirs["si_sdr"], abs=1e-9)


def break_off(words: list[str], study: Path, step: int) -> dict | None:
    """Send SIGTERM as the validation after `step` begins; what the checkpoint then holds, None if it ended before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scaling.train", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    row = f'"kind": "train", "step": {step},'
    while process.poll() is None and not any(row in path.read_text() for path in study.glob("runs/*/metrics.jsonl")):
        time.sleep(0.001)
    process.terminate()
    assert process.wait(60) == 75, process.communicate()[1]
    run = only_run(study)
    checkpoint, state = load_newest(run.checkpoints)
    if not state["validation_is_due"]:
        return None
    assert checkpoint.step == step, "the run went on after it had been asked to stop"
    assert ("validation", step) not in [(row["kind"], row["step"]) for row in run.read_metrics()]
    return state


@pytest.mark.parametrize("stopping", [[], ["train.early_stopping.interval=4", "train.early_stopping.patience=2"]])
def test_a_run_stopped_in_a_validation_saves_there_and_goes_on_as_the_one_left_alone(
    tiny_run: list[str], tmp_path: Path, command, stopping: list[str]
):
    """Two validations, of which the last is broken off too."""
    words = [*tiny_run, *stopping, "train.budget.steps=8", "execution.num_validations=2", "execution.metrics=[si_sdr]"]
    assert command("scaling.train", *words).returncode == 0
    alone = only_run(tmp_path / "study")
    study = tmp_path / "broken-off"
    words.append(f"study={study}")
    states = [break_off(words, study, step) for step in (4, 8)]
    assert any(states), "the validations were over before the signals came"
    run = only_run(study)
    if states[-1] is not None:
        with pytest.raises(UserError, match="has checkpoints of 8 of its 8 steps: finish its training"):
            load_model(run)
    assert command("scaling.train", *words).returncode == 0
    assert result_of(run) == result_of(alone)
    assert run.state()[0] == "finished"
    keys = [(row["kind"], row["step"]) for row in read_records(run.metrics)]
    assert len(keys) == len(set(keys)), "a step or a validation was done twice"
    for ours, theirs in zip(run.read_metrics(), alone.read_metrics(), strict=True):
        assert [ours.get(name) for name in ("terms", "unprocessed_loss")] == [
            theirs.get(name) for name in ("terms", "unprocessed_loss")
        ]
    load_model(run)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9)), "a resumption lost a point"
    assert [event.step for event in board.Scalars("validation/loss")] == [4, 8]


def test_the_same_command_again_trains_nothing_and_says_so(tiny_run: list[str], tmp_path: Path, command):
    assert command("scaling.train", *tiny_run).returncode == 0
    directory = only_run(tmp_path / "study")
    before = directory.metrics.read_bytes()
    again = command("scaling.train", *tiny_run)
    assert again.returncode == 0
    assert "is finished already" in again.stderr
    assert directory.metrics.read_bytes() == before


def test_a_run_goes_on_where_its_shards_have_been_moved_to(tiny_run: list[str], tmp_path: Path, command):
    words = [*tiny_run, "train.budget.steps=10"]
    (shards,) = (word.partition("=")[2] for word in words if word.startswith("data.shards="))
    shutil.copytree(shards, tmp_path / "first")
    first = command("scaling.train", *words, f"data.shards={tmp_path / 'first'}", "execution.checkpoint_every=2")
    assert first.returncode == 0, first.stderr
    run = only_run(tmp_path / "study")
    (tmp_path / "first").rename(tmp_path / "second")
    for path in (run.events, run.model):  # as a run that was cut off
        path.unlink()
    lost = command("scaling.train", f"run={run.path}")
    assert (lost.returncode, "or name where they are (data.shards=DIR" in lost.stderr) == (2, True)
    found = command("scaling.train", f"run={run.path}", f"data.shards={tmp_path / 'second'}")
    assert found.returncode == 0, found.stderr
    assert run.state()[0] == "finished"


def test_a_run_without_a_whole_checkpoint_begins_anew_only_where_that_is_forced(
    uninterrupted: RunDirectory, tiny_run: list[str], tmp_path: Path, command
):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(uninterrupted.path, run.path)
    run.events.unlink()  # as a run that was cut off
    for checkpoint in list_checkpoints(run.checkpoints):
        checkpoint.state.write_bytes(b"damaged")
    refused = command("scaling.train", f"run={run.path}")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith(f"or start the run again with python -m scaling.train run={run.path} force=true")
    assert run.state()[1]["reason"] in line
    assert len(list_checkpoints(run.checkpoints)) == 2
    forced = command("scaling.train", f"run={run.path}", "force=true")
    assert forced.returncode == 0, forced.stderr
    assert result_of(run) == result_of(uninterrupted)
    assert [path.name for path in sorted(run.checkpoints.glob(".damaged-*"))] == [
        ".damaged-00000020",
        ".damaged-00000024",
    ]


def test_a_second_process_on_the_same_run_is_refused_by_name(tiny_run: list[str], tmp_path: Path, command):
    process = subprocess.Popen([sys.executable, "-m", "scaling.train", *tiny_run, "train.budget.steps=400"], stderr=-3)
    try:
        while not list(tmp_path.glob("study/runs/*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        second = command("scaling.train", *tiny_run, "train.budget.steps=400")
        assert second.returncode == 2
        assert f"is being trained by process {process.pid}: wait for it, or stop it first" in second.stderr
        assert second.stderr.count("\n") <= 3
    finally:
        process.kill()
        process.wait()


def test_checkpoints_hold_the_last_step(uninterrupted: RunDirectory):
    assert [checkpoint.step for checkpoint in list_checkpoints(uninterrupted.checkpoints)] == [20, 24]
    manifest = json.loads(list_checkpoints(uninterrupted.checkpoints)[-1].manifest.read_text())
    assert manifest["step"] == 24
