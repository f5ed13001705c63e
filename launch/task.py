"""What a job executes: one planned run, brought to its end from wherever it stands."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass, replace

from submitit.helpers import DelayedSubmission

from scaling.plan import RunPlan


@dataclass(frozen=True)
class RunTask:
    """The callable that submitit pickles. Torch is loaded in the job, not where it is submitted from."""

    plan: RunPlan
    threads: int | None = None  # for the run, unless its settings name a number

    def __call__(self) -> int:
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {self.plan.run_id} %(levelname)s %(message)s")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        execution = self.plan.config.execution
        if execution.threads is None and self.threads is not None:
            execution = replace(execution, threads=self.threads)
        plan = replace(self.plan, config=replace(self.plan.config, execution=execution))
        os.environ["OMP_NUM_THREADS"] = str(execution.threads or os.cpu_count())
        from scaling.run import execute

        return execute(plan)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before a time limit or preemption: the run goes on from its last checkpoint."""
        self.plan.directory.log_event("preempted", reason="time limit or preemption")
        return DelayedSubmission(self)
