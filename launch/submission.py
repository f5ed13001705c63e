"""One submitted array of jobs: what it is to run, put on record before SLURM is asked.

    STUDY/jobs/TOKEN/runs.jsonl        one row a run, the array's index its line: the run's plan
    STUDY/jobs/TOKEN/settings.json     what the attempts go by (`Settings`)
    STUDY/jobs/TOKEN/job.sh            the batch script
    STUDY/jobs/TOKEN/job               the array's id, once known
    STUDY/jobs/TOKEN/INDEX.log         of the batch shell of a run, all its attempts
    STUDY/jobs/TOKEN/INDEX.ATTEMPT.RANK.log

The token is the jobs' comment too. So a sweep that is killed after SLURM took its array and before
it wrote that down leaves jobs that the next command recognises, and that record themselves
when they start. This module uses no package, because jobs' shells call it.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from launch.queue import QueuedJob
from scaling.errors import UserError
from scaling.records import Record, RunDirectory, StudyDirectory, newest_event, write_records, write_whole


@dataclass(frozen=True)
class Settings:
    """Of the attempts of one array."""

    num_processes: int
    devices: int  # GPUs of a run, or cores where there are none: what its cost is counted in
    shape: Record  # what the job asks for, as throughput is filed by
    threads: int  # CPU threads of a process, unless the run's settings name a number
    throughput: str  # file of measured speeds
    max_fruitless_attempts: int


@dataclass(frozen=True)
class Submission:
    """The files of one array."""

    path: Path

    @classmethod
    def create(cls, study: StudyDirectory, rows: Sequence[Record], settings: Settings) -> Submission:
        token = f"{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        submission = cls((study.path / "jobs" / token).resolve())
        write_records(submission.path / "runs.jsonl", rows)
        write_whole(submission.path / "settings.json", json.dumps(asdict(settings)) + "\n")
        return submission

    @property
    def token(self) -> str:
        return self.path.name

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def study(self) -> StudyDirectory:
        return StudyDirectory(self.path.parent.parent)

    @property
    def settings(self) -> Settings:
        return Settings(**json.loads((self.path / "settings.json").read_text()))

    @property
    def job(self) -> str | None:
        """The id that SLURM gave the array; None if that is not on record."""
        try:
            return (self.path / "job").read_text().strip()
        except FileNotFoundError:
            return None

    def row(self, index: int) -> Record:
        with (self.path / "runs.jsonl").open() as lines:
            return dict(json.loads(next(islice(lines, index, None))))

    def run_ids(self) -> list[str]:
        with (self.path / "runs.jsonl").open() as lines:
            return [json.loads(line)["run_id"] for line in lines]

    def batch_log(self, index: int) -> Path:
        return self.path / f"{index}.log"

    def rank_log(self, index: int, attempt: int, rank: int) -> Path:
        return self.path / f"{index}.{attempt}.{rank}.log"

    def record_job(self, job: str) -> None:
        """Put on every run's record that it is submitted, then the array's id on the submission's."""
        for index, run_id in enumerate(self.run_ids()):
            self.record_element(self.study.run(run_id), job, index)
        write_whole(self.path / "job", job + "\n")

    def record_element(self, directory: RunDirectory, job: str, index: int) -> None:
        """Put on a run's record that it is submitted as this job, unless it is there."""
        marks = f'"job": "{job}_{index}"'.encode()
        if any(line.startswith(b'{"event": "submitted"') and marks in line for line in directory.event_lines()):
            return
        log = str(self.batch_log(index))
        directory.log_event("submitted", job=f"{job}_{index}", executor="slurm", log=log, submission=self.token)


def submissions(study: StudyDirectory) -> Iterator[Submission]:
    """Every array of a study, in the order submitted."""
    for path in sorted((study.path / "jobs").glob("*/runs.jsonl")):
        yield Submission(path.parent)


def reconcile(study: StudyDirectory, queue: Mapping[str, QueuedJob]) -> None:
    """Complete what a killed sweep left half done; the caller holds the study's lock.

    An array that SLURM took is put on record, one that it never saw is removed.
    """
    arrays = {job.comment: job.id.partition("_")[0] for job in queue.values()}
    for submission in submissions(study):
        if submission.job is None:
            if submission.token in arrays:
                submission.record_job(arrays[submission.token])
            elif not list(submission.path.glob("*.log")):
                shutil.rmtree(submission.path)


def of_other_users(study: StudyDirectory) -> dict[str, str]:
    """The tokens of what other users submitted, and by whom: their jobs are not among those that `read_queue` sees."""
    found = {}
    for submission in submissions(study):
        try:
            owner = submission.path.stat().st_uid
        except FileNotFoundError:  # SLURM has just refused it
            continue
        if owner != os.getuid():
            found[submission.token] = user_name(owner)
    return found


def require_own(study: StudyDirectory) -> None:
    """UserError if runs of the study may wait or run as jobs of another user, and would be submitted twice."""
    others = of_other_users(study)
    for submission in submissions(study) if others else ():
        for run in (study.run(run_id) for run_id in submission.run_ids() if submission.token in others):
            last = newest_event(run.event_lines(), "submitted").get("submission")
            if last == submission.token and run.state()[0] in ("submitted", "running"):
                user = others[submission.token]
                raise UserError(
                    f"run {run.path} was submitted by {user}, whose jobs are not in your queue: let {user} sweep, or "
                    "cancel, this study, or take a folder of your own with study=DIR"
                )


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def rows_beyond(study: StudyDirectory, run_ids: Collection[str]) -> list[Record]:
    """The rows of other runs that were submitted, for earlier plans of the study; only those are parsed."""
    rows: dict[bytes, Record] = {}
    known = {run_id.encode() for run_id in run_ids}
    for submission in submissions(study):
        try:
            lines = (submission.path / "runs.jsonl").read_bytes().splitlines()
        except FileNotFoundError:  # SLURM has just refused it
            continue
        for line in lines:
            found = re.match(rb'\{"run_id": "([^"]+)"', line)
            if found and found[1] not in known and found[1] not in rows:
                rows[found[1]] = json.loads(line)
    return list(rows.values())


def last_job(directory: RunDirectory) -> str | None:
    """The job that the run was submitted as last."""
    return newest_event(directory.event_lines(), "submitted").get("job")
