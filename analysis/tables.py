"""The scaling table: one row a cell of the study, its numbers over the seeds that finished.

A cell is what differs in nothing but the seed: size, hours of audio, steps, and whatever other
axes the sweep had. Spread is the sample standard deviation over seeds, and a single seed has
none. What is planned and not finished is counted in its row and listed beneath the table.

`scaling_table` has the numbers, `written` their text; the renderers after them only arrange it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.cells import cell_numbers, over_seeds
from analysis.families import family_names, has_shared_sizes, tells_families, unprocessed_mean, with_families
from analysis.gather import UNPROCESSED, Study
from analysis.quantities import (
    MISSING,
    NOISIEST_GAIN,
    VALIDATION_LOSS,
    Quantity,
    human_count,
    human_hours,
    loss_of,
    round_hours,
)
from analysis.reading import flatten

SIZE_COLUMNS = ("size", "num_params", "num_params_folded", "num_params_non_decoder", "macs_per_second")
NOTE = (
    "Mean ± sample standard deviation over seeds (none for a single seed), of a metric over the utterances that it "
    "refused in no run; in parentheses the gain from unprocessed to enhanced."
)


@dataclass(frozen=True)
class ScalingTable:
    """The numbers of a scaling table.

    cells: one row a cell, by size, hours and steps; size, num_params, num_params_folded,
        num_params_non_decoder, macs_per_second, hours (rounded to the budget), steps, axes.NAME,
        family (its name; "" where axes alone tell families apart, or there is one),
        rtf (the real-time factor of streaming on one CPU thread, NaN where it was not measured),
        rtf_step (what enhanced the frames), rtf_cpu, label, steps_taken (mean over finished seeds;
        below the planned steps where any stopped early), seeds_finished, seeds_planned, run_ids
        and unfinished_run_ids (separated by spaces), and for each quantity QUANTITY_mean, QUANTITY_std (NaN below
        two seeds) and QUANTITY_n (seeds with a value); for metrics the same of METRIC_gain.
    unprocessed: the columns of the first row, the unprocessed input; NaN where corpora differ in it.
    loss: what the validation loss is: of held-out speakers or not.
    axes: the axes that tell rows apart beyond size, hours and steps.
    unfinished: run_id, label, state, reason and log of every planned run without a result.
    """

    cells: pd.DataFrame
    unprocessed: pd.Series
    loss: Quantity
    metrics: tuple[Quantity, ...]
    axes: tuple[str, ...]
    unfinished: pd.DataFrame


def scaling_table(study: Study) -> ScalingTable:
    """Cells of a study: grouped over everything but the seed, and summed up over finished runs."""
    runs = study.runs.assign(hours=study.runs["hours"].map(round_hours))
    factors = real_time_factors(study)
    runs[factors.columns] = factors
    runs, axes_and_families = with_families(runs, study)
    found = [axis for axis in axes_and_families if axis not in study.axes and tells_families(axis)]
    axes = _telling_axes(runs, [axis for axis in axes_and_families if axis not in found])
    telling = [axis for axis in axes_and_families if axis not in axes and tells_families(axis)]
    runs["cell"] = cell_numbers(runs, axes_and_families)
    finished = runs[runs["state"] == "finished"]
    by_cell = runs.groupby("cell")

    of_axes = [f"axes.{axis}" for axis in (*axes, *telling)]
    cells = by_cell[[*SIZE_COLUMNS, "hours", "steps", *of_axes, *factors.columns]].first()
    cells["family"] = family_names(cells, telling)
    cells["label"] = _labels(cells, axes)
    cells["seeds_finished"] = finished.groupby("cell").size().reindex(cells.index, fill_value=0)
    cells["seeds_planned"] = by_cell.size()
    cells["steps_taken"] = finished.groupby("cell")["steps_taken"].mean().reindex(cells.index)
    quantities = [VALIDATION_LOSS.key, NOISIEST_GAIN.key]
    quantities += [column for metric in study.metrics for column in (metric.key, f"{metric.key}_gain")]
    cells = cells.join(over_seeds(finished, quantities))
    counts = [f"{quantity}_n" for quantity in quantities]
    cells[counts] = cells[counts].fillna(0).astype(int)
    unfinished = runs[runs["state"] != "finished"]
    for column, of in (("run_ids", finished), ("unfinished_run_ids", unfinished)):
        cells[column] = of.groupby("cell")["run_id"].agg(" ".join).reindex(cells.index, fill_value="")
    listed = unfinished.assign(
        label=unfinished["cell"].map(cells["label"]),
        log=pd.Series([_below(study.directory.path, log) for log in unfinished["log"]], unfinished.index, dtype=object),
    )
    return ScalingTable(
        cells=cells.sort_values(["num_params", "hours", "steps"], kind="stable").reset_index(drop=True),
        unprocessed=_unprocessed(finished, study.metrics),
        loss=loss_of(runs["train_on_validation"]),
        metrics=study.metrics,
        axes=axes,
        unfinished=listed[["run_id", "label", "seed", "state", "reason", "log"]].reset_index(drop=True),
    )


def real_time_factors(study: Study) -> pd.DataFrame:
    """rtf, rtf_step and rtf_cpu of each run's architecture, as `python -m scaling.rtf` measured it, or nothing."""
    measured = {_architecture(flatten({"model": row["model"]})): row for row in study.directory.read_rtf()}
    found = [measured.get(_architecture(study.science[run_id]), {}) for run_id in study.runs["run_id"]]
    columns = {"rtf": "rtf", "rtf_step": "step", "rtf_cpu": "cpu"}
    rows = [[row.get(name) for name in columns.values()] for row in found]
    return pd.DataFrame(rows, index=study.runs.index, columns=[*columns]).astype({"rtf": float})


def _architecture(science: dict[str, str]) -> frozenset[tuple[str, str]]:
    """What decides the network among the settings that decide a result."""
    return frozenset((name, value) for name, value in science.items() if name.startswith("model."))


def _telling_axes(runs: pd.DataFrame, axes: Sequence[str]) -> tuple[str, ...]:
    """The axes that size, hours and the axes before them do not already determine."""
    telling: list[str] = []
    known = ["size", "hours"]
    for axis in axes:
        if (runs.groupby(known, dropna=False)[f"axes.{axis}"].nunique(dropna=False) > 1).any():
            telling.append(axis)
            known.append(f"axes.{axis}")
    return tuple(telling)


def _labels(cells: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """A name for each row: its size, and of the rest what differs between rows."""
    labels = []
    is_shared = has_shared_sizes(cells)
    for _, cell in cells.iterrows():
        parts = [str(cell["size"])]
        if cells["hours"].nunique() > 1:
            parts.append(f"{human_hours(cell['hours'])} h")
        if cells["steps"].nunique() > 1:
            parts.append(f"{cell['steps']:,} steps")
        parts += [f"{axis}={axis_value(cell[f'axes.{axis}'])}" for axis in axes]
        labels.append(" · ".join(parts + [cell["family"]] * is_shared))
    return labels


def _unprocessed(finished: pd.DataFrame, metrics: Sequence[Quantity]) -> pd.Series:
    row: dict[str, object] = {"size": "unprocessed", "run_ids": " ".join(finished["run_id"])}
    for key in (VALIDATION_LOSS.key, *(metric.key for metric in metrics)):
        values = finished[UNPROCESSED + key]
        row |= {f"{key}_mean": unprocessed_mean(finished, UNPROCESSED + key), f"{key}_n": int(values.count())}
    return pd.Series(row)


def _below(folder: Path, log: object) -> str | None:
    """A log's path, from the study's folder where it lies in it."""
    if not isinstance(log, str):
        return None
    path, folder = Path(log).absolute(), folder.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else log


# --- text ----------------------------------------------------------------------------------


def written(table: ScalingTable) -> pd.DataFrame:
    """The table as a reader sees it: text under headings, the unprocessed input first."""
    rows = []
    for cell in (table.unprocessed, *(cell for _, cell in table.cells.iterrows())):
        has_cell = "label" in cell
        row = {"Size": str(cell["size"])}
        row["Parameters"] = human_count(cell["num_params"]) if has_cell else MISSING
        row["MACs/s"] = human_count(cell["macs_per_second"]) if has_cell else MISSING
        if table.cells["rtf"].notna().any():  # measured only where somebody asked for it
            factor = cell.get("rtf")
            row["RTF"] = MISSING if factor is None or pd.isna(factor) else f"{factor:.3g}"
        row["Hours"] = human_hours(cell["hours"]) if has_cell else MISSING
        row["Steps"] = steps_text(cell["steps"], cell["steps_taken"]) if has_cell else MISSING
        if table.cells["family"].nunique() > 1:
            row["Family"] = cell["family"] if has_cell else MISSING
        for axis in table.axes:
            row[axis] = axis_value(cell[f"axes.{axis}"]) if has_cell else MISSING
        row["Seeds"] = f"{cell['seeds_finished']} of {cell['seeds_planned']}" if has_cell else MISSING
        for quantity in (table.loss, *table.metrics):
            gain = cell.get(f"{quantity.key}_gain_mean")
            shown = "" if gain is None or pd.isna(gain) else f" ({gain:+.{quantity.digits}f})"
            row[quantity.heading] = _cell_text(cell, quantity) + shown
        row[NOISIEST_GAIN.heading] = _cell_text(cell, NOISIEST_GAIN, sign="+")
        rows.append(row)
    return pd.DataFrame(rows)


def _cell_text(cell: pd.Series, quantity: Quantity, sign: str = "") -> str:
    mean, std = cell.get(f"{quantity.key}_mean"), cell.get(f"{quantity.key}_std")
    text = mean_and_spread(mean, std, quantity, sign)
    averaged, finished = cell.get(f"{quantity.key}_n"), cell.get("seeds_finished")
    return f"{text}, of {averaged}" if averaged and finished and averaged < finished else text


def mean_and_spread(mean: float | None, std: float | None, quantity: Quantity, sign: str = "") -> str:
    """Mean ± standard deviation in the quantity's digits; a spread below what they can show is given as a bound."""
    if mean is None or pd.isna(mean):
        return MISSING
    text = f"{mean:{sign}.{quantity.digits}f}"
    if std is None or pd.isna(std):
        return text
    smallest = 10**-quantity.digits
    spread = f"{std:.{quantity.digits}f}" if std == 0 or std >= smallest / 2 else f"<{smallest:.{quantity.digits}f}"
    return f"{text} ± {spread}"


def steps_text(planned: int, taken: float) -> str:
    """Steps of a cell: as planned, and before them the mean of what its runs took where any stopped early."""
    return f"{taken:,.0f} of {planned:,}" if taken < planned else f"{planned:,}"


def axis_value(value: object) -> str:
    """The value of an axis as text."""
    if value is None or value != value:
        return MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(table: ScalingTable) -> pd.DataFrame:
    """The runs without a result as a reader sees them; no rows if all have finished."""
    names = {"run_id": "Run", "label": "Cell", "state": "State", "reason": "Reason", "log": "Log"}
    return table.unfinished[list(names)].rename(columns=names).fillna(MISSING).astype(str)


# --- renderers -----------------------------------------------------------------------------


def to_csv(table: ScalingTable) -> str:
    """All columns of the cells in full precision, the unprocessed input first."""
    columns = table.cells.drop(columns="label")
    first = table.unprocessed.to_frame().T.reindex(columns=columns.columns)
    whole = [name for name in columns.columns if pd.api.types.is_integer_dtype(columns[name])]
    both = pd.concat([first.astype(object), columns.astype(object)])
    both[whole] = both[whole].astype("Int64")
    return both.to_csv(index=False, lineterminator="\n")


def note(table: ScalingTable) -> str:
    """What the entries are."""
    is_partial = written(table).apply(lambda column: column.astype(str).str.contains(", of ")).any(axis=None)
    return (
        NOTE + (' "Of 2": so many of the finished seeds have a value.' if is_partial else "") + _rtf_note(table.cells)
    )


def _rtf_note(cells: pd.DataFrame) -> str:
    """On what the real-time factors were measured; nothing if they were not."""
    measured = cells.dropna(subset="rtf")
    if measured.empty:
        return ""
    labels = measured.groupby("rtf_step", sort=False)["label"].agg(", ".join)
    by = labels.index[0] if len(labels) == 1 else "; ".join(f"{step} ({of})" for step, of in labels.items())
    cpu = measured["rtf_cpu"].iloc[0]
    return f" RTF: seconds of CPU time per second of audio, streamed on one thread of {cpu}; frames enhanced by: {by}."


def to_markdown(table: ScalingTable) -> str:
    """The table and, beneath it, the runs without a result."""
    text = f"{markdown_table(written(table), numbers=True)}\n\n{note(table)}\n"
    if len(table.unfinished):
        text += f"\nNot finished ({len(table.unfinished)}):\n\n{markdown_table(listed(table))}\n"
    return text


def markdown_table(frame: pd.DataFrame, numbers: bool = False) -> str:
    """A frame of text as a Markdown table; with `numbers`, all but the first column aligned right."""
    lines = [[_markdown_cell(name) for name in frame.columns]]
    lines.append(["---", *["--:" if numbers else "---"] * (len(frame.columns) - 1)])
    lines += [[_markdown_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(value: object) -> str:
    return _one_line(str(value)).replace("|", "\\|")


def to_latex(table: ScalingTable) -> str:
    r"""A booktabs tabular to \input; what has not finished is named in comments at its end."""
    text = written(table)
    head = [
        "% \\usepackage{booktabs}; " + note(table).replace("±", "+-"),
        f"\\begin{{tabular}}{{l{'r' * (text.shape[1] - 1)}}}",
    ]
    rows = [" & ".join(latex_escape(str(value)) for value in row) + r" \\" for row in text.itertuples(index=False)]
    heading = " & ".join(latex_escape(name) for name in text.columns) + r" \\"
    lines = [
        *head,
        r"\toprule",
        heading,
        r"\midrule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    for _, run in listed(table).iterrows():
        lines.append(f"% not finished: {_one_line(run['Run'])} {run['State']}: {_one_line(run['Reason'])}")
    return "\n".join(lines) + "\n"


def latex_escape(text: str) -> str:
    """Text with LaTeX's special characters, and those it lacks in text mode, as commands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"±": r"$\pm$", "<": "$<$", ">": "$>$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    special |= {MISSING: "--", "·": r"$\cdot$"}
    escaped = "".join(special.get(character, character) for character in _one_line(text))
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)


def to_terminal(table: ScalingTable, width: int) -> RenderableType:
    """The table for a terminal of `width` columns, in two or more parts where one does not fit."""
    text = written(table)
    fixed = ["Size", *(name for name in ("Family", *table.axes) if name in text)]
    varying = [name for name in ("Hours", "Steps") if text[name][1:].nunique() > 1]
    parts = _fitting(text, fixed[:1] + varying + fixed[1:], list(text.columns[1:]), width)
    if len(table.unfinished):
        parts.append(_terminal_table(listed(table), title=f"Not finished ({len(table.unfinished)})", wrap=True))
    return Group(*parts)


def _fitting(text: pd.DataFrame, fixed: list[str], rest: list[str], width: int) -> list[Table]:
    rest = [name for name in rest if name not in fixed]
    whole = text[[name for name in text.columns if name in fixed or name in rest]]
    rendered = _terminal_table(whole)
    if len(rest) < 2 or Console(width=10_000).measure(rendered).maximum <= width:
        return [rendered]
    half = (len(rest) + 1) // 2
    return _fitting(text, fixed, rest[:half], width) + _fitting(text, fixed, rest[half:], width)


def _terminal_table(text: pd.DataFrame, title: str | None = None, wrap: bool = False) -> Table:
    rendered = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(text.columns):
        # Gains go on a line of their own, so that a cell stays narrow.
        heading = name if wrap else name.replace(", ", ",\n")
        rendered.add_column(
            heading, justify="left" if wrap or number == 0 else "right", overflow="fold", no_wrap=not wrap
        )
    for row in text.itertuples(index=False):
        rendered.add_row(*(Text(str(value) if wrap else str(value).replace(" (", "\n(")) for value in row))
    return rendered


def _one_line(text: str) -> str:
    return " ".join(text.split())
