"""Runs on several corpora, or validated on other speakers, are never taken for runs on one."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from analysis import style
from analysis.claims import claims
from analysis.figures import curves_figure, scaling_figure
from analysis.gather import Study, gather
from analysis.provenance import remarks
from analysis.quantities import MISSING
from analysis.scaling_table import scaling_table
from analysis.scaling_table_text import to_markdown, written
from analysis.settings import Settings
from scaling.records import RunDirectory, StudyDirectory
from tests.analysis.conftest import legend_of
from tests.analysis.generated import lines, true_loss, write_grid


@pytest.mark.parametrize("hours", [9.0, 18.0])
def test_runs_on_other_shards_are_in_no_law_with_these(tmp_path: Path, hours: float):
    """Hours of data may tell the corpora apart or not; they are validated on their own clips all the same."""
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": of, "axes": {"data": name}}
        | {"science": {"data": {"index_hash": index_hash}}, "data": {"name": name, "index_hash": index_hash}}
        for name, of, index_hash in (("vbd", 9.0, "ab" * 32), ("dns", hours, "cd" * 32))
        for size in ("c8", "xt", "t")
    ]
    path = write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0)).path
    of_dns = [cell for cell in StudyDirectory(path).runs.iterdir() if cell.name.startswith(("cell3", "cell4", "cell5"))]
    for run in map(RunDirectory, of_dns):
        rows = [row | ({"unprocessed_loss": 0.09} if row["kind"] == "validation" else {}) for row in run.read_metrics()]
        run.metrics.write_text(lines(rows))
    study = gather(path)
    found = claims(study, Settings(path, bootstraps=100))
    assert set(found.kept["data"]) == {"vbd"}
    assert "data.index_hash=vbd abababab" in found.other_axes.setting
    assert "losses do not compare where data.index_hash differs" in found.other_axes.remark
    assert found.other_axes.cells_left_out == 3
    table = scaling_table(study)
    assert np.isnan(table.unprocessed["validation_loss_mean"])
    assert table.unprocessed["pesq_wb_mean"] > 0, "which both have alike"
    told = "The unprocessed validation_loss differs between finished runs (0.0567 to 0.09): their inputs,"
    assert told in " ".join(remarks(study, table))
    figure = scaling_figure(table)
    assert max(len(line.get_xdata()) for line in figure.axes[0].get_lines()) == 3, "a line joins two corpora"
    assert legend_of(figure) == ({"data": ["vbd", "dns"]} if hours == 9.0 else {"Hours": ["9", "18"]})
    assert not any(line.get_linestyle() == "--" for line in curves_figure(study).axes[0].get_lines())


@pytest.mark.parametrize("hours", [9.0, 10.0])
def test_a_loss_on_training_speakers_is_in_no_law_with_one_on_others_and_chosen_by_nothing(
    tmp_path: Path, hours: float
):
    """data=vbd28 beside data=vbd: hours of data may tell them apart or not."""
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": of, "axes": {"data": data}}
        | {"science": {"data": {"train_on_validation": True} if data == "vbd28" else {}}}
        for data, of in (("vbd", 9.0), ("vbd28", hours))
        for size in ("c8", "xt", "t")
    ]
    low = {"vbd": 1.0, "vbd28": 0.5}
    path = write_grid(
        tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0) * low[cell["axes"]["data"]]
    ).path
    study = gather(path)
    found = claims(study, Settings(path, bootstraps=100))
    assert set(found.kept["axes.data"]) == {"vbd"}
    assert "losses do not compare where data.train_on_validation differs" in found.other_axes.remark
    assert found.refusal == ""
    assert scaling_table(study).loss.label == "Loss on held-out or training speakers"
    assert {claim.quantity.label for claim in found.losses} == {"Validation loss"}


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same sizes on two corpora with utterances of the same names, of which the second's PESQ refuses five."""
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {}, "data": {"name": name, "index_hash": index_hash}}
        | {"science": {"data": {"index_hash": index_hash}}}
        for name, index_hash in (("vbd", "ab" * 32), ("dns", "cd" * 32))
        for size in ("c8", "xt", "t")
    ]
    study = write_grid(
        tmp_path_factory.mktemp("corpora") / "study",
        cells,
        lambda cell: true_loss(cell["size"], 50.0) * (1.0 if cell["data"]["name"] == "vbd" else 1.5),
    )
    for plan in study.read_plan():
        if plan["data"]["name"] == "dns":
            run = study.run(plan["run_id"])
            rows = [
                row | ({"pesq_wb": None, "refused": {"pesq_wb": "no speech"}} if number < 5 else {})
                for number, row in enumerate(run.read_scores())
            ]
            run.scores.write_text(lines(rows))
    return gather(study.path)


def test_rows_of_two_corpora_are_told_apart_in_the_table_and_the_figures(two_corpora: Study, tmp_path: Path):
    table = scaling_table(two_corpora)
    assert table.cells["label"].is_unique
    text = written(table)
    assert list(text["Family"]) == [
        MISSING,
        *["data.index_hash=vbd abababab", "data.index_hash=dns cdcdcdcd"] * 3,
    ]
    assert "Family" in to_markdown(table)
    curves = curves_figure(two_corpora)
    names = [entry.get_text() for entry in curves.legends[0].get_texts()]
    assert {"Family data.index_hash=vbd abababab", "Family data.index_hash=dns cdcdcdcd"} <= set(names)
    figure = scaling_figure(table)
    figure.draw_without_rendering()
    drawn = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert len(drawn) == 2
    for legend in drawn:
        box = legend.get_window_extent()
        assert box.x1 <= figure.bbox.x1
        assert box.x0 >= max(ax.get_window_extent().x1 for ax in figure.axes) - 1, "over no panel"
    assert min(ax.get_window_extent().width for ax in figure.axes) > 60, "panels keep their room"
    image = matplotlib.image.imread(style.save(figure, tmp_path / "scaling")[0])
    assert image[:, -5:, :3].min() == 1, "nothing reaches the edge"


def test_an_utterance_that_is_refused_on_one_corpus_counts_on_another(two_corpora: Study):
    counted = two_corpora.scores[two_corpora.scores["pesq_wb"].notna()].groupby("run_id", observed=True).size()
    of = dict(zip(two_corpora.runs["run_id"], two_corpora.runs["data"], strict=True))
    assert {(of[str(run_id)], count) for run_id, count in counted.items()} == {("vbd", 12), ("dns", 7)}
    said = " ".join(remarks(two_corpora, scaling_table(two_corpora)))
    assert "left out of its means in every run on the same corpus: no speech" in said
