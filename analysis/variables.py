"""The variables of laws: what N, D and C are of each run, and how its cell is called."""

from __future__ import annotations

import pandas as pd

from analysis.cells import cell_numbers
from analysis.gather import Study
from analysis.quantities import human_count, human_hours, round_hours


def varying_data(runs: pd.DataFrame) -> str:
    """Which of distinct audio and audio seen the study varies, a key of DATA; audio seen if both do, or none."""
    seen, distinct = runs["audio_hours_seen"].map(round_hours).nunique(), runs["hours"].map(round_hours).nunique()
    return "hours" if distinct > 1 and seen == 1 else "audio_hours_seen"


def with_variables(study: Study, size: str, data: str) -> pd.DataFrame:
    """The study's runs with N, D, C, budget_hours, label, hardware.gpu, hardware.cpu and hardware.threads.

    A size that an axis changes is several sizes; hours_seen and macs_spent are as planned where a run has not finished.
    size: what N is, a key of SIZES; data: what D is, a key of DATA.
    """
    runs = study.runs.copy()
    names = runs.groupby("size")["num_params"].transform("nunique")
    runs["size"] = [
        name if count == 1 else f"{name}, {human_count(params)}"
        for name, count, params in zip(runs["size"], names, runs["num_params"], strict=True)
    ]
    runs["budget_hours"] = runs["hours"].map(round_hours)
    # Of a run that has not finished, what was planned: only fits with the excluded runs have it.
    runs["hours_seen"] = runs["hours_seen"].fillna(runs["audio_hours_seen"].astype(float))
    runs["macs_spent"] = runs["macs_spent"].fillna(runs["train_macs"].astype(float))
    runs["N"], runs["C"] = runs[size].astype(float), runs["macs_spent"]
    runs["D"] = runs["hours_seen"] if data == "audio_hours_seen" else runs["budget_hours"]
    is_at_most = runs.groupby(cell_numbers(runs, study.axes))["stopped_early"].transform("any")
    runs["label"] = [
        f"{name}, {'up to ' if stopped else ''}{human_hours(seen)} h seen"
        for name, seen, stopped in zip(runs["size"], runs["audio_hours_seen"].astype(float), is_at_most, strict=True)
    ]
    for part in ("hardware.gpu", "hardware.cpu", "hardware.threads"):
        runs[part] = runs["run_id"].map(study.provenance[part]) if part in study.provenance else None
    return runs
