"""Figures of a study: quality against size, compute and data, and the training curves.

Each function returns a matplotlib figure, or None where there is nothing to draw: an empty
figure is worse than a sentence. `analysis.style` says how they look and writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.families import family_names, has_shared_sizes, tells_families, unprocessed_mean, with_families
from analysis.gather import Study
from analysis.quantities import MISSING, Quantity, axis_value, human_hours, round_hours
from analysis.scaling_table import ScalingTable

AXES = {"num_params": "Parameters", "macs_per_second": "MACs per second", "hours": "Hours of training audio"}
# Where the unprocessed input lies so far away that the cells would share less than this
# fraction of the panel, its value is named in the panel instead of drawn.
LEAST_SPAN = 0.2
# A training curve is drawn through at most this many points.
CURVE_POINTS = 400
# Of more runs so many, evenly spaced over the plan, are drawn.
MOST_LINES = 200
MOST_NAMES = 8  # of lines in a legend
LEGEND_ROOM = 0.2  # inches beside a legend
LONGEST_LABEL = 24  # letters of a label beside a row; longer ones are broken
BREAK = ",\n"  # between the settings of a label
ROW_HEIGHT, LEGEND_LINE = 1.95, 0.16  # inches of a row of the scaling figure at the least, and of a line of its legend


def scaling_figure(table: ScalingTable) -> Figure | None:
    """Validation loss and each metric (columns) against parameters and MACs/s (rows), log x axes.

    Where the study varies hours, a third row has them on x. Points are means over seeds with
    sample standard deviations as bars; a single seed has no bar. None if no cell has a value.
    """
    quantities = [quantity for quantity in (table.loss, *table.metrics) if _has_values(table.cells, quantity)]
    cells = table.cells[table.cells["seeds_finished"] > 0]
    if not quantities:
        return None
    rows = ["num_params", "macs_per_second"]
    if cells["hours"].nunique() > 1:
        rows.append("hours")
    with style.applied():
        lines = {x: _series(cells, table.axes, x) for x in rows}
        several = any(names for names, _ in lines.values())
        has_level = any(np.isfinite(table.unprocessed.get(f"{quantity.key}_mean", np.nan)) for quantity in quantities)
        legends = {x: _row_legend(names, series, has_level) for x, (names, series) in lines.items()} if several else {}
        # 1.0 for a row of the usual height
        heights = [_row_height(*legends[x]) / ROW_HEIGHT if several else 1.0 for x in rows]
        beside = (
            max(_legend_width(_in_lines(text) for text in series) for _, series in lines.values()) if several else 0
        )
        width = max(4.2, 2.0 * len(quantities)) + beside
        # Letters of a legend come out a little wider at another resolution than the one of the layout.
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1 - several * LEGEND_ROOM / width, 1))
        figure = Figure(figsize=(width, ROW_HEIGHT * sum(heights) + 0.3), layout=layout)
        panels = figure.subplots(len(rows), len(quantities), squeeze=False, height_ratios=heights)
        for x, row in zip(rows, panels, strict=True):
            _, series = lines[x]
            for quantity, ax in zip(quantities, row, strict=True):
                _panel(ax, cells, series, x, quantity, table.unprocessed)
            if several:  # hues mean something else in each row, so each has its own legend
                handles, title = legends[x]
                beside_row: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
                row[-1].legend(handles=handles, title=title or None, frameon=False, **beside_row)
        if not several:
            handles = _handles(lines["num_params"][1], has_level)
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.align_ylabels()
    return figure


def curves_figure(study: Study) -> Figure | None:
    """Validation and smoothed training loss against steps, a panel a size, a line a run.

    Runs that have not finished are drawn as far as they came, and a failed one ends in a cross.
    Of more than MOST_LINES runs so many are drawn.
    None if no run has a finite loss on record.
    """
    curves = study.curves[study.curves["loss"].notna()] if "loss" in study.curves else study.curves
    if curves.empty:
        return None
    runs, axes = with_families(study.runs.assign(hours=study.runs["hours"].map(round_hours)), study)
    telling = [axis for axis in axes if axis not in study.axes and tells_families(axis)]
    runs["family"] = family_names(runs, telling)
    if not has_shared_sizes(runs):
        runs["family"] = ""  # the panels tell them apart
    runs = runs[runs["run_id"].isin(curves["run_id"].unique())]
    if len(runs) > MOST_LINES:
        runs = runs.iloc[np.linspace(0, len(runs) - 1, MOST_LINES).astype(int)]
        curves = curves[curves["run_id"].isin(runs["run_id"])]
    runs = runs.sort_values("num_params", kind="stable")
    sizes = list(dict.fromkeys(runs["size"]))
    names, series = _series(runs, [axis for axis in axes if axis not in telling], "size")
    lines = list(dict.fromkeys(series))
    columns = min(4, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    by_run = dict(iter(curves.groupby("run_id", observed=True)))
    with style.applied():
        figure = Figure(figsize=(max(4.2, 2.9 * columns), 2.5 * rows + 0.4), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for ax, size in zip(panels, sizes, strict=False):
            for index, run in runs[runs["size"] == size].iterrows():
                _curve(ax, by_run[run["run_id"]], run, lines.index(series[index]))
            ax.set_title(size)
            ax.grid(axis="y")
        for number, ax in enumerate(panels):
            if number >= len(sizes):
                ax.set_axis_off()
                continue
            if number + columns >= len(sizes):
                ax.tick_params(labelbottom=True)
                ax.set_xlabel("Optimiser step")
            if number % columns == 0:
                ax.set_ylabel("Loss")
        level = unprocessed_mean(runs, "unprocessed_validation_loss")
        _loss_limits(panels[: len(sizes)], curves, level)
        handles = _curves_handles(bool(np.isfinite(level)), bool((runs["state"] == "failed").any()))
        own = _handles(series) if names else []
        for handle in own:
            handle.set_label(f"{', '.join(names)} {_in_one_line(str(handle.get_label()))}")
        handles += _at_most(own)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=_legend_columns(figure, handles), frameon=False
        )
    return figure


def _legend_columns(figure: Figure, handles: Sequence[Any]) -> int:
    """As many as fit the figure's width."""
    return max(1, min(6, len(handles), int(figure.get_figwidth() / _legend_width(_labels(handles)))))


def _labels(handles: Sequence[Any]) -> list[str]:
    return [str(handle.get_label()) for handle in handles]


def _legend_width(labels: Iterable[str]) -> float:
    """Inches: one for eleven letters of the longest line, and half a one for the line before it."""
    return 0.5 + max(len(line) for label in labels for line in label.split("\n")) / 11


def _in_lines(label: str) -> str:
    """A long label a setting a line; a setting is broken only if it is too long by itself."""
    if len(_in_one_line(label)) <= LONGEST_LABEL:
        return _in_one_line(label)
    settings = label.split(BREAK)
    return BREAK.join(text if len(text) <= LONGEST_LABEL else text.replace(", ", BREAK) for text in settings)


def _in_one_line(label: str) -> str:
    return label.replace(BREAK, ", ")


# --- the panels of the scaling figure ------------------------------------------------------


def _has_values(cells: pd.DataFrame, quantity: Quantity) -> bool:
    return bool((cells[f"{quantity.key}_n"] > 0).any())


def _series(cells: pd.DataFrame, axes: Sequence[str], x: str) -> tuple[list[str], pd.Series]:
    """Which line each cell is on: (what tells lines apart, a text for each cell, its settings joined by BREAK).

    A line joins cells of one family that differ in x; of size, hours, steps and axes, what x and the ones
    before do not determine splits lines.
    """
    candidates = {"size": "Size"} if x == "hours" else {"hours": "Hours"}
    # An axis of the sweep says more than the steps that followed from it.
    candidates |= {f"axes.{axis}": axis for axis in axes if axis != "data.hours"}
    candidates |= {"steps": "Steps", "axes.data.hours": "data.hours"} if "data.hours" in axes else {"steps": "Steps"}
    telling, known = [], [x]
    for column in candidates:
        if _tells(cells, column, known):
            known.append(column)
            telling.append(column)
    families = {f"axes.{axis}": axis for axis in axes if tells_families(axis)}
    families |= {"family": "Family"} if "family" in cells else {}
    for column in families:  # whatever x determines
        if _tells(cells, column, telling):
            telling.append(column)
    texts = pd.Series("", index=cells.index)
    for number, column in enumerate(telling):
        of_axis = column.startswith("axes.")
        texts = texts.str.cat(cells[column].map(axis_value if of_axis else _text), sep=BREAK if number else "")
    names = [(candidates | families)[column] for column in telling]
    return names, texts


def _tells(cells: pd.DataFrame, column: str, known: list[str]) -> bool:
    """Whether cells differ in a column that are alike in all that is known."""
    alike = cells.groupby(known, dropna=False)[column] if known else cells[column]
    return bool(np.any(alike.nunique(dropna=False) > 1))


def _text(value: object) -> str:
    if value is None or value != value:
        return MISSING
    return human_hours(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _panel(
    ax: Axes, cells: pd.DataFrame, series: pd.Series, x: str, quantity: Quantity, unprocessed: pd.Series
) -> None:
    mean, std = f"{quantity.key}_mean", f"{quantity.key}_std"
    drawn = cells[cells[mean].notna()]
    # One list of series for all panels of a row, so that a hue keeps its meaning where a cell is missing.
    for number, text in enumerate(dict.fromkeys(series)):
        line = drawn[series.loc[drawn.index] == text].sort_values(x)
        look: dict[str, Any] = {"color": style.color(number), "marker": style.marker(number)}
        ax.plot(line[x], line[mean], markeredgewidth=0, **look)
        spread = line[line[std].notna()]
        if len(spread):
            ax.errorbar(
                spread[x], spread[mean], spread[std], fmt="none", ecolor=look["color"], elinewidth=1.0, capsize=2
            )
    style.log_axis(ax, cells[x].min(), cells[x].max(), most_ticks=3)  # of "300 M" no more stand side by side
    low, high = (drawn[mean] - drawn[std].fillna(0)).min(), (drawn[mean] + drawn[std].fillna(0)).max()
    level = unprocessed.get(f"{quantity.key}_mean", np.nan)
    if np.isfinite(level):
        near = len(drawn) == 1 or (high - low) >= LEAST_SPAN * (max(high, level) - min(low, level))
        if near:
            ax.axhline(level, zorder=1, **style.REFERENCE)
            low, high = min(low, level), max(high, level)
        else:
            _name_level(ax, level, above=level > high, quantity=quantity)
    room = (high - low) or abs(high) * 0.1 or 1.0
    ax.set_ylim(low - 0.16 * room, high + 0.2 * room)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(AXES[x])
    ax.set_ylabel(quantity.axis)
    ax.grid(axis="y")
    if x != "hours":
        _name_sizes(ax, drawn, x, mean)


def _name_level(ax: Axes, level: float, above: bool, quantity: Quantity) -> None:
    arrow, y, side = ("↑", 0.99, "top") if above else ("↓", 0.02, "bottom")
    text = f"unprocessed {level:.{quantity.digits}f} {arrow}"
    ax.text(0.98, y, text, transform=ax.transAxes, ha="right", va=side, fontsize=6.5, color="0.35")


def _name_sizes(ax: Axes, drawn: pd.DataFrame, x: str, mean: str) -> None:
    """The size's name at its topmost point, on the side that the line leaves free."""
    top = drawn.loc[drawn.groupby(x)[mean].idxmax()].sort_values(x)
    values = top[mean].to_numpy()
    for number, (_, cell) in enumerate(top.iterrows()):
        before = values[number - 1] if number else values[number]
        after = values[number + 1] if number + 1 < len(values) else values[number]
        rises = after > values[number] or before < values[number]
        falls = after < values[number] or before > values[number]
        side = 0 if rises == falls else -1 if rises else 1
        # The outermost points have all the room beside them.
        is_end = len(top) > 1 and number in (0, len(top) - 1)
        if is_end:
            side = -1 if number == 0 else 1
        ax.annotate(
            str(cell["size"]),
            (cell[x], cell[mean]),
            xytext=(4.5 * side, 0 if is_end else 3.5),
            textcoords="offset points",
            ha={-1: "right", 0: "center", 1: "left"}[side],
            va="center" if is_end else "bottom",
            fontsize=7,
            path_effects=style.HALO,
        )


def _handles(series: pd.Series, has_level: bool = False) -> list[Line2D]:
    handles = [
        Line2D([], [], color=style.color(number), marker=style.marker(number), label=text or "mean over seeds")
        for number, text in enumerate(dict.fromkeys(series))
    ]
    return [*handles, Line2D([], [], label="unprocessed", **style.REFERENCE)] if has_level else handles


def _row_legend(names: Sequence[str], series: pd.Series, has_level: bool) -> tuple[list[Line2D], str]:
    """Handles and title of the legend beside a row."""
    handles = _at_most(_handles(series, has_level))
    for handle in handles:
        handle.set_label(_in_lines(str(handle.get_label())))
    return handles, _in_lines(BREAK.join(names))


def _row_height(handles: Sequence[Any], title: str) -> float:
    """Inches: of a legend with more lines than the usual row has room for, the legend's."""
    return max(ROW_HEIGHT, LEGEND_LINE * sum(len(text.splitlines()) for text in [*_labels(handles), title]))


def _at_most(handles: list[Line2D]) -> list[Line2D]:
    """Of more names than there is room for the first and the last."""
    if len(handles) <= MOST_NAMES:
        return handles
    rest = Line2D([], [], linestyle="", label=f"and {len(handles) - MOST_NAMES} more")
    return [*handles[: MOST_NAMES - 1], rest, handles[-1]]


# --- training curves -----------------------------------------------------------------------


def _curve(ax: Axes, curve: pd.DataFrame, run: pd.Series, number: int) -> None:
    look: dict[str, Any] = {"color": style.color(number)}
    train = curve[curve["kind"] == "train"]
    validation = curve[curve["kind"] == "validation"]
    if len(train):
        smooth = smoothed(train["loss"])
        every = max(1, len(train) // CURVE_POINTS)
        ax.plot(train["step"].iloc[::every], smooth.iloc[::every], linewidth=0.8, alpha=0.55, **look)
    if len(validation):
        ax.plot(validation["step"], validation["loss"], marker=style.marker(number), markersize=3, **look)
    if run["state"] == "failed":
        last = curve.sort_values("step").iloc[-1]
        value = last["loss"] if last["kind"] == "validation" or not len(train) else smoothed(train["loss"]).iloc[-1]
        ax.plot(last["step"], value, marker="x", markersize=6, markeredgewidth=1.5, color="black", zorder=5)


def smoothed(loss: pd.Series) -> pd.Series:
    """A centred running mean over a twentieth of the steps on record, narrower at the ends."""
    window = max(1, len(loss) // 20) | 1
    return loss.rolling(window, center=True, min_periods=1).mean()


def _loss_limits(panels: Sequence[Axes], curves: pd.DataFrame, level: float) -> None:
    """Common limits that show the later course: the first steps of training may leave the panel."""
    validation = curves.loc[curves["kind"] == "validation", "loss"]
    train = curves.loc[curves["kind"] == "train", "loss"]
    low = min([*validation, train.quantile(0.02)] if len(train) else validation)
    high = max([*validation, train.quantile(0.9)] if len(train) else validation)
    if np.isfinite(level):
        for ax in panels:
            ax.axhline(level, zorder=1, **style.REFERENCE)
        low, high = min(low, level), max(high, level)
    room = (high - low) or abs(high) * 0.1 or 1.0
    panels[0].set_ylim(low - 0.08 * room, high + 0.08 * room)


def _curves_handles(has_level: bool, has_failed: bool) -> list[Line2D]:
    handles = [Line2D([], [], color="0.2", marker="o", markersize=3, label="validation")]
    handles.append(Line2D([], [], color="0.2", linewidth=0.8, alpha=0.55, label="training, smoothed"))
    if has_level:
        handles.append(Line2D([], [], label="unprocessed, validation", **style.REFERENCE))
    if has_failed:
        handles.append(Line2D([], [], color="black", marker="x", linestyle="", markeredgewidth=1.5, label="failed"))
    return handles
