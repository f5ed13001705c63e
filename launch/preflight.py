"""Whether a cluster can do what a study will ask of it, in minutes and before the study.

    python -m launch.preflight cluster=slurm model=xl data=vbd train=fastenhancer cluster.nodes=2
    python -m launch.preflight                       this machine

On the shape of job that the model size asks for: the processes meet, sum 64 MiB once and time it,
take a few training steps of the real recipe on the real shards, and write a checkpoint. Prints one line
a check, and puts the speed on record for the costs of sweeps.

Exit status: 0 all passed, 1 a check failed (which, and the evidence), 2 a mistake in the input.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch.config import ClusterConfig, StudyConfig
from launch.costs import Costs
from launch.failures import classify_attempt, read_tail
from launch.queue import ask, read_queue
from launch.slurm import preflight_script, require_slurm, sbatch, settings_of, try_shape
from launch.snapshot import take_snapshot
from launch.submission import Submission
from launch.throughput import add_measurement
from scaling.cli import load_config
from scaling.command import run_main
from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.gpus import visible_gpus
from scaling.plan import RunPlan, plan_run, require_writable
from scaling.prepare import open_shards
from scaling.records import StudyDirectory, read_records

CHECKS = ("rendezvous", "all-reduce", "training step", "checkpoint")
SECONDS_BETWEEN_LOOKS, SECONDS_AT_MOST = 1.0, 15.0  # longer the longer it has waited


def main(words: list[str]) -> int:
    is_named = any(word.startswith("study=") for word in words)
    config = load_config(StudyConfig, "study", words if is_named else [*words, "study=studies/preflight"])
    shape = config.cluster.for_run(config.model.name, {})
    run = RunConfig.part_of(config)
    run.micro_batches(shape.num_processes)
    own = f"{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"  # two may start within a second
    plan = plan_run(replace(run, study=f"{config.study}/{own}"), open_shards(run.data))
    plan.check_steps()
    folder = StudyDirectory(Path(plan.config.study))
    require_writable(folder.path, "name another folder with study=DIR")
    print(
        f"{plan.config.model.name} on {shape.nodes} node{'s' if shape.nodes > 1 else ''}, "
        f"{shape.num_processes} process{'es' if shape.num_processes > 1 else ''}, in {folder.path}",
        flush=True,
    )
    if shape.executor == "slurm":
        require_slurm()
        submission, status = _run_on_slurm(folder, plan, shape)
    else:
        submission, status = _run_here(folder, plan, shape), 0
    results = {str(record["check"]): record for record in read_records(submission.path / "checks.jsonl")}
    for name in CHECKS:
        if name not in results:
            _tell_failure(name, submission, status or 1)
            return 1
        print(f"passed  {name}: {results[name]['said']}")
    speed = results["training step"]["audio_seconds_per_second"]
    filed_as = Costs(config.cluster).filed_as(plan)
    is_as_asked = shape.executor == "slurm" or shape.num_processes == 1  # on this machine it is one process
    if filed_as is not None and is_as_asked:
        add_measurement(Path(shape.throughput), plan.to_record(), filed_as, speed, f"preflight {folder.path.name}")
    hours = plan.audio_seconds_seen / speed / 3600
    print(f"pass: a run of {plan.steps:,} steps would train for about {hours:.3g} h on this shape")
    return 0


def _tell_failure(check: str, submission: Submission, status: int) -> None:
    batch_log = read_tail(submission.batch_log(0))
    failure = classify_attempt(status, [], batch_log, lambda rank: read_tail(submission.rank_log(0, 0, rank)))
    print(f"FAILED  {check}: {failure.kind}: {failure.reason}")
    print(failure.last_lines)
    print(f"logs: {submission.path}")


def _run_here(folder: StudyDirectory, plan: RunPlan, shape: ClusterConfig) -> Submission:
    """Run the checks in this process: their files."""
    from launch.preflight_rank import check
    from scaling.device import require_gpu

    require_gpu(plan.config.execution.device, len(visible_gpus()))
    submission = Submission.create(folder, [plan.to_record()], settings_of(shape))
    check(submission, 0)
    return submission


def _run_on_slurm(folder: StudyDirectory, plan: RunPlan, shape: ClusterConfig) -> tuple[Submission, int]:
    """Submit the checks as a job and wait until it is over: (its files, srun's status)."""
    code = take_snapshot(folder)
    try_shape(folder, shape, code)
    submission = Submission.create(folder, [plan.to_record()], settings_of(shape))
    submission.script.write_text(preflight_script(shape, code, submission))
    job = sbatch(submission.script)
    print(f"job {job}: waiting for it", flush=True)
    said, pause = "", SECONDS_BETWEEN_LOOKS
    try:
        while True:
            try:
                entry = read_queue().get(f"{job}_0")
            except UserError as error:  # a controller that restarts costs no place in the queue
                print(f"{error} Looking again.", flush=True)
            else:
                if entry is None or not entry.is_live:
                    break
                if entry.state == "PENDING" and entry.reason not in ("None", said):
                    said = entry.reason
                    print(f"it waits for {said}", flush=True)
            time.sleep(pause)
            pause = min(1.1 * pause, SECONDS_AT_MOST)
    except BaseException:
        with suppress(UserError):
            ask(["scancel", job])
        raise
    status = submission.path / "status"
    return submission, int(status.read_text()) if status.exists() else 1


if __name__ == "__main__":
    run_main(main, __doc__ or "")
