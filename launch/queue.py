"""What SLURM says of this user's jobs: one query, however many there are."""

from __future__ import annotations

import subprocess
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
    command = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r|%N|%k"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=True)
    except FileNotFoundError:
        raise UserError("squeue is not on the PATH: run this on a login node of the cluster") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"squeue does not answer ({said(error.stderr)}): is the cluster's controller up?") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"squeue does not answer within {SECONDS_TO_ANSWER} s: is the cluster's controller up?"
        ) from None
    jobs = (QueuedJob(*line.split("|", 4)) for line in result.stdout.splitlines() if line.count("|") >= 4)
    return {job.id: job for job in jobs}


def said(stderr: str) -> str:
    """What a command of SLURM complains of, each thing once, in a line."""
    lines = [line.split("error: ", 1)[-1].strip() for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))
