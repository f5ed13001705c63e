"""Runs into a SLURM cluster's queue: as arrays of jobs, submitted without waiting.

Runs that ask for the same are elements of one array, split at the site's limits. Every array is put on record before
SLURM is asked (launch.submission), every shape tried before anything is queued (launch.slurm), and jobs run a copy of
the code (launch.snapshot).

The arrays are written here and not by submitit's SlurmExecutor, which pickles one file a run
and puts each in its place only after sbatch has returned, so that a sweep killed in between leaves
jobs that find nothing to run; counts time limits and not progress; and reuses the port of an attempt.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.config import ClusterConfig
from launch.queue import ask
from launch.slurm import BeyondLimitError, batch_script, in_a_pattern, sbatch, settings_of, try_shape
from launch.snapshot import take_snapshot
from launch.submission import Submission
from scaling.errors import UserError
from scaling.plan import RunPlan
from scaling.records import StudyDirectory


@dataclass
class Submitted:
    """What SLURM took of some runs.

    arrays: on record. full: what it said where a limit on submitted jobs left some out; "" if it took all.
    """

    arrays: list[Submission] = field(default_factory=list)
    full: str = ""


def submit_to_slurm(study: StudyDirectory, plans: Sequence[RunPlan], cluster: ClusterConfig, lock: int) -> Submitted:
    """Submit runs as arrays; UserError, before anything is queued, if SLURM would refuse one of their shapes.

    A limit on submitted jobs counts elements: as many as it lets in are queued, in smaller arrays.
    UserError too where SLURM refuses an array for another reason: what was queued stays so and on record.

    lock: the descriptor that holds the study's lock; sbatch inherits it, so that no other sweep
        looks at the queue while one is on its way into it, though this process be killed
    """
    arrays = _arrays(plans, cluster)
    code = take_snapshot(study)
    tried: list[ClusterConfig] = []
    for shape, _ in arrays:
        if shape not in tried:
            tried.append(shape)
            try_shape(study, shape, code)
    caps = _shares(cluster.max_parallel, [len(part) for _, part in arrays])
    done = Submitted()
    lanes: list[list[Submission]] = []  # of each array before, what the next one in its lane waits for
    side_by_side = cluster.max_parallel or len(arrays)
    full: set[tuple[str | None, ...]] = set()
    for number, ((shape, part), cap) in enumerate(zip(arrays, caps, strict=True)):
        # More arrays than runs at once: each waits for one before it.
        before = lanes[number - side_by_side] if number >= side_by_side else []
        limited_by, pieces = (shape.partition, shape.qos, shape.account), []
        try:
            if limited_by not in full:
                for piece in _submitted(study, part, shape, cap, before, code, lock):
                    pieces.append(piece)
                    done.arrays.append(piece)
        except BeyondLimitError as error:
            full.add(limited_by)
            done.full = str(error)
        except UserError as error:
            queued = sum(len(each.run_ids()) for each in done.arrays)
            raise UserError(
                f"{error}: {queued} of {len(plans)} runs are queued, and the same command submits the other "
                f"{len(plans) - queued}"
            ) from None
        lanes.append(pieces or before)
    return done


def _submitted(
    study: StudyDirectory,
    plans: Sequence[RunPlan],
    shape: ClusterConfig,
    cap: int,
    before: Sequence[Submission],
    code: Path,
    lock: int,
) -> Iterator[Submission]:
    """Submit runs of one shape as an array or, at a limit on submitted jobs, in several, as many as it lets in.

    At most `cap` of them run at once, after those `before`. BeyondLimitError if the limit left some out.
    """
    left, size, room = list(plans), len(plans), cap
    last, last_cap = before, 0
    while left:
        size = min(size, len(left))
        # Beside the pieces before it as long as they leave room, then after the last of them.
        own_cap, after = (min(room, size), before) if room else (min(last_cap, size), last)
        try:
            piece = _submit(study, left[:size], shape, own_cap, after, code, lock)
        except BeyondLimitError:
            size //= 2
            if not size:
                raise
            continue
        room -= min(room, own_cap)
        left, last, last_cap = left[size:], [piece], own_cap
        yield piece


def _submit(
    study: StudyDirectory,
    plans: Sequence[RunPlan],
    shape: ClusterConfig,
    cap: int,
    after: Sequence[Submission],
    code: Path,
    lock: int,
) -> Submission:
    """Submit runs of one shape as an array, put on record; UserError if SLURM refuses it."""
    submission = Submission.create(study, [plan.to_record() for plan in plans], settings_of(shape))
    options = {"array": f"0-{len(plans) - 1}%{cap}", "comment": submission.token, "job-name": study.path.resolve().name}
    options |= {"output": f"{in_a_pattern(submission.path)}/%a.log", "requeue": ""}
    if after:
        options["dependency"] = "afterany:" + ":".join(str(each.job) for each in after)
    submission.script.write_text(batch_script(shape, options, code, submission.path))
    try:
        job = sbatch(submission.script, lock)
    except BeyondLimitError:  # of other errors SLURM may have taken it all the same: see `reconcile`
        shutil.rmtree(submission.path)
        raise
    submission.record_job(job)
    return submission


def _arrays(plans: Sequence[RunPlan], cluster: ClusterConfig) -> list[tuple[ClusterConfig, list[RunPlan]]]:
    """The runs by what they ask for, in order, at most as many to an array as the site lets in one."""
    groups: list[tuple[ClusterConfig, list[RunPlan]]] = []
    shapes: dict[str, ClusterConfig] = {}
    for plan in plans:
        key = cluster.key_of_run(plan.config.model.name, plan.axes)
        shape = shapes[key] = shapes.get(key) or cluster.for_run(plan.config.model.name, plan.axes)
        part = next((part for known, part in groups if known == shape), None)
        if part is None:
            groups.append((shape, part := []))
        part.append(plan)
    limit = _max_array_size()
    return [(shape, part[at : at + limit]) for shape, part in groups for at in range(0, len(part), limit)]


def _max_array_size() -> int:
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    return max(1, int(found[1])) if found else 1000


def _shares(total: int | None, sizes: Sequence[int]) -> list[int]:
    """How many elements of each array may run at once, `total` in all over the arrays that run side by side.

    What a small array cannot use the others have.
    """
    if total is None:
        return list(sizes)
    shares = [1] * len(sizes)
    if total > len(sizes):
        left = total
        smallest_first = sorted(range(len(sizes)), key=lambda number: (sizes[number], -number))
        for num_done, number in enumerate(smallest_first):
            shares[number] = min(sizes[number], left // (len(sizes) - num_done))
            left -= shares[number]
    return shares
