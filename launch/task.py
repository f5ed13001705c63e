"""What a job executes: one planned run, brought to its end from wherever it stands."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace

from scaling.cores import num_cores
from scaling.ending import end_at_exit
from scaling.errors import UnreachableError
from scaling.plan import RunPlan
from scaling.statuses import PREEMPTED
from scaling.stopping import StopFlag, StoppedError


@dataclass(frozen=True)
class RunTask:
    """The callable of one process of a run. Torch's settings are made in the job, not where it is submitted from."""

    plan: RunPlan
    threads: int | None = None  # for the process, unless the run's settings name a number
    micro_batch: int | None = None  # in place of the settings', where memory ran out before
    port: int | None = None  # at which several processes of this machine meet
    gpus: tuple[str, ...] = ()  # of all processes of the run, named as in CUDA_VISIBLE_DEVICES; (): as that says

    def __call__(self, stop: StopFlag | None = None) -> int:
        """The run's exit status (see `scaling.run.execute`). stop: hears signals, if one has been opened already"""
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {self.plan.run_id} %(levelname)s %(message)s")
        if stop is not None:
            return self._execute(stop)
        status = None
        with StopFlag() as heard:  # before anything slow is loaded: submitit passes over what it hears until then
            try:
                status = self._execute(heard)
            except StoppedError:  # before the run began
                status = PREEMPTED
            finally:
                # once submitit has put on file what this returns (a success to it) or raises
                end_at_exit(1 if status is None else 0)
        return status

    def _execute(self, stop: StopFlag) -> int:
        execution = self.plan.config.execution
        if execution.threads is None and self.threads is not None:
            execution = replace(execution, threads=self.threads)
        if self.micro_batch is not None:
            execution = replace(execution, micro_batch=self.micro_batch)
        plan = replace(self.plan, config=replace(self.plan.config, execution=execution))
        if self.port is not None:
            export_local_ranks(self.port)
        os.environ["OMP_NUM_THREADS"] = str(execution.threads or num_cores())
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
            require_own_gpus(plan, len(self.gpus))
        from scaling.run import execute

        return execute(plan, stop)


def require_own_gpus(plan: RunPlan, num_gpus: int) -> None:
    """UnreachableError, on the run's record too, where torch does not see the GPUs that the run was given."""
    from scaling.device import require_gpu
    from scaling.run import classify

    try:
        require_gpu(plan.config.execution.device, num_gpus)
    except UnreachableError as error:
        if os.environ.get("RANK", "0") == "0":
            failure, reason = classify(error)
            plan.directory.log_event("failed", failure=failure, reason=reason)
        raise


def export_local_ranks(port: int) -> None:
    """Put this process's place among those of its local job where process groups look for it."""
    size = os.environ["SUBMITIT_LOCAL_NTASKS"]
    os.environ |= {
        "RANK": os.environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
