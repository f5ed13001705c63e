"""One table says how every run is, from one question to SLURM; runs can be stopped by name."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import events_of, job_of, launch, runs_of, train_losses, wait_for
from tests.slurm.test_submission import LATER


@pytest.fixture(scope="module")
def waiting(slurm_words: list[str], tmp_path_factory) -> Path:
    """A study of four runs that wait in the queue."""
    study = tmp_path_factory.mktemp("waiting") / "study"
    launch("sweep", *slurm_words, LATER, f"study={study}", "sweep.axes.seed=[0,1,2,3]")
    return study


def test_status_asks_slurm_once_and_accounting_never(waiting: Path, tmp_path: Path):
    calls = tmp_path / "calls"
    for name in ("squeue", "sacct", "scontrol", "sinfo"):
        script = f'#!/bin/bash\necho {name} >> {calls}\nexec {shutil.which(name)} "$@"\n'
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    # SLURM looks at a job, and says what it waits for, a moment after it was submitted.
    wait_for(lambda: "waits for BeginTime" in launch("status", f"study={waiting}").stdout, "SLURM has looked", 60)
    done = launch("status", f"study={waiting}", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "4 runs: 4 queued" in done.stdout
    assert "waits for BeginTime" in done.stdout
    assert calls.read_text().split() == ["squeue"]


def test_what_is_cancelled_is_told_apart_by_whoever_did_it(waiting: Path):
    first, second, *_ = runs_of(waiting)
    nothing = launch("logs", first.run_id, f"study={waiting}", check=False)
    assert nothing.returncode == 1
    assert "has no log yet" in nothing.stderr
    done = launch("cancel", first.run_id, f"study={waiting}")
    assert "told 1 run to stop" in done.stdout
    subprocess.run(["scancel", job_of(second)], check=True)
    wait_for(
        lambda: "2 queued, 2 cancelled" in launch("status", f"study={waiting}").stdout, "two are cancelled", seconds=30
    )
    assert "told 2 runs to stop" in launch("cancel", f"study={waiting}").stdout
    assert "told 0 runs to stop" in launch("cancel", f"study={waiting}").stdout


def test_mistakes_are_one_line(waiting: Path, tmp_path: Path):
    for module, words, said in (
        ("status", [f"study={tmp_path}"], "error: no study at"),
        ("status", ["study"], "error: study: not understood; expected one of study=..."),
        ("cancel", ["nobody", f"study={waiting}"], "is called nobody: python -m launch.status"),
        ("logs", [f"study={waiting}"], "error: which run?"),
        ("logs", ["xxt", f"study={waiting}"], "error: xxt begins 4 runs"),
        ("logs", ["xxt", "lines=all", f"study={waiting}"], "error: lines=all: expected a whole number"),
    ):
        done = launch(module, *words, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert said in line


def test_a_preflight_passes_and_its_speed_prices_the_next_sweep(slurm_words: list[str], tmp_path: Path):
    words = [word for word in slurm_words if not word.startswith(("+sweep", "sweep."))]
    throughput = f"cluster.throughput={tmp_path / 'throughput.jsonl'}"
    done = launch("preflight", *words, "model=xxt", throughput, f"study={tmp_path / 'preflight'}")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("passed")] == [
        "passed  rendezvous",
        "passed  all-reduce",
        "passed  training step",
        "passed  checkpoint",
    ]
    assert "2 on n" in done.stdout
    assert "GB/s" in done.stdout
    before = launch("sweep", *slurm_words, f"study={tmp_path / 'study'}", "dry_run=true", f"{throughput}.other")
    assert "time of xxt unknown" in before.stdout
    after = launch("sweep", *slurm_words, f"study={tmp_path / 'study'}", "dry_run=true", throughput)
    assert "of training in all, on one core" in after.stdout

    failed = launch(
        "preflight",
        *words,
        "model=xxt",
        throughput,
        f"study={tmp_path / 'preflight'}",
        'cluster.setup=["export MASTER_ADDR=nowhere.invalid"]',
        check=False,
    )
    assert failed.returncode == 1
    assert "FAILED  rendezvous: bad config: " in failed.stdout
    assert "nowhere.invalid" in failed.stdout


def test_a_live_run_is_watched_through_a_controller_that_is_away_and_then_cancelled(
    slurm_words: list[str], tmp_path: Path
):
    study, is_away = tmp_path / "study", tmp_path / "is_away"
    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"#!/bin/bash\n[ ! -e {is_away} ] || {{ echo 'squeue: error: Unable to contact' >&2; exit 1; }}\n"
        f'exec {shutil.which("squeue")} "$@"\n'
    )
    squeue.chmod(0o755)
    endless = ["cluster.nodes=1", "train.budget.steps=100000", "execution.checkpoint_every=100000"]
    launch("sweep", *slurm_words, *endless, f"study={study}")
    (run,) = runs_of(study)
    wait_for(lambda: len(train_losses(run)) > 3, "it trains", run=run)

    terminal, its_end = pty.openpty()
    watch = subprocess.Popen(
        [sys.executable, "-m", "launch.status", f"study={study}", "--watch"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COLUMNS": "80", "TERM": "xterm"},
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
    )
    os.close(its_end)
    said = b""

    def has_said(what: str) -> bool:
        nonlocal said
        while select.select([terminal], [], [], 0)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # it has ended
                break
        return what.encode() in said

    try:
        wait_for(lambda: has_said("1 running"), "a table", seconds=60)
        assert run.run_id.encode() in said
        is_away.touch()
        wait_for(lambda: has_said("Looking again"), "it has missed the controller", seconds=60)
        is_away.unlink()
        watch.send_signal(signal.SIGINT)
        wait_for(
            lambda: has_said("") and watch.poll() is not None, "it has ended", seconds=30
        )  # and is read to the end
        assert watch.returncode == 0
        assert not has_said("Traceback")
        os.close(terminal)
    finally:  # what would train on beside all other tests
        cancelled = launch("cancel", f"study={study}")
    assert "told 1 run to stop" in cancelled.stdout
    wait_for(lambda: "1 cancelled" in launch("status", f"study={study}").stdout, "it is cancelled", seconds=60)
    assert events_of(run, "checkpointed")[-1]["step"] > 3, "it has saved"
