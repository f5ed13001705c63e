"""One process of a preflight under srun: `python -m launch.preflight_rank SUBMISSION`.

Each check that passed is a row of checks.jsonl in the submission's folder, written by rank 0 when all
ranks are through it; the check after the last of them is the one that failed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from launch.failures import report_line
from launch.rank import export_ranks
from launch.submission import Submission
from scaling.device import require_gpu, torch_device
from scaling.ending import end_after
from scaling.plan import RunPlan, from_record
from scaling.processes import Processes, join
from scaling.records import append_record
from scaling.run import set_up
from scaling.shards import ShardIndex
from scaling.stopping import StopFlag, StoppedError
from scaling.trainer import Trainer

ALL_REDUCE_BYTES = 64 * 2**20
STEPS = 4  # of training; the last is timed, the first warms up


class StopAfterSteps(StopFlag):
    """Asks a trainer to save and stop after a few steps, by the way in which a signal does."""

    trainer: Trainer | None = None
    _heard: str | None = None

    @property
    def signal(self) -> str | None:
        is_due = self.trainer is not None and self.trainer.step + 1 >= STEPS
        return self._heard or ("the preflight's last step" if is_due else None)

    @signal.setter
    def signal(self, heard: str | None) -> None:
        self._heard = heard


def check(submission: Submission, index: int) -> None:
    """Run the checks in this process, one of those that the environment names."""
    plan = from_record(submission.row(index), submission.study.path)
    execution = replace(plan.config.execution, log_every=1)
    if execution.threads is None:
        execution = replace(execution, threads=submission.settings.threads)
    plan = replace(plan, config=replace(plan.config, execution=execution))
    set_up(plan.config)
    stop = StopAfterSteps()
    with stop:
        started = time.perf_counter()
        processes = join(
            execution.rendezvous_timeout,
            execution.silence_timeout,
            execution.step_timeout,
            execution.device,
            needs_group=execution.zero_stage is not None,
        )
        try:
            _check(submission, plan, processes, stop, started)
            processes.leave()
        except Exception as error:
            processes.tell_failure(str(error))
            raise
        finally:
            processes.leave(wait=False)


def _check(submission: Submission, plan: RunPlan, processes: Processes, stop: StopAfterSteps, started: float) -> None:
    def passed(name: str, said: str, **values: float) -> None:
        if processes.is_first:
            append_record(submission.path / "checks.jsonl", {"check": name, "said": said, **values})

    device = torch_device(plan.config.execution.device)
    computes_on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    hosts = sorted(set(processes.gather(os.environ.get("SLURMD_NODENAME", os.uname().nodename))))
    seconds = time.perf_counter() - started
    said = f"{processes.world_size} on {', '.join(hosts)}, each on a {computes_on}, in {seconds:.1f} s"
    passed("rendezvous", said, seconds=seconds)

    for _ in range(2):  # the first time makes the connections
        x = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
        is_there = bool(x.all())  # waits for a GPU
        began = time.perf_counter()
        processes.sum_(x)
        if not is_there or not bool((x == processes.world_size).all()):
            raise RuntimeError(f"the sum of ones over {processes.world_size} processes is {x[0].item()}")
        seconds = time.perf_counter() - began
    world_size = processes.world_size
    moved = 2 * (world_size - 1) / world_size * ALL_REDUCE_BYTES  # bytes that each rank sends in a ring
    said = (
        f"64 MiB in {seconds * 1000:.0f} ms, {moved / seconds / 1e9:.2f} GB/s a process"
        if moved
        else "one process alone"
    )
    passed("all-reduce", said, seconds=seconds, bytes_per_second=moved / seconds)

    directory = plan.directory
    directory.path.mkdir(parents=True, exist_ok=True)
    stop.trainer = Trainer(plan, directory, ShardIndex.load(plan.config.shard_root), processes, stop)
    with suppress(StoppedError):
        stop.trainer.fit()
    if not processes.is_first:
        return
    row = [row for row in directory.read_metrics() if row["kind"] == "train"][-1]
    speed = row["audio_seconds_per_second"]
    said = f"{row['step_seconds']:.3g} s, {speed:.3g} seconds of audio per second, loss {row['loss']:.4f}"
    said += f", {row['memory_gib']:.2f} GiB"
    passed("training step", said, audio_seconds_per_second=speed, seconds=row["step_seconds"])
    saved = [event for event in directory.read_events() if event["event"] == "checkpointed"][-1]
    passed("checkpoint", f"written in {saved['seconds']:.2f} s", seconds=saved["seconds"])


def main(words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    submission = Submission(Path(words[0]))
    export_ranks(submission.settings.threads)
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    try:
        device = submission.row(index)["config"]["execution"]["device"]
        require_gpu(device, submission.settings.shape["gpus_per_node"])
        check(submission, index)
    except Exception as error:
        sys.stderr.write(report_line(error))
        sys.stderr.flush()
        raise
    return 0


if __name__ == "__main__":
    end_after(lambda: main(sys.argv[1:]))
