"""The scaling table is the same in every form in which it is written."""

from __future__ import annotations

import io
import math
import re

import pandas as pd
import pytest
from rich.console import Console

from analysis.gather import gather
from analysis.scaling_table import scaling_table
from analysis.scaling_table_text import to_csv, to_latex, to_markdown, to_terminal
from tests.analysis.conftest import WriteStudy, plan_row


def test_the_csv_reads_back_in_full_precision_with_the_runs_of_each_row(write_study: WriteStudy) -> None:
    plan = [plan_row(size, seed) for size in ("xxt", "xt") for seed in (0, 1)]
    losses = {row["run_id"]: 1 / (3 + number) for number, row in enumerate(plan)}
    read = pd.read_csv(io.StringIO(to_csv(scaling_table(gather(write_study(plan, losses).path)))))
    assert list(read["size"]) == ["unprocessed", "xxt", "xt"]
    assert read.loc[1, "validation_loss_mean"] == pytest.approx((1 / 3 + 1 / 4) / 2, rel=1e-15)
    assert read.loc[1, "num_params"] == 254_492
    assert read.loc[2, "run_ids"].split() == [plan[2]["run_id"], plan[3]["run_id"]]
    assert math.isnan(read.loc[0, "validation_loss_std"])


def test_the_latex_table_is_a_balanced_booktabs_tabular(write_study: WriteStudy) -> None:
    plan = [plan_row(size, seed) for size in ("xxt", "xt") for seed in (0, 1)]
    losses = {row["run_id"]: 0.2 + 0.01 * row["seed"] for row in plan}
    latex = to_latex(scaling_table(gather(write_study(plan, losses, skip=[plan[3]["run_id"]]).path)))
    columns = re.search(r"\\begin\{tabular\}\{(l?r+)\}", latex)
    assert columns is not None
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 1 + 2
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns[1])}
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")] == [1, 2, 1, 1]
    assert all(row.count("$") % 2 == 0 for row in rows)
    assert not re.search(r"[±–↑↓]", latex)
    assert r"25 \% (dB)" in latex
    assert r"0.2050 $\pm$ 0.0071" in latex
    assert f"% not finished: {plan[3]['run_id']} planned: never submitted" in latex


def test_unfinished_runs_are_listed_beneath_with_state_reason_and_log(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=0), plan_row(seed=1), plan_row("t", seed=0)]
    study = write_study(plan, skip=[plan[1]["run_id"], plan[2]["run_id"]])
    failed = study.run(plan[1]["run_id"])
    log = str(failed.jobs / "0_log.out")
    failed.log_event("failed", failure="diverged", reason="loss is not finite | step 61", log=log)
    table = scaling_table(gather(study.path))
    markdown = to_markdown(table)
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {plan[1]['run_id']} "))
    assert "failed" in line
    assert r"diverged: loss is not finite \| step 61" in line
    assert f"runs/{plan[1]['run_id']}/jobs/0_log.out" in line
    assert f"| {plan[2]['run_id']} | t | planned | never submitted | – |" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| t "))
    assert "0 of 1" in row
    assert "| – | – | – |" in row


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_of_the_terminal_table_is_wider_than_the_terminal(write_study: WriteStudy, width: int) -> None:
    plan = [plan_row(size, seed) for size in ("xxt", "xt") for seed in (0, 1)]
    losses = {row["run_id"]: 0.2 + 0.01 * row["seed"] for row in plan}
    table = scaling_table(gather(write_study(plan, losses, skip=[plan[3]["run_id"]]).path))
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_terminal(table, width))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for shown in ("0.2050 ± 0.0071", "254 K", "90.1 M", "1 of 2", "never submitted"):
        assert shown in text
