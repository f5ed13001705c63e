"""One process of a run under srun: `python -m launch.rank SUBMISSION`.

From SLURM's variables to those that process groups go by (RANK, WORLD_SIZE, LOCAL_RANK; MASTER_ADDR
and MASTER_PORT come from launch.attempt), then `scaling.run.execute`. Its status is srun's:
0 finished, 1 diverged, 75 told to stop and saved, 76 another process is lost, others a failure.
"""

from __future__ import annotations

import os
import sys

from scaling.ending import end_after
from scaling.statuses import PREEMPTED
from scaling.stopping import StopFlag, StoppedError, ignore_stop_signals


def main(words: list[str]) -> int:
    # Before anything slow is loaded: a signal that finds no handler ends the process. And after the run none is
    # wanted: srun, when the first rank is gone with a status that is not 0, sends one to those on their way out.
    ignore_stop_signals()
    with StopFlag() as stop:
        try:
            return _execute(words[0], stop)
        except StoppedError:  # before the run began
            return PREEMPTED


def _execute(folder: str, stop: StopFlag) -> int:
    from pathlib import Path

    from launch.failures import report_line
    from launch.submission import Submission

    submission = Submission(Path(folder))
    settings = submission.settings
    export_ranks(settings.threads)
    try:
        from launch.task import RunTask
        from scaling.device import require_gpu
        from scaling.plan import from_record

        plan = from_record(submission.row(int(os.environ["SLURM_ARRAY_TASK_ID"])), submission.study.path)
        require_gpu(plan.config.execution.device, settings.shape["gpus_per_node"])
        micro_batch = os.environ.get("LAUNCH_MICRO_BATCH")
        return RunTask(plan, settings.threads, int(micro_batch) if micro_batch else None)(stop)
    except Exception as error:
        sys.stderr.write(report_line(error))
        sys.stderr.flush()
        raise


def export_ranks(threads: int) -> None:
    """Put this process's place among those of its job step where process groups look for it."""
    size, nodes = os.environ["SLURM_NTASKS"], os.environ["SLURM_NNODES"]
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(int(size) // int(nodes)),
        "OMP_NUM_THREADS": str(threads),
    }


if __name__ == "__main__":
    end_after(lambda: main(sys.argv[1:]))
