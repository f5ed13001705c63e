"""Stop the runs of a study: those that wait and those that run.

    python -m launch.cancel study=DIR               all of them
    python -m launch.cancel RUN RUN study=DIR       these; a name's beginning is enough

A run that is stopped saves first, and goes on from there when the sweep is typed again. On this machine it has two
minutes to; a sweep that is told a second time, by this command or Ctrl-C, ends its runs at once.
Exit status: 0; 2 for a study or run that is not there.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil

from launch.command import parsed
from launch.queue import QueuedJob, ask, read_queue
from launch.status import newest_study
from launch.submission import last_job, reconcile, require_own, submissions
from scaling.command import run_main
from scaling.errors import UserError
from scaling.locks import held_lock, holder
from scaling.records import RunDirectory, StudyDirectory

MOST_ELEMENTS = 500  # of one scancel's command line


def main(words: Sequence[str]) -> int:
    given = parsed(words, {"study": "the study's folder"}, rest="runs")
    study = StudyDirectory(Path(given["study"])) if "study" in given else newest_study()
    runs = named_runs(study, given.get("runs", "").split())
    cancelled = _cancel_jobs(study, runs) if any(submissions(study)) else []
    here = {run: process for run in runs if run not in cancelled and (process := holder(run.lock)) is not None}
    sweep = holder(study.lock) if "runs" not in given else None
    for process in [sweep] if sweep is not None else here.values():  # a sweep stops its runs itself
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    count = len(cancelled) + len(here)
    print(f"told {count} run{'' if count == 1 else 's'} to stop; the same sweep command resumes them")
    return 0


def named_runs(study: StudyDirectory, names: Sequence[str]) -> list[RunDirectory]:
    """The runs that the names begin, or all, earlier plans' too; UserError for a name that begins none."""
    planned = study.read_run_ids()
    run_ids = [*planned, *sorted({path.name for path in study.runs.glob("*")} - set(planned))]
    named: set[str] = set() if names else set(run_ids)
    for name in names:
        whole = [run_id for run_id in run_ids if run_id == name or run_id.startswith(f"{name}-")]
        begun = whole or [run_id for run_id in run_ids if run_id.startswith(name)]
        if not begun:
            raise UserError(f"no run of {study.path} is called {name}: python -m launch.status study={study.path}")
        named.update(begun)
    return [study.run(run_id) for run_id in run_ids if run_id in named]


def _cancel_jobs(study: StudyDirectory, runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """Cancel the jobs of runs: those that had one in the queue."""
    require_own(study)
    with held_lock(study.lock, f"study {study.path} is being swept"):
        queue = read_queue()  # no sweep submits meanwhile what it would not show
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
            ask(["scancel", f"{array}_[{','.join(indices[at : at + MOST_ELEMENTS])}]"])
    for run, job in live:
        if job.state == "PENDING":  # one that runs says so itself when it has saved
            run.log_event("preempted", failure="preempted", reason="its job was cancelled", job=job.id)
    return [run for run, _ in live]


if __name__ == "__main__":
    run_main(main, __doc__ or "", interrupted="")
