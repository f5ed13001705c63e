"""The scaling table's numbers are those of its runs."""

from __future__ import annotations

import io
import math
import statistics

import pandas as pd
import pytest

from analysis.claims import claims
from analysis.gather import gather
from analysis.result_tables import size_table
from analysis.scaling_table import scaling_table
from analysis.scaling_table_text import to_csv, to_latex, to_markdown, written
from analysis.settings import Settings
from scaling.records import RecordError, write_records
from tests.analysis.conftest import WriteStudy, plan_row, score_row


def test_mean_and_spread_are_those_of_the_finished_seeds(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=seed) for seed in range(4)]
    ids = [row["run_id"] for row in plan]
    losses = dict(zip(ids, [0.21, 0.24, 0.28, 0.99], strict=True))
    scores = {run_id: [score_row(0, pesq_wb=2.0 + n), score_row(1, pesq_wb=2.5)] for n, run_id in enumerate(ids)}
    study = write_study(plan, losses, scores)
    study.run(ids[3]).events.unlink()
    study.run(ids[3]).log_event("failed", failure="out of memory", reason="out of memory")

    cell = scaling_table(gather(study.path)).cells.iloc[0]
    assert cell["validation_loss_mean"] == pytest.approx(statistics.mean([0.21, 0.24, 0.28]))
    assert cell["validation_loss_std"] == pytest.approx(statistics.stdev([0.21, 0.24, 0.28]))
    assert cell["validation_loss_n"] == 3
    assert cell["pesq_wb_mean"] == pytest.approx(statistics.mean([2.25, 2.75, 3.25]))
    assert cell["pesq_wb_gain_std"] == pytest.approx(statistics.stdev([0.75, 1.25, 1.75]))
    assert (cell["seeds_finished"], cell["seeds_planned"]) == (3, 4)
    assert cell["run_ids"].split() == ids[:3]
    assert cell["unfinished_run_ids"] == ids[3]


def test_a_single_seed_has_no_spread(write_study: WriteStudy) -> None:
    table = scaling_table(gather(write_study([plan_row()]).path))
    assert math.isnan(table.cells.loc[0, "validation_loss_std"])
    assert "±" not in to_markdown(table).split("\n\n")[0]
    assert written(table).loc[1, "Validation loss ↓"] == "0.2500"


def test_a_seed_whose_loss_is_null_is_left_out_of_the_mean_and_of_its_count(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=seed) for seed in range(3)]
    losses = dict(zip([row["run_id"] for row in plan], [0.2, math.nan, 0.3], strict=True))
    table = scaling_table(gather(write_study(plan, losses).path))
    cell = table.cells.iloc[0]
    assert cell["validation_loss_mean"] == pytest.approx(0.25)
    assert (cell["validation_loss_n"], cell["seeds_finished"]) == (2, 3)
    text = written(table)
    assert (text.loc[1, "Seeds"], text.loc[1, "Validation loss ↓"]) == ("3 of 3", "0.2500 ± 0.0707, of 2")
    assert text.loc[1, "PESQ-WB ↑"].startswith("2.350 ± 0.000 (")


def test_rows_go_by_size_then_hours_and_the_first_is_the_unprocessed_input(write_study: WriteStudy) -> None:
    plan = [plan_row(size, hours=hours) for size in ("t", "xxt") for hours in (9.4, 0.37)]
    table = scaling_table(gather(write_study(plan).path))
    assert list(written(table)["Size"]) == ["unprocessed", "xxt", "xxt", "t", "t"]
    assert list(written(table)["Hours"]) == ["–", "0.37", "9.4", "0.37", "9.4"]
    assert list(table.cells["label"]) == ["xxt · 0.37 h", "xxt · 9.4 h", "t · 0.37 h", "t · 9.4 h"]
    assert table.axes == ()  # size and hours say what the axes model and data.hours do
    assert written(table).loc[0, "SI-SDR (dB) ↑"] == "5.00"
    assert written(table).loc[1, "SI-SDR (dB) ↑"] == "13.50 (+8.50)"
    assert written(table).loc[1, "SI-SDR gain, noisiest 25 % (dB) ↑"] == "+5.50"


def test_any_other_axis_splits_rows_and_gets_a_column(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=seed, **{"train.loss": loss}) for loss in ("mag_only", "full") for seed in (0, 1)]
    losses = {row["run_id"]: 0.2 + 0.1 * (row["axes"]["train.loss"] == "full") for row in plan}
    table = scaling_table(gather(write_study(plan, losses).path))
    assert table.axes == ("train.loss",)
    assert dict(zip(table.cells["axes.train.loss"], table.cells["validation_loss_mean"], strict=True)) == pytest.approx(
        {"mag_only": 0.2, "full": 0.3}
    )
    assert list(table.cells["seeds_planned"]) == [2, 2]
    assert r"mag\_only" in to_latex(table)


def rtf_row(rtf: float, step: str = "kernel", **model: object) -> dict:
    return {"model": {"num_channels": 16, **model}, "rtf": rtf, "step": step, "cpu": "AMD EPYC & sons"}


def test_a_real_time_factor_stands_beside_the_architecture_that_it_is_of(write_study: WriteStudy) -> None:
    """Norms share parameters and MACs, and one of them does not stream."""
    plan = [
        plan_row("xt"),
        *(plan_row("xt", **{"model.norm": norm}) for norm in ("cumulative", "group")),
        plan_row("t"),
    ]
    study = write_study(plan)
    assert "RTF" not in written(scaling_table(gather(study.path)))
    assert "RTF" not in to_markdown(scaling_table(gather(study.path)))
    slower = rtf_row(0.5, "torch: not folded", norm="cumulative")
    write_records(study.rtf, [slower, rtf_row(0.01234)])
    table = scaling_table(gather(study.path))
    assert list(written(table)["RTF"]) == ["–", "0.0123", "0.5", "–", "–"]
    assert list(written(table)["model.norm"]) == ["–", "–", "cumulative", "group", "–"]
    assert pd.read_csv(io.StringIO(to_csv(table)))["rtf"].tolist()[1:3] == [0.01234, 0.5]
    said = "one thread of AMD EPYC & sons; frames enhanced by: "
    assert f"{said}kernel (xt · model.norm=–); torch: not folded (xt · model.norm=cumulative)." in to_markdown(table)
    write_records(study.rtf, [rtf_row(0.01234)])
    assert f"{said}kernel." in to_latex(scaling_table(gather(study.path))).partition("\n")[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [rtf_row(0.1), rtf_row(0.1) | {"rtf": "slow"}],
            "row 2 has rtf 'slow', no float; measure again with python -m",
        ),
        ([{"num_params": 3, "macs_per_second": 4.0, "rtf": 0.1}], "row 1 has model None, no dict; measure again"),
        (
            [rtf_row(0.1), rtf_row(0.1) | {"cpu": "Xeon"}],
            "has rows of 2 machines, AMD EPYC & sons, Xeon; measure again",
        ),
    ],
)
def test_real_time_factors_that_say_not_of_what_they_are_are_refused(
    write_study: WriteStudy, rows: list[dict], said: str
) -> None:
    study = write_study([plan_row("xt")])
    write_records(study.rtf, rows)
    with pytest.raises(RecordError, match=rf"rtf\.jsonl:? {said}"):
        scaling_table(gather(study.path))


def test_a_spread_below_the_digits_is_written_as_a_bound_in_every_table(write_study: WriteStudy) -> None:
    plan = [plan_row(size, seed) for size in ("xxt", "xt") for seed in (0, 1)]
    losses = {row["run_id"]: 0.2 + 1e-6 * row["seed"] for row in plan}
    study = gather(write_study(plan, losses).path)
    assert written(scaling_table(study)).loc[1, "Validation loss ↓"] == "0.2000 ± <0.0001"
    found = claims(study, Settings(study.directory.path, bootstraps=100))
    assert size_table(study, found).text.loc[0, "Validation loss ↓"] == "0.2000 ± <0.0001"


def test_budgets_that_whole_clips_fill_unevenly_are_one_row(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=0), plan_row(seed=1)]
    for row, hours in zip(plan, (0.36998, 0.37004), strict=True):
        row["data"]["hours"] = hours
    table = scaling_table(gather(write_study(plan).path))
    assert list(table.cells["hours"]) == [0.37]
