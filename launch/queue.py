"""SLURM's commands, and what it says of this user's jobs: one query, however many there are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.errors import UserError

# Of jobs that are over; squeue shows them for some minutes more.
ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
    "PREEMPTED",
)
SECONDS_TO_ANSWER = 60

# What a job around this process has set, and defaults of a user's own: sbatch would take them for options, its jobs for
# their own, squeue for what to leave out. All commands have to look at the same cluster.
NOT_HANDED_ON = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SUBMITIT_", "LAUNCH_", "MASTER_")
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
HANDED_ON = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # where the controller is, and who asks


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one element of an array."""

    id: str
    state: str  # in SLURM's words: PENDING, RUNNING, COMPLETING, TIMEOUT, ...
    reason: str  # why it waits
    nodes: str
    comment: str  # the token of its submission

    @property
    def is_live(self) -> bool:
        """Whether it waits, runs, or is about to end or to be queued again."""
        return self.state not in ENDED


def read_queue() -> dict[str, QueuedJob]:
    """This user's jobs that wait, run or ended a short while ago, by id, array elements one by one."""
    answer = ask(["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r|%N|%k"])
    jobs = (QueuedJob(*line.split("|", 4)) for line in answer.splitlines() if line.count("|") >= 4)
    return {job.id: job for job in jobs}


def ask(command: Sequence[str]) -> str:
    """What a command of SLURM answers; UserError if it does not, or is not there."""
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} does not answer within {SECONDS_TO_ANSWER} s: is the cluster's controller up?"
        ) from None
    if done.returncode:
        raise UserError(f"{' '.join(command[:2])}: {said(done.stderr)}: is the cluster's controller up?")
    return done.stdout


def environment() -> dict[str, str]:
    """Of this process, for SLURM's commands."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in HANDED_ON or (not name.startswith(NOT_HANDED_ON) and name not in OF_RANKS)
    }


def said(stderr: str) -> str:
    """What a command of SLURM complains of, each thing once, in a line."""
    lines = [line.split("error: ", 1)[-1].strip() for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))
