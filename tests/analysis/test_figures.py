"""The figures show what the tables hold."""

from __future__ import annotations

import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer

from analysis import style
from analysis.claims import claims
from analysis.figures import MOST_NAMES, curves_figure, scaling_figure
from analysis.gather import gather
from analysis.law_figures import laws_figure, published_figure
from analysis.published import UNPROCESSED
from analysis.scaling_table import scaling_table
from analysis.settings import Settings
from scaling.records import StudyDirectory, read_records
from tests.analysis.conftest import WriteStudy, plan_row, score_row
from tests.analysis.generated import FAMILY, lines, run_record, sizes_study, true_loss, write_run


def bars(ax: Axes) -> list[ErrorbarContainer]:
    return [container for container in ax.containers if isinstance(container, ErrorbarContainer)]


def test_panels_show_means_with_their_spread_on_log_axes(write_study: WriteStudy, tmp_path: Path) -> None:
    plan = [plan_row(size, seed) for size in ("xxt", "xt", "t") for seed in (0, 1)]
    losses = dict(zip([row["run_id"] for row in plan], [0.30, 0.32, 0.27, 0.28, 0.24, 0.25], strict=True))
    figure = scaling_figure(scaling_table(gather(write_study(plan, losses).path)))
    assert figure is not None
    assert len(figure.axes) == 2 * 5
    assert all(ax.get_xscale() == "log" for ax in figure.axes)
    assert [ax.get_ylabel() for ax in figure.axes[:5]] == ["Validation loss", "PESQ-WB", "STOI", "ESTOI", "SI-SDR (dB)"]
    loss = figure.axes[0]
    assert loss.get_xlabel() == "Parameters"
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(254_492, 0.31), (337_820, 0.275), (1_039_148, 0.245)])
    segments = bars(loss)[0].lines[2][0].get_segments()
    assert [round(float(np.ptp(segment[:, 1])) / 2, 6) for segment in segments] == pytest.approx(
        [0.02 / math.sqrt(2), 0.01 / math.sqrt(2), 0.01 / math.sqrt(2)], abs=1e-5
    )
    assert any(np.allclose(line.get_ydata(), 0.4) for line in loss.lines)  # the unprocessed input
    assert [text.get_text() for text in loss.texts] == ["xxt", "xt", "t"]
    macs = figure.axes[5]
    assert list(macs.lines[0].get_xdata()) == [90_100_000, 244_800_000, 961_900_000]

    png, svg = style.save(figure, tmp_path / "scaling")
    image = matplotlib.image.imread(png)
    assert image.shape[1] > 1500
    assert image[..., :3].std() > 0.05
    assert svg.read_text().startswith("<?xml")
    first = png.read_bytes(), svg.read_bytes()
    again = scaling_figure(scaling_table(gather(tmp_path / "study")))
    assert again is not None
    style.save(again, tmp_path / "scaling")
    assert (png.read_bytes(), svg.read_bytes()) == first


def test_a_single_seed_has_no_error_bar(write_study: WriteStudy) -> None:
    figure = scaling_figure(scaling_table(gather(write_study([plan_row("xxt"), plan_row("xt")]).path)))
    assert figure is not None
    assert not any(bars(ax) for ax in figure.axes)


def test_a_study_that_varies_hours_has_a_row_for_them_and_a_line_for_each(write_study: WriteStudy) -> None:
    plan = [plan_row(size, hours=hours) for size in ("xxt", "xt") for hours in (0.1, 0.2, 0.4)]
    losses = {row["run_id"]: 0.3 - 0.1 * row["data"]["hours"] for row in plan}
    figure = scaling_figure(scaling_table(gather(write_study(plan, losses).path)))
    assert figure is not None
    assert len(figure.axes) == 3 * 5
    by_params, by_hours = figure.axes[0], figure.axes[10]
    drawn = [line for line in by_params.lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"]
    assert len(drawn) == 3
    assert len({line.get_marker() for line in drawn}) == 3  # told apart in grey, too
    assert by_hours.get_xlabel() == "Hours of training audio"
    np.testing.assert_allclose(by_hours.lines[0].get_xydata(), [(0.1, 0.29), (0.2, 0.28), (0.4, 0.26)])
    legend = figure.axes[4].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["0.1", "0.2", "0.4", "unprocessed"]


def test_more_lines_than_a_legend_has_room_for_are_named_in_part(write_study: WriteStudy) -> None:
    plan = [plan_row("xxt", hours=hours / 100) for hours in range(1, 31)]
    study = gather(write_study(plan, {row["run_id"]: 0.1 for row in plan}).path)
    curves, scaling = curves_figure(study), scaling_figure(scaling_table(study))
    assert curves is not None
    assert scaling is not None
    legends = [curves.legends[0], next(ax.get_legend() for ax in scaling.axes if ax.get_legend())]
    for legend, before in zip(legends, ("Hours ", ""), strict=True):
        names = [text.get_text() for text in legend.get_texts()]
        assert any(re.fullmatch(r"and 2[23] more", name) for name in names), names
        assert f"{before}0.01" in names
        assert len(names) <= MOST_NAMES + 4
    for panel in curves.axes:
        curves.draw_without_rendering()
        assert not panel.get_window_extent().overlaps(curves.legends[0].get_window_extent())


def test_a_metric_without_values_has_no_panel(write_study: WriteStudy) -> None:
    row = plan_row()
    scores = [score_row(n, pesq_wb=None, refused={"pesq_wb": "no speech found"}) for n in range(4)]
    figure = scaling_figure(scaling_table(gather(write_study([row], scores={row["run_id"]: scores}).path)))
    assert figure is not None
    assert "PESQ-WB" not in [ax.get_ylabel() for ax in figure.axes]
    assert len(figure.axes) == 2 * 4


def test_where_nothing_has_finished_there_is_no_scaling_figure(write_study: WriteStudy) -> None:
    row = plan_row()
    study = write_study([row], skip=[row["run_id"]])
    study.run(row["run_id"]).log_event("failed", failure="diverged", reason="at once")
    gathered = gather(study.path)
    assert scaling_figure(scaling_table(gathered)) is None
    assert curves_figure(gathered) is None


def test_curves_have_a_panel_a_size_and_mark_where_a_run_failed(write_study: WriteStudy, tmp_path: Path) -> None:
    plan = [plan_row("xxt"), plan_row("xt")]
    study = write_study(plan, skip=[plan[1]["run_id"]])
    failed = study.run(plan[1]["run_id"])
    for step in range(1, 21):
        failed.log_metrics("train", step, loss=1 / step)
    failed.log_metrics("train", 21, loss=math.nan)
    failed.log_event("failed", failure="diverged", reason="loss is not finite at step 21")
    figure = curves_figure(gather(study.path))
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes] == ["xxt", "xt"]
    validation = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert list(validation.get_xdata()) == [10, 20, 30, 40]
    assert validation.get_ydata()[-1] == pytest.approx(0.25)
    cross = next(line for line in figure.axes[1].lines if line.get_marker() == "x")
    assert list(cross.get_xdata()) == [20]
    assert matplotlib.image.imread(style.save(figure, tmp_path / "curves")[0]).std() > 0.05


def test_beside_published_systems_stand_the_cells_of_the_largest_budgets_in_every_panel(tmp_path: Path) -> None:
    """Two budgets of each size: the larger has the higher loss, the lower PESQ and the higher STOI."""
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    expected: dict[str, list[tuple[float, float]]] = {"PESQ-WB": [], "STOI": []}
    for number, size in enumerate(("c8", "xt", "t")):
        for hours_seen, loss, pesq_wb, stoi in ((10.0, 0.04, 3.0, 0.90), (100.0, 0.05, 2.5, 0.95)):
            for seed in (0, 1):
                plan = run_record(size, hours_seen, seed)
                write_run(study, plan, loss, rng)
                values = {"pesq_wb": pesq_wb + number / 10, "stoi": stoi + number / 100}
                scores = study.run(plan["run_id"]).scores
                scores.write_text(lines([row | values for row in read_records(scores)]))
                plans.append(plan)
        expected["PESQ-WB"].append((FAMILY[size][4], 2.5 + number / 10))
        expected["STOI"].append((FAMILY[size][4], 0.95 + number / 100))
    study.plan.write_text(lines(plans))
    gathered = gather(study.path)
    figure = published_figure(claims(gathered, Settings(study.path, bootstraps=100)), gathered.metrics, "generated")
    assert figure is not None
    unprocessed = gathered.runs["unprocessed_pesq_wb"].mean()
    levels = {line.get_ydata()[0] for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1}
    assert {round(float(level), 6) for level in levels} >= {round(unprocessed, 6), UNPROCESSED["pesq_wb"]}
    for ax in figure.axes:
        if ax.get_ylabel() in expected:
            np.testing.assert_allclose(ax.lines[0].get_xydata(), expected.pop(ax.get_ylabel()), rtol=1e-6)
    assert not expected


@pytest.mark.parametrize("missing", [("stoi", "estoi", "si_sdr"), ("stoi",)])
def test_beside_published_systems_an_odd_number_of_metrics_leaves_no_empty_panel(
    tmp_path: Path, missing: tuple[str, ...]
) -> None:
    study = sizes_study(tmp_path / "study", seeds=1, sizes=("xt", "t"))
    for plan in study.read_plan():
        scores = study.run(plan["run_id"]).scores
        rows = read_records(scores)
        left = [{key: row[key] for key in row if key.removeprefix("unprocessed_") not in missing} for row in rows]
        scores.write_text(lines(left))
    gathered = gather(study.path)
    figure = published_figure(claims(gathered, Settings(study.path, bootstraps=100)), gathered.metrics, "generated")
    assert figure is not None
    shown = [bool(ax.get_ylabel()) for ax in figure.axes]
    assert sum(shown) == 4 - len(missing)
    assert [ax.axison for ax in figure.axes] == shown


def test_a_seed_that_blew_up_leaves_limits_and_bars_of_a_logarithmic_axis_above_zero(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Of two seeds one has twelve times the other's loss: their standard deviation exceeds half of the sum."""
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(1), []
    for size in FAMILY:
        for seed in (0, 1):
            plans.append(run_record(size, 100.0, seed))
            loss = true_loss(size, 100.0) * (12 if (size, seed) == ("t", 1) else 1 + 0.003 * rng.normal())
            write_run(study, plans[-1], loss, rng, utterances=0)
    study.plan.write_text(lines(plans))
    found = claims(gather(study.path), Settings(study.path, bootstraps=200))
    claim = found.loss("L(N)")
    assert claim is not None
    claim.fitted.standard_errors()
    figure = laws_figure(found)
    assert figure is not None
    style.save(figure, tmp_path / "laws")
    panel = figure.axes[0]
    low, high = panel.get_ylim()
    means = [float(y) for y in bars(panel)[0].lines[0].get_ydata()]
    assert 0 < low < min(means) < max(means) < high
    ends = [segment[:, 1].min() for segment in bars(panel)[0].lines[2][0].get_segments()]
    assert min(ends) > 0
    assert [str(warning.message) for warning in recwarn] == []


def test_the_legend_of_laws_names_no_prediction_where_none_is_drawn(tmp_path: Path) -> None:
    study, plans = StudyDirectory(tmp_path / "study"), []
    for size in FAMILY:  # one seed a size: too few degrees of freedom for a test
        plans.append(run_record(size, 100.0))
        write_run(study, plans[-1], true_loss(size, 100.0), np.random.default_rng(0), utterances=0)
    study.plan.write_text(lines(plans))
    figure = laws_figure(claims(gather(study.path), Settings(study.path, bootstraps=100)))
    assert figure is not None
    assert "held out: predicted" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_style_leaves_the_colours_of_others_alone() -> None:
    before = to_rgb("b")
    with style.applied():
        pass
    assert to_rgb("b") == before == (0.0, 0.0, 1.0)
