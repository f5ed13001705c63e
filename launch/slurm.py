"""Runs on a SLURM cluster: one array of jobs through submitit, submitted without waiting."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

import submitit

from launch.config import ClusterConfig
from launch.task import RunTask
from scaling.errors import UserError
from scaling.plan import RunPlan
from scaling.records import StudyDirectory

MAX_TIMEOUTS = 1000  # of one job, each followed by a requeue


def submit_to_slurm(study: StudyDirectory, plans: Sequence[RunPlan], cluster: ClusterConfig) -> list[str]:
    """Submit all runs as one job array and return the jobs' ids, in order; UserError if SLURM refuses them."""
    # Absolute: a job's working directory is not this one's on every site.
    executor = submitit.SlurmExecutor(folder=(study.path / "jobs").resolve(), max_num_timeout=MAX_TIMEOUTS)
    settings = {
        "job_name": study.path.name,
        "time": cluster.timeout_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.mem_gb}GB" if cluster.mem_gb else None,
        "setup": cluster.setup or None,
        "array_parallelism": min(cluster.max_parallel or len(plans), len(plans)),
        "additional_parameters": cluster.additional_parameters or None,
    }
    executor.update_parameters(**{name: value for name, value in settings.items() if value is not None})
    try:
        with executor.batch():
            jobs = [executor.submit(RunTask(plan, cluster.cpus_per_task)) for plan in plans]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(
            f"sbatch refused the job array ({error}): check the settings of conf/cluster/slurm.yaml"
        ) from None
    for plan, job in zip(plans, jobs, strict=True):
        plan.directory.log_event("submitted", job=job.job_id, executor="slurm", log=str(job.paths.stderr))
    return [job.job_id for job in jobs]


def live_jobs() -> set[str]:
    """The ids of this user's jobs that wait or run, array elements one by one; from one query."""
    try:
        result = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--format=%i"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise UserError(f"squeue does not answer ({error}): is this a login node of the cluster?") from None
    return set(result.stdout.split())


def require_slurm() -> None:
    """UserError where SLURM's commands are not at hand."""
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise UserError(
            "cluster=slurm: sbatch and squeue are not on the PATH: "
            "run this on a login node of the cluster, or take cluster=local"
        )
