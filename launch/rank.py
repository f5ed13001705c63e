"""One process of a run under srun: `python -m launch.rank SUBMISSION`.

From SLURM's variables to those that process groups go by (RANK, WORLD_SIZE, LOCAL_RANK; MASTER_ADDR
and MASTER_PORT come from launch.attempt), then `scaling.run.execute`. Its status is srun's:
0 finished, 1 diverged, 75 told to stop and saved, 2 a mistake in the input, others a failure.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

told_to_stop: list[int] = []


def _note(number: int, frame: FrameType | None) -> None:
    told_to_stop.append(number)


def main(words: list[str]) -> int:
    # Before anything slow is loaded: a signal that finds no handler ends the process.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _note)
    from pathlib import Path

    from launch.failures import PREEMPTED_STATUS, report_line
    from launch.submission import Submission

    try:
        submission = Submission(Path(words[0]))
        row = submission.row(int(os.environ["SLURM_ARRAY_TASK_ID"]))
        _export(submission.settings.threads)
        _require_resolvable(os.environ["MASTER_ADDR"])

        from launch.task import RunTask
        from scaling.plan import from_record

        micro_batch = os.environ.get("LAUNCH_MICRO_BATCH")
        task = RunTask(
            from_record(row, submission.study.path),
            submission.settings.threads,
            int(micro_batch) if micro_batch else None,
        )
        if told_to_stop:
            return PREEMPTED_STATUS
        return task()
    except BaseException as error:
        print(report_line(error), file=sys.stderr, flush=True)
        raise


def _export(threads: int) -> None:
    rank, size = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    local_rank = os.environ["SLURM_LOCALID"]
    os.environ |= {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "NODE_RANK": os.environ["SLURM_NODEID"]}
    os.environ["LOCAL_WORLD_SIZE"] = str(int(size) // int(os.environ["SLURM_NNODES"]))
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _require_resolvable(address: str) -> None:
    """UserError if the first node's name means nothing here: the processes would wait for one another in vain."""
    import socket

    from scaling.errors import UserError

    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        raise UserError(
            f"MASTER_ADDR = {address} does not resolve on node {node} ({error}): put the nodes' names into its "
            "hosts file or name service, or export a MASTER_ADDR that resolves in cluster.setup"
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
