"""How training scales over processes: speed, speedup, efficiency, and time in communication.

Strong scaling: the same global batch on more processes. Weak scaling: the global batch grows with them. Efficiency is
audio-seconds a second and process over those of the fewest processes on record of the same size and kind.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis import style
from analysis.gather import Study

AXES = ("cluster.nodes", "execution.processes")
COLUMNS = [
    "size",
    "scaling",
    "processes",
    "nodes",
    "global_batch",
    "audio_seconds_per_second",
    "speedup",
    "efficiency",
    "step_seconds",
    "communication_share",
    "runs",
    "run_ids",
]


def node_table(study: Study) -> pd.DataFrame:
    """A row a size, kind of scaling and number of processes; no rows if the study has one number of processes only."""
    runs = study.runs[np.isfinite(study.runs["audio_seconds_per_second"].astype(float))].copy()
    runs["processes"] = _processes(runs)
    runs = runs[runs["processes"].notna()]
    if runs["processes"].nunique() < 2:
        return pd.DataFrame(columns=COLUMNS)
    runs["per_process"] = runs["global_batch"] / runs["processes"]
    rows = []
    for size, of_size in runs.groupby("size", sort=False):
        for scaling, fixed in (("strong", "global_batch"), ("weak", "per_process")):
            for _, group in of_size.groupby(fixed):
                if group["processes"].nunique() < 2:
                    continue
                rows += _rows(str(size), scaling, group)
    return pd.DataFrame(rows, columns=COLUMNS)


def _processes(runs: pd.DataFrame) -> pd.Series:
    """As the started event has it; where it says nothing, as the axis of processes does."""
    processes = runs["world_size"].astype(float)
    for axis in AXES:
        if f"axes.{axis}" in runs:
            processes = processes.fillna(runs[f"axes.{axis}"].astype(float))
    return processes


def _rows(size: str, scaling: str, group: pd.DataFrame) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    first = None
    for processes, same in group.groupby("processes"):
        speed = float(same["audio_seconds_per_second"].median())
        first = first or (float(str(processes)), speed)
        step = float(same["step_seconds"].astype(float).median())
        share = float((same["communication_seconds"].astype(float) / same["step_seconds"].astype(float)).median())
        nodes = same["nodes"].astype(float)
        if "axes.cluster.nodes" in same:
            nodes = nodes.fillna(same["axes.cluster.nodes"].astype(float))
        speedup = speed / first[1]
        rows.append(
            {
                "size": size,
                "scaling": scaling,
                "processes": int(float(str(processes))),
                "nodes": nodes.iloc[0],
                "global_batch": int(same["global_batch"].iloc[0]),
                "audio_seconds_per_second": speed,
                "speedup": speedup,
                "efficiency": speedup / (float(str(processes)) / first[0]),
                "step_seconds": step,
                "communication_share": share,
                "runs": len(same),
                "run_ids": " ".join(same["run_id"]),
            }
        )
    return rows


def nodes_figure(table: pd.DataFrame) -> Figure | None:
    """Speed and efficiency against processes, a line a size and kind of scaling; ideal dashed."""
    if table.empty:
        return None
    with style.applied():
        figure = Figure(figsize=(6.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        batch = table["global_batch"] / table["processes"]
        each = table.assign(fixed=table["global_batch"].where(table["scaling"] == "strong", batch))
        for number, ((size, scaling, fixed), line) in enumerate(each.groupby(["size", "scaling", "fixed"], sort=False)):
            what = f"{fixed:g} crops" if scaling == "strong" else f"{fixed:g} crops a process"
            look = {"color": style.color(number), "marker": style.marker(number)}
            left.plot(line["processes"], line["audio_seconds_per_second"], label=f"{size}, {scaling}: {what}", **look)
            first = line.iloc[0]
            ideal = first["audio_seconds_per_second"] * line["processes"] / first["processes"]
            left.plot(line["processes"], ideal, zorder=1, **style.REFERENCE)
            right.plot(line["processes"], line["efficiency"], **look)
        ticks = sorted(table["processes"].unique())
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
            ax.minorticks_off()
            ax.set_xlabel("Processes")
            ax.grid(axis="y")
            sns.despine(ax=ax)
        left.set_yscale("log", base=2)
        left.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))  # one octave of powers of 2 has one tick
        left.yaxis.set_minor_locator(NullLocator())
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_ylabel("Audio-seconds a second")
        right.axhline(1, zorder=1, **style.REFERENCE)
        right.set_ylim(0, max(1.1, table["efficiency"].max() * 1.05))
        right.set_ylabel("Efficiency")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
