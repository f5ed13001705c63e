"""What a study was estimated to cost, beside what it took.

Estimates are the plan's hours of training. Actual hours of training come from the recorded speeds, row by
row; what a run took in all (loading, validation, scoring, attempts that were cut off) comes from the
ends of its attempts, which only jobs of a cluster record.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.gather import Study


def cost_frame(study: Study) -> pd.DataFrame:
    """One row a finished run.

    run_id, size, estimated_hours (of training, NaN where unknown), training_hours, attempts, hours (from
    the launch to the end of every attempt) and device_hours (those times the GPUs, or the cores
    where there are none); NaN where the run was no job of a cluster.
    """
    return pd.DataFrame([_cost(study, run) for _, run in study.finished.iterrows()])


def cost_table(study: Study) -> pd.DataFrame:
    """By size, means over the finished runs, as text; empty where none has finished."""
    costs = cost_frame(study)
    rows = []
    for size, runs in costs.groupby("size", sort=False) if len(costs) else ():
        known = runs.dropna(subset=["estimated_hours", "training_hours"])
        ratio = known["training_hours"].sum() / known["estimated_hours"].sum() if len(known) else np.nan
        rows.append(
            {
                "Size": size,
                "Runs": str(len(runs)),
                "Estimated training (h)": _text(runs["estimated_hours"].mean()),
                "Actual training (h)": _text(runs["training_hours"].mean()),
                "Actual over estimated": _text(ratio),
                "Attempts": _text(runs["attempts"].mean()),
                "Job (h)": _text(runs["hours"].mean()),
                "Device-hours": _text(runs["device_hours"].mean()),
            }
        )
    return pd.DataFrame(rows)


def _cost(study: Study, run: pd.Series) -> dict[str, object]:
    directory = study.directory.run(run["run_id"])
    rows = [row for row in directory.read_metrics() if row["kind"] == "train" and row.get("audio_seconds_per_second")]
    seconds, before = 0.0, 0
    for row in rows:
        audio = (row["step"] - before) * run["global_batch"] * run["crop_seconds"]
        seconds, before = seconds + audio / row["audio_seconds_per_second"], row["step"]
    ends = [event for event in directory.read_events() if event.get("event") == "ended"]
    return {
        "run_id": run["run_id"],
        "size": run["size"],
        "estimated_hours": _number(run["estimated_hours"]),
        "training_hours": seconds / 3600 if rows else np.nan,
        "attempts": len(ends) or np.nan,
        "hours": sum(end["seconds"] for end in ends) / 3600 if ends else np.nan,
        "device_hours": sum(end["device_hours"] for end in ends) if ends else np.nan,
    }


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _text(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3g}"
