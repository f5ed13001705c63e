"""The scaling table as it is read: as text under headings, and from that in Markdown, LaTeX and for a terminal.

`written` has the text; the renderers only arrange it. The CSV has the numbers in full precision.
"""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.markup import booktabs, markdown_table, one_line
from analysis.quantities import (
    MISSING,
    NOISIEST_GAIN,
    Quantity,
    axis_value,
    human_count,
    human_hours,
    mean_and_spread,
    steps_text,
)
from analysis.scaling_table import ScalingTable

NOTE = (
    "Mean ± sample standard deviation over seeds (none for a single seed), of a metric over the utterances that it "
    "refused in no run; in parentheses the gain from unprocessed to enhanced."
)


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


def listed(table: ScalingTable) -> pd.DataFrame:
    """The runs without a result as a reader sees them; no rows if all have finished."""
    names = {"run_id": "Run", "label": "Cell", "state": "State", "reason": "Reason", "log": "Log"}
    return table.unfinished[list(names)].rename(columns=names).fillna(MISSING).astype(str)


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


def to_latex(table: ScalingTable) -> str:
    r"""A booktabs tabular to \input; what has not finished is named in comments at its end."""
    text = written(table)
    rows = [[str(value) for value in row] for row in text.itertuples(index=False)]
    comment = note(table).replace("±", "+-")
    latex = booktabs(comment, "l" + "r" * (text.shape[1] - 1), [list(text.columns)], rows[:1], rows[1:])
    missing = [
        f"{one_line(run['Run'])} {run['State']}: {one_line(run['Reason'])}" for _, run in listed(table).iterrows()
    ]
    return latex + "".join(f"% not finished: {line}\n" for line in missing)


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
    """The table, or where it is too wide, its `rest` columns in halves, each beside the fixed ones."""
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
