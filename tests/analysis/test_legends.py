"""What tells the lines of a figure apart: the names in its legends, and the room that these have."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from pathlib import Path

from analysis.figures import curves_figure, scaling_figure
from analysis.gather import gather
from analysis.quantities import MISSING
from analysis.scaling_table import scaling_table
from analysis.scaling_table_text import written
from tests.analysis.conftest import legend_of
from tests.analysis.generated import RATE, true_loss, write_grid


def test_no_line_joins_families_that_an_axis_tells_apart_where_sizes_settle_it(tmp_path: Path):
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {"model.norm": norm}}
        | {"science": {"model": {"norm": norm}}}
        for size, norm in (("c8", "batch"), ("xt", "batch"), ("t", "layer"), ("s", "layer"))
    ]
    path = write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0)).path
    figure = scaling_figure(scaling_table(gather(path)))
    assert max(len(line.get_xdata()) for line in figure.axes[0].get_lines()) == 2
    assert legend_of(figure) == {"Family": ["c8, xt", "t, s"]}


def test_a_boolean_axis_is_written_in_legends_as_in_tables(tmp_path: Path):
    axis = "train.optimiser.amsgrad"
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {axis: value}}
        for value in (False, True)
        for size in ("c8", "xt", "t")
    ]
    study = gather(write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0)).path)
    table = scaling_table(study)
    assert sorted(set(written(table)[axis]) - {MISSING}) == ["False", "True"]
    assert legend_of(scaling_figure(table)) == {axis: ["False", "True"]}
    curves = {text.get_text() for text in curves_figure(study).legends[0].get_texts()}
    assert {f"{axis} False", f"{axis} True"} <= curves


def test_a_row_of_the_scaling_figure_is_as_high_as_its_legend_and_no_value_is_broken(tmp_path: Path):
    """Eight settings of three axes, of which one is a list."""
    axes = [
        {RATE: rate, "train.optimiser.betas": betas, "train.optimiser.amsgrad": amsgrad}
        for rate in (0.001, 0.002)
        for betas in ([0.9, 0.99], [0.95, 0.999])
        for amsgrad in (True, False)
    ]
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0 if values[RATE] == 0.001 else 4.5, "axes": values}
        for values in axes
        for size in ("c8", "xt", "t")
    ]
    path = write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0), seeds=1).path
    figure = scaling_figure(scaling_table(gather(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that was given up
        figure.draw_without_rendering()
    boxes = [legend.get_window_extent() for ax in figure.axes if (legend := ax.get_legend())]
    assert len(boxes) == 3
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes)), "legends overlap"
    assert 0 <= min(box.y0 for box in boxes) < max(box.y1 for box in boxes) <= figure.bbox.y1
    assert min(ax.get_window_extent().height for ax in figure.axes) > 60, "panels keep their room"
    ((_, names),) = legend_of(figure).items()
    assert any("4.5,\n[0.95, 0.999],\nFalse" in name for name in names)
    assert not any(re.search(r"\[[^]]*\n", name) for name in names), "a list is broken"
