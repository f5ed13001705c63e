"""The report says what was trained, and what a validation loss on training speakers may not be used for."""

from __future__ import annotations

import html
import re

import pytest

from analysis.advise import RefusalError, advise
from analysis.claims import claims
from analysis.gather import gather
from analysis.provenance import trained
from analysis.report import main
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import grid_study, lines

SPEAKERS = (
    r"12 of 12 runs trained on the speakers of validation \(data\.train_on_validation\): their loss chooses nothing"
)


@pytest.fixture(scope="module")
def vbd28(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """4 sizes x 3 budgets of equal compute that trained on the speakers of validation, by one recipe."""
    study = grid_study(tmp_path_factory.mktemp("vbd28") / "study", ("c8", "xt", "t", "c48"), (0.3, 1.0, 3.0), seeds=1)
    plans = study.read_plan()
    for plan in plans:
        plan["science"]["data"] = {"index_hash": "ab12", "train_on_validation": True}
        plan["science"]["train"] |= {"losses": {"magnitude": 0.3}, "precision": "fp32", "global_batch": 64}
        model = {"name": plan["size"]["name"], **plan["science"]["model"], "front_end": "streaming_16khz"}
        optimiser = {"name": "adamw", "warmup_steps": 20}
        plan["config"] = {
            "model": model,
            "train": {"budget": {"steps": 7}, "optimiser": optimiser},
            "data": {"cache": "x"},
        }
    study.plan.write_text(lines(plans))
    return study


def test_the_settings_that_all_runs_share_are_listed_and_those_that_differ(vbd28: StudyDirectory):
    table = trained(gather(vbd28.path)).set_index("Setting")
    assert table.loc["model", "Value"] == "num_layers 6, front_end streaming_16khz", (
        "at its default, not in the science"
    )
    assert table.loc["train.optimiser", "Value"] == "name adamw, warmup_steps 20"
    assert table.loc["train.losses", "Value"] == "magnitude 0.3"
    assert table.loc["train", "Value"] == "precision fp32, global_batch 64"
    assert table.loc["data", "Value"] == "train_on_validation true"
    width = table.loc["model.num_channels"]
    assert width["Value"] == "8 (3 runs), 16 (3 runs), 32 (3 runs), 48 (3 runs)"
    assert width[""] == "differs"
    assert not table.index.str.contains("budget|cache|seed").any()


def test_a_loss_on_training_speakers_is_called_that_and_chooses_nothing(
    vbd28: StudyDirectory, capsys: pytest.CaptureFixture[str]
):
    assert main([f"study={vbd28.path}", "bootstraps=100"]) == 0
    assert "note: 12 of 12 runs trained on the speakers of validation too" in capsys.readouterr().out
    text = html.unescape((vbd28.report / "report.html").read_text())
    text = re.sub(r'base64,[^"]*', "", text)
    assert "<h2>What was trained</h2>" in text
    assert "Loss on training speakers ↓" in text
    assert "Loss on training speakers: L(N, D)" in text
    assert "L the loss on training speakers as it was trained" in text
    assert not re.search("validation loss(?! of)", text, re.I), "whatever names it names whose it is"
    assert re.search(f"No isoflop curves figure: {SPEAKERS}", text)
    found = claims(gather(vbd28.path), Settings(vbd28.path, bootstraps=100))
    with pytest.raises(RefusalError, match=f"^{SPEAKERS}$"):
        advise(found, 1.0)
