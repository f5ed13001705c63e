"""Stop the runs of a study: those that wait and those that run.

    python -m launch.cancel study=DIR               all of them
    python -m launch.cancel RUN RUN study=DIR       these; the beginning of a name is enough

A run that is stopped saves first, and goes on from there when the sweep is typed again.
Exit status: 0; 2 for a study or run that is not there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from launch.command import parsed
from launch.queue import QueuedJob, read_queue
from launch.slurm import reconcile
from launch.status import newest_study
from launch.submission import last_job, submissions
from scaling.command import run_main
from scaling.errors import UserError
from scaling.locks import held_lock, is_held
from scaling.records import RunDirectory, StudyDirectory

MOST_ELEMENTS = 500  # of one scancel's command line


def main(words: Sequence[str]) -> int:
    given = parsed(words, {"study": "the study's folder"}, rest="runs")
    study = StudyDirectory(Path(given["study"])) if "study" in given else newest_study()
    runs = named_runs(study, given.get("runs", "").split())
    count = _cancel_jobs(study, runs) if any(submissions(study)) else 0
    if "runs" not in given and is_held(study.lock):  # a sweep on this machine, which stops its runs
        count += _signal(study.lock, signal.SIGTERM)
    else:
        count += sum(_signal(run.lock, signal.SIGTERM) for run in runs if is_held(run.lock))
    print(f"told {count} run{'' if count == 1 else 's'} to stop; the same sweep command goes on with them")
    return 0


def named_runs(study: StudyDirectory, names: Sequence[str]) -> list[RunDirectory]:
    """The runs that the names begin, or all planned ones; UserError for a name that begins none."""
    run_ids = [row["run_id"] for row in study.read_plan()]
    for name in names:
        if not any(run_id.startswith(name) for run_id in run_ids):
            raise UserError(f"no run of {study.path} is called {name}: python -m launch.status study={study.path}")
    return [study.run(run_id) for run_id in run_ids if not names or run_id.startswith(tuple(names))]


def _cancel_jobs(study: StudyDirectory, runs: Sequence[RunDirectory]) -> int:
    queue = read_queue()
    with held_lock(study.lock, f"study {study.path} is being swept"):
        reconcile(study, queue)  # a killed sweep may have left jobs that no run knows of yet
    live: list[tuple[RunDirectory, QueuedJob]] = []
    for run in runs:
        job = queue.get(last_job(run) or "")
        if job is not None and job.is_live:
            live.append((run, job))
    elements: dict[str, list[str]] = defaultdict(list)
    for _, job in live:
        array, _, index = job.id.partition("_")
        elements[array].append(index)
    for array, indices in elements.items():
        for at in range(0, len(indices), MOST_ELEMENTS):
            _scancel(f"{array}_[{','.join(indices[at : at + MOST_ELEMENTS])}]")
    for run, job in live:
        if job.state == "PENDING":  # one that runs says so itself when it has saved
            run.log_event("preempted", failure="preempted", reason="its job was cancelled", job=job.id)
    return len(live)


def _scancel(job: str) -> None:
    done = subprocess.run(["scancel", job], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise UserError(f"scancel {job}: {' '.join(done.stderr.split())}")


def _signal(lock: Path, number: signal.Signals) -> int:
    """Signal the process that holds a lock of this machine; how many that were."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(lock.read_text()), number)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "", interrupted="")
