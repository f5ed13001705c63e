"""Cells that differ in more than the seed are never taken for seeds of one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.advise import advise
from analysis.claims import Claims, claims
from analysis.comparable import comparable
from analysis.figures import curves_figure, scaling_figure
from analysis.gather import Study, gather
from analysis.isoflop import isoflop
from analysis.process_scaling import process_scaling
from analysis.provenance import remarks
from analysis.quantities import MISSING
from analysis.report import main
from analysis.report_table import ReportTable
from analysis.result_tables import report_tables
from analysis.scaling_table import scaling_table
from analysis.scaling_table_text import written
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.conftest import legend_of
from tests.analysis.generated import COST, FAMILY, RATE, Record, lines, true_loss, write_grid


def tables_of(study: Study, found: Claims) -> dict[str, ReportTable]:
    iso = isoflop(found.kept, bootstraps=100, seed=0)
    return {
        table.name: table
        for table in report_tables(study, found, iso, process_scaling(study), comparable(study, found))
    }


def test_a_size_is_compared_by_its_cell_of_the_most_data_where_all_have_seen_the_same_audio(tmp_path: Path):
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": hours, "axes": {"data.hours": hours}}
        for size in ("c8", "xt", "t")
        for hours in (1.0, 3.0, 9.0)
    ]
    path = write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], cell["hours"])).path
    study, settings = gather(path), Settings(path, bootstraps=100)
    found = claims(study, settings)
    chosen = found.runs[found.runs["run_id"].isin(comparable(study, found).runs["run_id"])]
    assert (set(chosen["hours"]), chosen.groupby("size").size().to_dict()) == ({9.0}, {"c8": 2, "xt": 2, "t": 2})
    tables = tables_of(study, found)
    assert set(tables["significance"].text["Seeds"]) == {"2 and 2"}
    by_seen = tables_of(study, claims(study, Settings(path, data="audio_hours_seen", bootstraps=100)))
    assert "50 h, 3 h of data" in by_seen["joint_table"].text.columns
    assert list(by_seen["joint_table"].data["count"]) == [2] * 9


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """5 sizes x 3 budgets of equal compute x 3 learning rates; the best rate lacks a cell, the worst is 30 % off."""
    loss = {0.001: 1.05, 0.002: 1.3, 0.004: 1.0}
    cells = [
        {"size": size, "hours_seen": pmacs * 1e15 / COST / FAMILY[size][4], "hours": 9.0}
        | {"axes": {RATE: rate, "train.budget.train_pmacs": pmacs}}
        for size in ("c8", "xt", "c24", "t", "c48")
        for pmacs in (0.3, 1.0, 3.0)
        for rate in loss
        if not (size == "c48" and pmacs == 0.3 and rate == 0.004)
    ]
    return write_grid(
        tmp_path_factory.mktemp("rates") / "study",
        cells,
        lambda cell: true_loss(cell["size"], cell["hours_seen"]) * loss[cell["axes"][RATE]],
    )


def test_laws_and_tables_are_of_the_setting_that_covers_the_most_cells_with_the_lowest_loss(rates: StudyDirectory):
    study = gather(rates.path)
    found = claims(study, Settings(rates.path, bootstraps=100))
    other = found.other_axes
    assert (other.setting, other.settings, other.rivals, other.cells_left_out) == (f"{RATE}=0.001", 3, 2, 29)
    assert set(found.kept[f"axes.{RATE}"]) == {0.001}
    assert (len(found.runs), len(found.kept)) == (88, 30)
    rate = dict(zip(found.runs["run_id"], found.runs[f"axes.{RATE}"], strict=True))
    for claim in [*found.losses, *found.metrics]:
        assert {rate[run_id] for run_id in claim.run_ids} <= {0.001}, claim.law.name
        assert claim.with_excluded is None
    law = found.loss("L(N, D)")
    assert law is not None
    assert law.fitted.data.num_cells == 15
    for curve in isoflop(found.kept, bootstraps=100, seed=0).curves:
        assert list(curve.cells["seeds"]) == [2] * 5


def test_no_table_counts_runs_of_several_settings_as_seeds_and_captions_name_the_setting(rates: StudyDirectory):
    study = gather(rates.path)
    found = claims(study, Settings(rates.path, bootstraps=100))
    rate = dict(zip(found.runs["run_id"], found.runs[f"axes.{RATE}"], strict=True))
    tables = tables_of(study, found)
    for name, table in tables.items():
        for ids in table.sources.to_numpy().ravel():
            assert len({rate[run_id] for run_id in ids.split()}) <= 1, name
        is_of_one = name not in ("efficiency_table", "exclusions")
        assert (f"Of {RATE}=0.001; 29 cells of other settings are left out." in table.caption) == is_of_one, name
    assert tables["efficiency_table"].text[RATE].nunique() == 3
    assert advise(found, 0.05).remarks[0].startswith("Laws, minima and the tables")


def test_the_report_remarks_on_the_setting_and_its_scaling_table_has_all(
    rates: StudyDirectory, capsys: pytest.CaptureFixture[str]
):
    assert main([f"study={rates.path}", "bootstraps=100"]) == 0
    said = f"are of {RATE}=0.001: of 3 settings of {RATE} one that covers the most cells, of 2 that do so the one with"
    assert said in capsys.readouterr().out
    report = (rates.report / "report.md").read_text()
    assert said in report
    assert "88 of 88 planned runs finished, in 44 cells." in report


def test_an_axis_that_the_size_settles_makes_no_further_settings(tmp_path: Path):
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {RATE: rate}}
        for size, rate in (("c8", 0.004), ("xt", 0.002), ("t", 0.001))
    ]
    path = write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0)).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    assert (found.other_axes.chosen, found.other_axes.note, len(found.kept)) == ({}, "", 6)


@pytest.mark.parametrize(
    ("family", "chosen", "why"),
    [
        ({"front_end": "universal_48khz", "norm": "group"}, ["c8", "xt", "t"], "model.front_end differs"),
        ({"norm": "group"}, ["c24", "c48", "s"], ""),
    ],
)
def test_models_of_two_families_are_no_sizes_of_one_law(
    tmp_path: Path, family: dict[str, str], chosen: list[str], why: str
):
    """The second family has two thirds of the first one's loss, which of another front end is no better model."""
    ours = {"front_end": "streaming_16khz", "norm": "batch"}
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {}, "science": {"model": model}}
        | {"config": {"model": {"name": size, **ours, **model}}}
        for sizes, model in ((("c8", "xt", "t"), {}), (("c24", "c48", "s"), family))
        for size in sizes
    ]
    loss = {"c8": 3.0, "xt": 3.0, "t": 3.0, "c24": 2.0, "c48": 2.0, "s": 2.0}
    path = write_grid(tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0) * loss[cell["size"]]).path
    study = gather(path)
    found = claims(study, Settings(path, bootstraps=100))
    assert sorted(set(found.kept["size"])) == sorted(chosen)
    values = ours if chosen[0] == "c8" else family
    assert found.other_axes.setting == ", ".join(f"model.{name}={values[name]}" for name in family)
    assert (found.other_axes.settings, found.other_axes.rivals, found.other_axes.cells_left_out) == (2, 2, 3)
    told = f"the first of the plan, since losses do not compare where {why}." if why else "the one with the lowest mean"
    assert told in found.other_axes.remark
    tables = tables_of(study, found)
    assert f"Of {found.other_axes.setting}; 3 cells of other settings are left out." in tables["size_table"].caption
    assert sorted(tables["efficiency_table"].text["model.norm"]) == ["batch"] * 3 + ["group"] * 3
    figure = scaling_figure(scaling_table(study))
    assert max(len(line.get_xdata()) for line in figure.axes[0].get_lines()) == 3, "a line joins two families"
    assert legend_of(figure) == {"Family": ["c8, xt, t", "c24, c48, s"]}


def test_a_setting_of_the_loss_is_not_chosen_by_the_loss(tmp_path: Path):
    pesq = "train.losses.pesq"
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {pesq: weight}}
        | {"science": {"train": {"losses": {"magnitude": 0.3, "pesq": weight}}}}
        for weight in (0.001, 0.0)
        for size in ("c8", "xt", "t")
    ]
    path = write_grid(
        tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0) * (1.5 if cell["axes"][pesq] else 1.0)
    ).path
    other = claims(gather(path), Settings(path, bootstraps=100)).other_axes
    assert other.setting == f"{pesq}=0.001"
    assert f"of 2 that do so the first of the plan, since losses do not compare where {pesq} differs." in other.remark


def test_the_unprocessed_input_has_no_loss_where_runs_measure_it_by_several(tmp_path: Path):
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {"train.losses.pesq": weight}}
        | {"science": {"train": {"losses": {"pesq": weight}}}}
        for size in ("c8", "xt")
        for weight in (0.0, 1.0)
    ]
    losses = {0.0: 0.0567, 1.0: 2.1567}
    path = write_grid(
        tmp_path / "study", cells, lambda cell: true_loss(cell["size"], 50.0) + cell["axes"]["train.losses.pesq"]
    ).path
    for plan in StudyDirectory(path).read_plan():
        run = StudyDirectory(path).run(plan["run_id"])
        own = {"unprocessed_loss": losses[plan["axes"]["train.losses.pesq"]]}
        run.metrics.write_text(
            lines([row | (own if row["kind"] == "validation" else {}) for row in run.read_metrics()])
        )
    study = gather(path)
    table = scaling_table(study)
    text = written(table)
    assert text.loc[0, "Validation loss ↓"] == MISSING
    assert MISSING not in set(text.loc[1:, "Validation loss ↓"])
    assert text.loc[0, "PESQ-WB ↑"] != MISSING, "measured alike by all"
    (told,) = (remark for remark in remarks(study, table) if remark.startswith("The unprocessed"))
    assert told.startswith("The unprocessed validation_loss differs between finished runs (0.0567 to 2.157): ")
    assert told.endswith("the table and the figures show none.")
    for ax in (*scaling_figure(table).axes[:1], *curves_figure(study).axes):
        assert not any(line.get_linestyle() == "--" for line in ax.get_lines())
        assert not any("unprocessed" in drawn.get_text() for drawn in ax.texts)


def test_merged_folders_that_differ_in_a_setting_are_not_pooled_as_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two studies of three sizes, each with a learning rate that is no axis of either."""
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {}}
        | {"science": {"train": {"optimiser": {"warmup_steps": 20, "learning_rate": rate}}}}
        for rate in (0.004, 0.001)
        for size in ("c8", "xt", "t")
    ]

    def loss(cell: Record) -> float:
        rate = cell["science"]["train"]["optimiser"]["learning_rate"]
        return true_loss(cell["size"], 50.0) * (1.3 if rate == 0.004 else 1.0)

    path = write_grid(tmp_path / "study", cells, loss).path
    study = gather(path)
    found = claims(study, Settings(path, bootstraps=100))
    assert (found.other_axes.setting, found.other_axes.cells_left_out) == (f"{RATE}=0.001", 3)
    law = found.loss("L(N)")
    assert law is not None
    assert list(law.fitted.data.counts) == [2, 2, 2]
    table = scaling_table(study)
    assert (list(table.cells["seeds_finished"]), table.axes) == ([2] * 6, (RATE,))
    assert not any("pools runs" in remark for remark in remarks(study, table))
    for name, one in tables_of(study, found).items():
        for ids in one.sources.to_numpy().ravel():
            assert len({study.science[run_id][RATE] for run_id in ids.split()}) <= 1, name
    curves = curves_figure(study)
    names = {text.get_text() for text in curves.legends[0].get_texts()}
    assert {f"{RATE} 0.004", f"{RATE} 0.001"} <= names


def test_where_all_runs_diverged_no_setting_is_called_the_one_of_the_lowest_loss(tmp_path: Path):
    cells = [
        {"size": size, "hours_seen": 50.0, "hours": 9.0, "axes": {RATE: rate}}
        for rate in (0.01, 0.02)
        for size in ("c8", "xt")
    ]
    study = write_grid(tmp_path / "study", cells, lambda cell: 0.1, seeds=1)
    for run in study.runs.iterdir():
        failed = {"event": "failed", "failure": "diverged", "reason": "the loss of step 9 is nan", "time": 1.7e9}
        (run / "events.jsonl").write_text(lines([failed]))
    remark = claims(gather(study.path), Settings(study.path, bootstraps=100)).other_axes.remark
    assert "of 2 that do so the first of the plan, since no run of them may stand in a law." in remark
    assert "lowest" not in remark
