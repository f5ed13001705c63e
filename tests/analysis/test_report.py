"""The report as its user meets it: the command, its answers and its files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.report import main
from analysis.settings import settings_from
from scaling.records import Record, StudyDirectory, append_record, to_json, write_records, write_whole
from tests.analysis.conftest import WriteStudy, plan_row, score_row
from tests.analysis.generated import FAMILY, run_record, sizes_study, true_loss, write_run

ROOT = Path(__file__).parents[2]
FILES = ["curves.png", "curves.svg", "report.md", "runs.csv", "scaling.png", "scaling.svg"]
FILES += ["scaling_table.csv", "scaling_table.md", "scaling_table.tex"]


def test_the_command_writes_every_file_and_lists_what_is_missing(write_study: WriteStudy) -> None:
    plan = [plan_row(size, seed) for size in ("xxt", "xt") for seed in (0, 1)]
    study = write_study(plan, skip=[plan[3]["run_id"]])
    study.run(plan[3]["run_id"]).log_event("failed", failure="out of memory", reason="out of memory at step 3")
    command = [sys.executable, "-m", "analysis.report", f"study={study.path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "out of memory: out of memory at step 3" in result.stdout
    assert [f"wrote {study.report / name}" in result.stdout for name in FILES] == [True] * len(FILES)
    written = {path.name for path in study.report.iterdir()}
    assert {*FILES, "report.html", "tables"} <= written
    assert all(f"wrote {study.report / name}" in result.stdout for name in written - {"tables"})
    report = (study.report / "report.md").read_text()
    assert "3 of 4 planned runs finished, in 2 cells." in report
    assert f"| xt | {plan[2]['run_id']} | {plan[3]['run_id']} |" in report
    assert "| commit | 6df9ffe |" in report
    assert "](scaling.png)" in report
    assert len(pd.read_csv(study.report / "runs.csv")) == 4


def test_a_study_without_a_finished_run_says_so_in_one_line(
    write_study: WriteStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    row = plan_row()
    study = write_study([row], skip=[row["run_id"]])
    study.run(row["run_id"]).log_event("failed", failure="diverged", reason="at step 1")
    write_whole(study.report / "scaling.png", "of an earlier report")
    assert main([f"study={study.path}"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no run of the 1 planned has finished (1 failed)" in captured.err
    assert not (study.report / "scaling.png").exists()
    report = (study.report / "report.md").read_text()
    assert "No scaling figure: no finished run has a validation loss or score on record." in report
    assert "diverged: at step 1" in report


def test_a_study_in_the_home_folder_is_named_by_a_tilde(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert settings_from({"study": "~/sizes"}).study == Path("/home/somebody/sizes")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stduy=x"], "unknown argument 'stduy=x'; the keys are: study"),
        (["study"], "unknown argument 'study'; the keys are: study"),
        ([], "study= is missing"),
        (["study="], "study= is missing"),
        (["study=nowhere"], "no study at nowhere"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("module", ["report", "advise"])
def test_an_interrupt_ends_a_command_with_130_and_a_word(module: str, tmp_path: Path) -> None:
    words = f"study={tmp_path}" + (" gpu_hours=1" if module == "advise" else "")
    program = (
        "import runpy, sys\n"
        "import analysis.gather\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "analysis.gather.gather = interrupted\n"
        f"sys.argv = ['{module}', *{words.split()!r}]\n"
        f"runpy.run_module('analysis.{module}', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (130, 1), result.stderr
    assert result.stderr.startswith("interrupted: ")


def test_help_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "usage: python -m analysis.report study=DIR" in capsys.readouterr().out


def test_what_weakens_the_table_is_remarked_on(write_study: WriteStudy, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [plan_row(seed=0), plan_row(seed=1)]
    plan[1]["science"]["data"] = {"hours": 0.37001}
    refused = [score_row(0, pesq_wb=None, refused={"pesq_wb": "no speech found"}), score_row(1)]
    study = write_study(plan, scores={plan[0]["run_id"]: refused, plan[1]["run_id"]: [score_row(0)]})
    other = study.run(plan[1]["run_id"])
    write_whole(other.plan, to_json(plan[1] | {"provenance": {"commit": "0123abc", "packages": {"torch": "2.9.1"}}}))
    other.log_event("resumed", step=20, commit="0123abd", uncommitted_diff_sha256=None)
    write_records(other.metrics, other.read_metrics()[:-11])
    study.run("stray").log_event("started")
    assert main([f"study={study.path}"]) == 0
    report = (study.report / "report.md").read_text()
    remarks = report.partition("## Remarks")[2].partition("##")[0]
    assert "1 folder below runs/ that the plan does not name (not in any table): stray" in remarks
    assert "Provenance is mixed in commit" in remarks
    assert "Row xt pools runs that differ in more than the seed: data.hours." in remarks
    assert f"{plan[1]['run_id']} finished, but its last validation is at step 30 of 40." in remarks
    assert "pesq_wb refused 1 utterance in 1 run, left out of its means in every run: no speech found (1)." in remarks
    assert "scored on 1 to 2 utterances" in remarks
    assert "| commit | 6df9ffe (1 run), 0123abc, then 0123abd (1 run) | mixed |" in report
    assert "note: Provenance is mixed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plan", "losses", "scores"),
    [
        ([plan_row("xt")], [0.2], True),
        ([plan_row("xt", seed) for seed in range(3)], [0.2, 0.21, 0.22], True),
        ([plan_row("xxt"), plan_row("xt")], [0.2, float("nan")], True),
        ([plan_row("xxt"), plan_row("xt")], [float("nan")] * 2, True),
        ([plan_row("xxt"), plan_row("xt")], [0.2, 0.1], False),
        ([plan_row("xt", hours=hours) for hours in (0.1, 0.2)], [0.2, 0.1], False),
    ],
    ids=["one run", "one size", "a loss that is nan", "only nan", "no scores", "one size, two budgets, no scores"],
)
def test_a_study_with_little_to_say_has_its_report_without_an_empty_table(
    write_study: WriteStudy, plan: list[Record], losses: list[float], scores: bool
) -> None:
    ids = [row["run_id"] for row in plan]
    study = write_study(plan, dict(zip(ids, losses, strict=True)), None if scores else {run_id: [] for run_id in ids})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([f"study={study.path}", "bootstraps=100"]) == 0
    for path in (study.report / "tables").glob("*.csv"):
        assert len(pd.read_csv(path)) > 0, path.name
    page = (study.report / "report.html").read_text()
    assert not re.search(r"\bnan\b", re.sub(r"<(style|script).*?</\1>|base64,[^\"]*", "", page, flags=re.S), re.I)
    assert "NOT TESTED" in page
    assert ("size_table" in page) == (len({row["size"]["name"] for row in plan}) > 1 and np.isfinite(losses).sum() > 1)


def test_crops_that_damage_replaced_are_told_of_each_run(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=0), plan_row(seed=1)]
    study = write_study(plan)
    damaged = study.run(plan[1]["run_id"])
    row = {"id": "p226_001", "shard": "train-000.tar", "what": "noisy samples", "by": "p226_009"}
    # Of 40 steps of 8 crops; the run was killed and met the second again, and read ahead of its last step.
    for rank, t in ((0, 3), (1, 300), (1, 300), (0, 320)):
        append_record(damaged.quarantine / f"rank-{rank}.jsonl", {"t": t, **row})
    assert main([f"study={study.path}"]) == 0
    assert list(pd.read_csv(study.report / "runs.csv")["replaced_crops"]) == [0, 2]
    remark = "2 training crops of 1 run replaced, because 1 clip of the shards is damaged (table replaced_crops)."
    assert remark in (study.report / "report.md").read_text()
    table = (study.report / "tables" / "replaced_crops.md").read_text()
    assert f"| {plan[1]['run_id']} |" in table
    assert "| 2 | 0.62% | 1: p226_001 | noisy samples (2) |" in table
    assert plan[0]["run_id"] not in table
    crops = pd.read_csv(study.report / "tables" / "replaced_crops.csv")
    assert (list(crops["t"]), set(crops["by"])) == ([3, 300], {"p226_009"})
    assert "Training crops replaced because of damaged clips" in (study.report / "report.html").read_text()


def test_the_analysis_needs_no_torch() -> None:
    modules = sorted(f"analysis.{path.stem}" for path in (ROOT / "analysis").glob("*.py") if path.stem != "__init__")
    program = f"import sys, {', '.join(modules)}; print({{'torch', 'hydra', 'scaling.errors'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_lines_for_a_notebook_in_the_documentation_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [run_record(size, 100.0) for size in FAMILY]
    path = tmp_path / "study"
    for row in plan:
        write_run(
            StudyDirectory(path), row, true_loss(row["size"]["name"], 100.0), np.random.default_rng(0), utterances=0
        )
    write_records(StudyDirectory(path).plan, plan)
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {"path": path}
    exec(lines, names)
    assert len(names["study"].runs) == len(plan)
    assert {"validation_loss", "size"} <= set(names["study"].runs)
    assert not names["study"].curves.empty
    assert set(names["laws"].data["law"]) == {"L(N)", "L(C)"}
    assert "L(N)" in capsys.readouterr().out


def test_a_study_in_a_folder_whose_name_is_no_text_has_its_report(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"odd\xed")
    row = run_record("xt", 100.0)
    write_run(StudyDirectory(path), row, 0.04, np.random.default_rng(0))
    write_records(StudyDirectory(path).plan, [row])
    command = [sys.executable, "-m", "analysis.report", f"study={path}", "bootstraps=100"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "# Scaling study odd\\udced" in (path / "report" / "report.md").read_text(encoding="utf-8")


def test_the_analysis_runs_where_torch_cannot_be_imported(tmp_path: Path):
    study = sizes_study(tmp_path / "study", seeds=2)
    blocked = tmp_path / "blocked"
    for name in ("torch", "hydra", "accelerate", "submitit", "omegaconf"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not installed here')")
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    for command in (["analysis.report"], ["analysis.advise", "gpu_hours=2"]):
        words = [sys.executable, "-m", command[0], f"study={study.path}", "bootstraps=100", *command[1:]]
        done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        assert "Error" not in done.stderr, done.stderr
    assert (study.report / "report.html").exists()
