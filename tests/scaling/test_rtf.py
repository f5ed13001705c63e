"""The real-time factors of a study's architectures go where the scaling table finds them, each to its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis.gather import gather
from analysis.scaling_table import scaling_table
from bsrnn.rtf import measure
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.plan import plan_run
from scaling.records import RecordError, StudyDirectory, write_records
from scaling.rtf import main
from scaling.shards import ShardIndex

CELLS = ({"model": "c8"}, *({"model": "xxt", "model.norm": norm} for norm in ("batch", "cumulative", "group")))


@pytest.fixture
def study(tiny_data: list[str], tiny_index: ShardIndex, tmp_path: Path) -> StudyDirectory:
    """Planned: a size of the configuration, another with three norms, and that with two seeds."""
    study = StudyDirectory(tmp_path / "a study")
    plans = []
    for cell in (*CELLS, CELLS[1] | {"seed": 1}):
        words = [*tiny_data, *(f"{name}={value}" for name, value in cell.items()), "train.budget.steps=30"]
        plans.append(plan_run(load_config(RunConfig, "run", words), tiny_index, cell).to_record())
    write_records(study.plan, plans)
    return study


def test_every_architecture_that_streams_has_the_row_that_the_scaling_table_shows(
    study: StudyDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("scaling.rtf.SECONDS", 0.02)
    threads = torch.get_num_threads()
    try:
        for _ in range(2):  # the file is written anew
            assert main([f"study={study.path}"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = study.read_rtf()
    assert [(row["size"], row["model"]) for row in rows] == [
        ("c8", {"num_channels": 8, "num_layers": 6}),
        ("xxt", {"num_channels": 16, "num_layers": 2}),
        ("xxt", {"num_channels": 16, "num_layers": 2, "norm": "cumulative"}),
    ]
    assert [row["step"] for row in rows] == ["kernel", "kernel", "torch: its normalisations are not folded"]
    assert "xxt norm=group  does not stream" in capsys.readouterr().out
    cells = scaling_table(gather(study.path)).cells.set_index("label")
    assert cells["rtf"].dropna().to_dict() == {
        "c8 · model.norm=–": rows[0]["rtf"],
        "xxt · model.norm=batch": rows[1]["rtf"],
        "xxt · model.norm=cumulative": rows[2]["rtf"],
    }
    assert len(cells) == 4


def test_what_is_measured_is_the_planned_network(study: StudyDirectory, monkeypatch: pytest.MonkeyPatch):
    given = []
    monkeypatch.setattr("scaling.rtf.SECONDS", 0.02)
    monkeypatch.setattr("scaling.rtf.measure", lambda config, seconds: given.append(config) or measure(config, seconds))
    assert main([f"study={study.path}"]) == 0
    assert [(config.num_channels, config.num_layers, config.norm) for config in given] == [
        (8, 6, "batch"),
        (16, 2, "batch"),
        (16, 2, "cumulative"),
    ]


def test_a_users_mistake_is_one_line(study: StudyDirectory, tmp_path: Path):
    with pytest.raises(UserError, match="study is not set: give study=VALUE"):
        main([])
    with pytest.raises(RecordError, match=r"no study at .*/nowhere: it has no plan\.jsonl"):
        main([f"study={tmp_path}/nowhere"])
    (plan, *_) = study.read_plan()
    del plan["config"]["model"]
    write_records(study.plan, [plan])
    with pytest.raises(RecordError, match=rf"run {plan['run_id']} was planned by another version .*: plan the study"):
        main([f"study={study.path}"])
