"""Measured speeds of training: what the cost of a sweep is estimated from.

A file of records, one a measurement: the model, what of the recipe and of the execution decides how
fast it is trained, the shape of the job, and seconds of audio trained on a second. Preflights and
finished runs on SLURM add to it, and on this machine those that took GPUs.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

from scaling.records import Record, RunDirectory, append_record, read_records

NEWEST = 5  # measurements that count
# What decides a speed, beside the model and the shape of the job:
OF_RECIPE = ("precision", "global_batch", "norm_batch", "crop_seconds", "losses")
OF_EXECUTION = ("micro_batch", "compile", "zero_stage", "audit", "device")
MEASURED = ("model", "recipe", "execution", "shape")  # the parts of what a measurement is of


def local_shape(num_processes: int, model: str) -> Record:
    """Of a run on this machine whose processes have a GPU each, of this model: what its speed is filed by."""
    return {"executor": "local", "gpus_per_node": num_processes, "gpu": model}


def record_run(path: Path, directory: RunDirectory, row: Record, shape: Record) -> None:
    """Add the speed of a finished run, the median over its training."""
    rows = [each for each in directory.read_metrics() if each.get("kind") == "train"][1:]  # the first warms up
    speeds = [each["audio_seconds_per_second"] for each in rows if each.get("audio_seconds_per_second")]
    if speeds:
        add_measurement(path, row, shape, statistics.median(speeds), f"run {directory.run_id}")


def add_measurement(path: Path, row: Record, shape: Record, speed: float, source: str) -> None:
    """row: a run's plan; speed: audio-seconds per second; source: what measured it"""
    measured = _measured(row["science"], row["config"]["execution"], shape)
    append_record(path, {**measured, "audio_seconds_per_second": speed, "source": source, "time": time.time()})


class Throughput:
    """The measurements of a file, by what they are of.

    One that lacks a part of that, as an earlier version's lacks the device, is of nothing that can be told and counts
    for none.
    """

    def __init__(self, path: Path) -> None:
        self.speeds: dict[str, list[float]] = {}
        for record in read_records(path):
            if {*MEASURED, "audio_seconds_per_second"} <= record.keys():
                key = json.dumps([record[name] for name in MEASURED], sort_keys=True)
                self.speeds.setdefault(key, []).append(record["audio_seconds_per_second"])

    def speed(self, science: Record, execution: Record, shape: Record) -> float | None:
        """Audio-seconds per second of a run, the median of the newest measurements; None if it was never measured."""
        measured = _measured(science, execution, shape)
        speeds = self.speeds.get(json.dumps(list(measured.values()), sort_keys=True))
        return statistics.median(speeds[-NEWEST:]) if speeds else None


def _measured(science: Record, execution: Record, shape: Record) -> Record:
    """What a speed is of."""
    return {
        "model": science["model"],
        "recipe": {name: science["train"][name] for name in OF_RECIPE},
        "execution": {name: execution[name] for name in OF_EXECUTION} | {"device": _device(execution, shape)},
        "shape": {name: value for name, value in shape.items() if name != "signal_seconds"},
    }


def _device(execution: Record, shape: Record) -> str:
    """What a run of such a job computes on, cpu or cuda."""
    return "cuda" if shape["gpus_per_node"] and execution["device"] != "cpu" else "cpu"
