"""Measured speeds of training: what the cost of a sweep is estimated from.

A file of records, one a measurement: the model, the precision, the shape of the job, and seconds
of audio trained on a second. Preflights and finished runs on SLURM add to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from launch.submission import Settings
from scaling.records import Record, RunDirectory, append_record, read_records

NEWEST = 5  # measurements that count


def record_run(directory: RunDirectory, row: Record, settings: Settings) -> None:
    """Add the speed of a finished run, the median over its training."""
    rows = [each for each in directory.read_metrics() if each.get("kind") == "train"][1:]  # the first warms up
    speeds = [each["audio_seconds_per_second"] for each in rows if each.get("audio_seconds_per_second")]
    if speeds:
        add_measurement(
            Path(settings.throughput), row, settings.shape, statistics.median(speeds), f"run {directory.run_id}"
        )


def add_measurement(path: Path, row: Record, shape: Record, speed: float, source: str) -> None:
    """row: a run's plan; speed: audio-seconds a second; source: what measured it"""
    append_record(
        path,
        {**_key(row["science"], shape), "audio_seconds_per_second": speed, "source": source, "time": time.time()},
    )


class Throughput:
    """The measurements of a file, by what they are of."""

    def __init__(self, path: Path) -> None:
        self.speeds: dict[str, list[float]] = {}
        for record in read_records(path):
            if {"model", "precision", "shape", "audio_seconds_per_second"} <= set(record):
                key = _text((record["model"], record["precision"], record["shape"]))
                self.speeds.setdefault(key, []).append(record["audio_seconds_per_second"])

    def speed(self, science: Record, shape: Record) -> float | None:
        """Audio-seconds a second, the median of the newest measurements; None if it was never measured."""
        speeds = self.speeds.get(_text(_key(science, shape).values()))
        return statistics.median(speeds[-NEWEST:]) if speeds else None


def _key(science: Record, shape: Record) -> Record:
    relevant = {name: value for name, value in shape.items() if name != "signal_seconds"}
    return {"model": science["model"], "precision": science["train"]["precision"], "shape": relevant}


def _text(parts: Iterable[object]) -> str:
    return repr([sorted(part.items()) if isinstance(part, dict) else part for part in parts])
