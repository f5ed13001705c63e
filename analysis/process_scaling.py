"""How training scales over processes: speed, speedup, efficiency, and time in communication.

Strong scaling: the same global batch on more processes. Weak scaling: the global batch grows with them. Efficiency is
audio-seconds per second and process over those of the fewest processes (on the fewest nodes) of the same size, kind and
setting of all else that decides results or speed, hardware too, whether an axis names it or not. Of runs that finished.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis import style
from analysis.families import with_settings
from analysis.gather import Study
from analysis.other_axes import BUDGET_AXES
from analysis.quantities import axis_value

# Of what the number of processes and the batch are made; how long training goes on is no matter of its speed either.
SCALED_AXES = ("cluster.nodes", "cluster.gpus_per_node", "cluster.processes_per_node", "train.global_batch")
# Of how a run is executed, what decides its speed beside the number of processes.
OF_SPEED = ("audit", "compile", "device", "micro_batch", "num_workers", "threads", "zero_stage")
COLUMNS = [
    "size",
    "setting",
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


def process_scaling(study: Study) -> pd.DataFrame:
    """A row a size, setting of all else, kind of scaling, number of processes and of nodes.

    No rows if no two numbers of processes are of one size, setting and kind of hardware.
    setting: "" if nothing else tells runs of a size apart.
    """
    runs = study.finished[np.isfinite(study.finished["audio_seconds_per_second"].astype(float))]
    runs = runs.assign(processes=runs["world_size"].astype(float), nodes=runs["nodes"].astype(float))
    runs = runs[runs["processes"].notna()]
    if runs["processes"].nunique() < 2:
        return pd.DataFrame(columns=COLUMNS)
    runs["per_process"] = runs["global_batch"] / runs["processes"]
    runs, others = _with_other_axes(runs, study)
    by_size = runs.groupby("size")
    told = [axis for axis in others if (by_size[f"axes.{axis}"].nunique(dropna=False) > 1).any()]
    rows = []
    for _, alike in runs.groupby(["size", *(f"axes.{axis}" for axis in others)], sort=False, dropna=False):
        one = alike.iloc[0]
        about = {
            "size": str(one["size"]),
            "setting": ", ".join(f"{axis}={axis_value(one[f'axes.{axis}'])}" for axis in told),
        }
        for scaling, fixed in (("strong", "global_batch"), ("weak", "per_process")):
            for _, group in alike.groupby(fixed):
                if group["processes"].nunique() > 1:
                    rows += [about | {"scaling": scaling} | row for row in _rows(group)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _with_other_axes(runs: pd.DataFrame, study: Study) -> tuple[pd.DataFrame, list[str]]:
    """(runs with a column axes.SETTING for what tells them apart and no axis shows, all such settings and axes)."""
    named = [axis for axis in study.axes if axis not in SCALED_AXES and not axis.startswith(BUDGET_AXES)]
    alike = runs.groupby(["size", *(f"axes.{axis}" for axis in named)], dropna=False).ngroup()
    of_speed = [f"execution.{name}" for name in OF_SPEED]
    settings = {
        run_id: {key: value for key, value in study.science[run_id].items() if key not in SCALED_AXES}
        | {key: value for key, value in study.execution[run_id].items() if key in of_speed}
        | _hardware(study, run_id)
        for run_id in runs["run_id"]
    }
    runs, axes = with_settings(runs, study, settings, alike)
    return runs, named + [axis for axis in axes if axis not in study.axes]


def _hardware(study: Study, run_id: str) -> dict[str, str]:
    """What a run trained on, by its kind: GPUs, or CPUs where there was none; {} where it is not on record."""
    for part in ("hardware.gpu", "hardware.cpu"):
        kind = study.provenance[part].get(run_id) if part in study.provenance else None
        if isinstance(kind, str) and kind != "none":
            return {part: kind}
    return {}


def _rows(group: pd.DataFrame) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    first = None
    for _, same in group.groupby(["processes", "nodes"], dropna=False):
        processes, speed = float(same["processes"].iloc[0]), float(same["audio_seconds_per_second"].median())
        first = first or (processes, speed)
        step = float(same["step_seconds"].astype(float).median())
        share = float((same["communication_seconds"].astype(float) / same["step_seconds"].astype(float)).median())
        speedup = speed / first[1]
        rows.append(
            {
                "processes": int(processes),
                "nodes": same["nodes"].iloc[0],
                "global_batch": int(same["global_batch"].iloc[0]),
                "audio_seconds_per_second": speed,
                "speedup": speedup,
                "efficiency": speedup / (processes / first[0]),
                "step_seconds": step,
                "communication_share": share,
                "runs": len(same),
                "run_ids": " ".join(same["run_id"]),
            }
        )
    return rows


def process_figure(table: pd.DataFrame) -> Figure | None:
    """Speed and efficiency against processes, a line a size, setting and kind of scaling; ideal dashed."""
    if table.empty:
        return None
    with style.applied():
        figure = Figure(figsize=(6.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        batch = table["global_batch"] / table["processes"]
        each = table.assign(fixed=table["global_batch"].where(table["scaling"] == "strong", batch))
        lines = each.groupby(["size", "setting", "scaling", "fixed"], sort=False)
        for number, ((size, setting, scaling, fixed), line) in enumerate(lines):
            of = f"{size}, {setting}" if setting else size
            what = f"{fixed:g} crops" if scaling == "strong" else f"{fixed:g} crops a process"
            look = {"color": style.color(number), "marker": style.marker(number)}
            left.plot(line["processes"], line["audio_seconds_per_second"], label=f"{of}, {scaling}: {what}", **look)
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
        left.set_yscale("log", base=2)
        left.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))  # one octave of powers of 2 has one tick
        left.yaxis.set_minor_locator(NullLocator())
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_ylabel("Audio-seconds per second")
        right.axhline(1, zorder=1, **style.REFERENCE)
        right.set_ylim(0, max(1.1, table["efficiency"].max() * 1.05))
        right.set_ylabel("Efficiency")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
