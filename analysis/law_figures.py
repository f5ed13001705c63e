"""Figures of what is claimed: laws with bands and held-out points, isoFLOP curves, published systems, breakdowns.

As in `analysis.figures` each returns a matplotlib figure, or None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analysis import published, style
from analysis.breakdown import breakdown
from analysis.cells import over_seeds
from analysis.claims import Claim, Claims
from analysis.comparable import Comparable, largest_budgets
from analysis.families import unprocessed_mean
from analysis.gather import UNPROCESSED
from analysis.isoflop import Curve, IsoFlop, Path
from analysis.quantities import Quantity, human_count, human_macs
from analysis.settings import DATA, SIZES

POINTS = 120  # of a curve
REACH = 2.0  # how far beyond the cells a law is drawn, as a factor
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
DOTTED: Any = (0, (1, 1.5))
MOST_NAMED = 12  # points of a panel
LEAST_SHOWN = 10.0  # on a logarithmic axis a bar ends at the mean over this where its spread reaches 0


def laws_figure(found: Claims) -> Figure | None:
    """Loss against N, D and C: cells, the law with its interval and prediction interval, and what was held out."""
    shown = [claim for name in ("L(N)", "L(D)", "L(C)") if (claim := found.loss(name)) and claim.fitted.is_usable]
    if not shown:
        return None
    with style.applied():
        figure = Figure(figsize=(3.0 * len(shown) + 0.3, 3.3), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for ax, claim in zip(panels, shown, strict=True):
            _law_panel(ax, found, claim)
        handles = _law_handles(any(len(test.cells) for claim in shown for test in claim.held_out[:1]))
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(shown) - 1, frameon=False)
    return figure


def _law_panel(ax: Axes, found: Claims, claim: Claim) -> None:
    variable = claim.law.variables[0]
    rows = found.runs[found.runs["run_id"].isin(claim.run_ids)]
    cells = _cells(rows, claim.quantity)
    low, high = cells[variable].min(), cells[variable].max()
    x = np.geomspace(low / REACH**0.5, high * REACH, POINTS)
    level = found.settings.level
    law = claim.fitted
    if law.has_interval:
        ax.fill_between(x, *law.prediction_interval({variable: x}, level), color="0.9", linewidth=0)
        ax.fill_between(x, *law.band({variable: x}, level), color="0.75", linewidth=0)
    ax.plot(x, law.predict({variable: x}), color=style.color(0), linewidth=1.4)
    above = cells["std"].fillna(0)
    below = cells["mean"] - np.maximum(cells["mean"] - above, cells["mean"] / LEAST_SHOWN)
    bars = np.stack([below, above])
    ax.errorbar(cells[variable], cells["mean"], bars, fmt="o", color=style.color(0), elinewidth=0.8, capsize=2)
    for test in claim.held_out[:1]:
        for _, cell in test.cells.iterrows():
            center = cell["predicted"]
            bar = [[center - cell["low"]], [cell["high"] - center]]
            at = cell[variable] * 1.06
            ax.errorbar([at], [center], bar, fmt="D", color=style.color(1), markerfacecolor="white", capsize=3)
    _name_points(ax, cells, variable, "mean")
    _log_x(ax, x[0], x[-1])
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    _log_y(ax, float((cells["mean"] - below).min()), float((cells["mean"] + above).max()))
    label = {"N": SIZES[claim.measure], "D": DATA[found.data], "C": "multiply-accumulates of training"}[variable]
    ax.set_xlabel(label[0].upper() + label[1:])
    ax.set_ylabel(claim.quantity.axis)
    verdict = claim.held_out[0].verdict if claim.held_out else ""
    told = f"\nheld-out: {verdict}" if verdict in ("pass", "fail") else ""
    ax.set_title(f"{claim.law.name} = {_written_law(claim)}{told}", fontsize=7.5)
    ax.grid(axis="y")


def _written_law(claim: Claim) -> str:
    p, variable = claim.fitted.parameters, claim.law.variables[0]
    return f"{p['E']:.3g} + {p['A']:.3g} {variable}$^{{-{p['alpha']:.3g}}}$"


def _law_handles(has_predictions: bool) -> list[Any]:
    handles: list[Any] = [
        Line2D([], [], color=style.color(0), marker="o", linestyle="", label="cells, mean ± sd over seeds"),
        Line2D([], [], color=style.color(0), label="law"),
        Patch(color="0.75", label="interval of the law"),
        Patch(color="0.9", label="of a new run"),
    ]
    predicted = Line2D([], [], color=style.color(1), marker="D", markerfacecolor="white", label="held out: predicted")
    return [*handles, predicted] if has_predictions else handles


def isoflop_figure(iso: IsoFlop, found: Claims) -> Figure | None:
    """Left: loss against N at each budget of compute, with curve and minimum. Right: the path N*(C)."""
    drawn = [curve for curve in iso.curves if curve.coefficients]
    if not drawn:
        return None
    unit = SIZES[found.settings.size]
    with style.applied():
        figure = Figure(figsize=(6.6, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        _curves_panel(left, drawn, unit)
        minima = [curve for curve in drawn if np.isfinite(curve.best_size)]
        if minima:
            _path_panel(right, minima, iso.path, found.settings.level)
        else:
            right.text(0.5, 0.5, "no minimum within\nthe sizes trained", ha="center", transform=right.transAxes)
            right.set_xticks([])
            right.set_yticks([])
        right.set_xlabel("Training compute (MACs)")
        right.set_ylabel(f"Best size ({unit})")
    return figure


def _curves_panel(ax: Axes, curves: Sequence[Curve], unit: str) -> None:
    """Cells, curve and minimum of each budget."""
    values: list[float] = []
    for number, curve in enumerate(curves):
        look: dict[str, Any] = {"color": style.color(number), "marker": style.marker(number)}
        cells = curve.cells
        ax.plot(cells["N"], cells["loss"], linestyle="", label=human_macs(curve.compute), **look)
        x = np.geomspace(cells["N"].min(), cells["N"].max(), POINTS)
        ax.plot(x, curve.loss(x), color=look["color"], linestyle=DASHES[number % len(DASHES)], linewidth=1.1)
        values += list(cells["loss"])
        if np.isfinite(curve.best_size):
            ax.plot(curve.best_size, curve.best_loss, marker="*", markersize=10, color="black", zorder=5)
    _log_x(ax, min(c.cells["N"].min() for c in curves), max(c.cells["N"].max() for c in curves))
    ax.set_yscale("log")
    _log_y(ax, min(values), max(values))
    ax.set_xlabel(unit[0].upper() + unit[1:])
    ax.set_ylabel("Validation loss")
    handles, labels = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", marker="*", linestyle="", markersize=8))
    ax.legend(handles, [*labels, "minimum"], frameon=False, title="Training compute")
    ax.grid(axis="y")


def _path_panel(ax: Axes, minima: Sequence[Curve], path: Path, level: float) -> None:
    """The best size of each budget with its interval, and the path through them."""
    compute = np.array([curve.compute for curve in minima])
    ends: list[float] = []
    for curve in minima:
        low, high = np.clip(curve.interval(level), curve.cells["N"].min(), curve.cells["N"].max())
        bar = None if curve.bootstrap is None else [[curve.best_size - low], [high - curve.best_size]]
        ends += [curve.best_size] if bar is None else [low, high]
        ax.errorbar([curve.compute], [curve.best_size], bar, fmt="*", markersize=9, color="black", capsize=3)
    if np.isfinite(path.exponent):
        x = np.geomspace(compute.min() / REACH, compute.max() * REACH, POINTS)
        if path.bootstrap is not None:
            ax.fill_between(x, *path.band(x, level), color="0.85", linewidth=0)
        ax.plot(x, path.size_at(x), color=style.color(0))
        ax.set_title(f"N* ∝ C$^{{{path.exponent:.2f}}}$", fontsize=8)
    ax.set_yscale("log")
    _log_y(ax, min(ends), max(ends))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    _log_x(ax, compute.min(), compute.max())


def published_figure(found: Claims, metrics: tuple[Quantity, ...], data: str) -> Figure | None:
    """Metrics against MACs a second: of each size the cell of its largest budget, beside published systems.

    The same cells in every panel: nothing that was measured chooses them.
    """
    shown = [
        metric for metric in metrics if metric.key in published.UNPROCESSED and found.kept[metric.key].notna().any()
    ]
    if not shown:
        return None
    chosen = largest_budgets(found.kept)
    with style.applied():
        figure = Figure(figsize=(6.9, 2.7 * ((len(shown) + 1) // 2) + 0.4), layout="constrained")
        panels = list(figure.subplots((len(shown) + 1) // 2, 2, squeeze=False).flat)
        for ax, metric in zip(panels, shown, strict=False):
            _published_panel(ax, chosen, metric)
        for ax in panels[len(shown) :]:
            ax.set_axis_off()
        ours = f"this study ({data}), of each size its largest budget"
        handles = [
            Line2D([], [], color=style.color(0), marker="o", label=ours),
            Line2D([], [], color="0.45", marker="s", linestyle="", label="published, VoiceBank+DEMAND"),
            Line2D([], [], label="unprocessed, this study", **style.REFERENCE | {"linestyle": "-"}),
            Line2D([], [], label="unprocessed, VoiceBank+DEMAND", **style.REFERENCE | {"linestyle": DOTTED}),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _published_panel(ax: Axes, runs: pd.DataFrame, metric: Quantity) -> None:
    """A metric of this study's cells and of the published systems that have it, and of the unprocessed inputs."""
    best = _cells(runs, metric).sort_values("macs_per_second")
    x, mean, spread = best["macs_per_second"], best["mean"], best["std"].fillna(0)
    ax.plot(x, mean, color=style.color(0), marker="o")
    ax.errorbar(x, mean, spread, fmt="none", ecolor=style.color(0), capsize=2)
    _name_points(ax, best, "macs_per_second", "mean")
    for system in published.SYSTEMS:
        if metric.key in system.metrics:
            _published_point(ax, system, system.metrics[metric.key])
    ours, theirs = unprocessed_mean(runs, UNPROCESSED + metric.key), published.UNPROCESSED[metric.key]
    for level, look in ((ours, "-"), (theirs, DOTTED)):
        if np.isfinite(level):
            ax.axhline(level, zorder=1, **style.REFERENCE | {"linestyle": look})
    xs = [*x, *(system.macs_per_second for system in published.SYSTEMS)]
    _log_x(ax, min(xs), max(xs))
    ax.margins(y=0.15)
    ax.set_xlabel("MACs per second")
    ax.set_ylabel(metric.axis)
    ax.grid(axis="y")


def _published_point(ax: Axes, system: published.Published, value: float) -> None:
    ax.plot(system.macs_per_second, value, marker="s", markersize=4, color="0.45", linestyle="")
    is_above = system.short not in ("BSRNN xt", "BSRNN-MD")  # where another system's name would be in the way
    ax.annotate(
        system.short,
        (system.macs_per_second, value),
        xytext=(0, 4 if is_above else -4),
        textcoords="offset points",
        ha="center",
        va="bottom" if is_above else "top",
        fontsize=6,
        color="0.3",
        path_effects=style.HALO,
    )


def breakdown_figure(cells: Comparable, metric: Quantity) -> Figure | None:
    """Gain of a metric over the unprocessed input, by input SNR and by noise, a line or row of points a size."""
    table = breakdown(cells, metric)
    parts = [(name, rows) for name, rows in table.groupby("by", sort=False) if len(rows["level"].unique()) > 1]
    if not parts:
        return None
    sizes = list(dict.fromkeys(table.sort_values("N")["size"]))
    with style.applied():
        figure = Figure(figsize=(6.9, 2.9), layout="constrained")
        panels = figure.subplots(
            1, len(parts), squeeze=False, sharey=True, width_ratios=[2 if n == "noise" else 1.4 for n, _ in parts]
        )
        for ax, (name, rows) in zip(panels[0], parts, strict=True):
            levels = sorted(rows["level"].unique(), key=lambda v: (isinstance(v, str), v))
            for number, size in enumerate(sizes):
                line = rows[rows["size"] == size].set_index("level").reindex(levels)
                shift = (number - (len(sizes) - 1) / 2) * (0.7 / max(len(sizes), 4))
                ax.errorbar(
                    np.arange(len(levels)) + shift,
                    line["gain"],
                    line["standard_error"],
                    fmt=style.marker(number),
                    color=style.color(number),
                    elinewidth=0.8,
                    label=size,
                )
            texts = [f"{level:g}" if not isinstance(level, str) else level for level in levels]
            ax.set_xticks(np.arange(len(levels)), texts, rotation=0 if name == "snr_db" else 30)
            ax.set_xlabel({"snr_db": "SNR of the input (dB)", "noise": "Noise"}[str(name)])
            ax.axhline(0, zorder=1, **style.REFERENCE)
            ax.grid(axis="y")
            ax.yaxis.set_major_locator(MaxNLocator(5))
        panels[0][0].set_ylabel(f"{metric.axis}: gain")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(sizes), frameon=False)
    return figure


# --- parts ---------------------------------------------------------------------------------


def _cells(runs: pd.DataFrame, quantity: Quantity) -> pd.DataFrame:
    """Means and standard deviations over the seeds of each cell."""
    known = runs[runs[quantity.key].notna()]
    about = known.groupby("cell")[["size", "N", "D", "C", "macs_per_second"]].first()
    return about.join(over_seeds(known, [quantity.key]).set_axis(["mean", "std", "seeds"], axis=1))


def _name_points(ax: Axes, cells: pd.DataFrame, x: str, y: str) -> None:
    """The size at each point; of many points where it changes along x."""
    ordered = cells.sort_values(x, kind="stable")
    changes = ordered["size"] != ordered["size"].shift()
    for _, cell in (ordered if len(ordered) <= MOST_NAMED else ordered[changes]).iterrows():
        ax.annotate(
            str(cell["size"]),
            (cell[x], cell[y]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=6.5,
            path_effects=style.HALO,
        )


def _log_x(ax: Axes, low: float, high: float) -> None:
    style.log_axis(ax, low, high)
    if high > low:  # closer than style has it, but not so close about a single value that no tick is left
        ratio = max(high / low, 1.5)
        ax.set_xlim(low / ratio**0.08, high * ratio**0.08)


def _log_y(ax: Axes, low: float, high: float) -> None:
    """A few plain numbers on a logarithmic y axis that may span less than a decade."""
    ratio = max(high / low, 1.05)
    bottom, top = low / ratio**0.2, high * ratio**0.25
    ticks = np.geomspace(bottom * ratio**0.1, top / ratio**0.1, 5)
    digits = 2 if ratio > 1.3 else int(np.ceil(-np.log10(ratio - 1))) + 2
    ax.set_yticks(sorted({float(f"{tick:.{digits}g}") for tick in ticks}))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(bottom, top)
