"""A run leaves its records and its model; a run that diverges says so; hardware settings change no result."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bsrnn import BSRNN, BSRNNConfig, modelfile
from bsrnn.losses import LossConfig, enhancement_loss
from scaling import trainer
from scaling.budget import select_hours
from scaling.checkpoint import list_checkpoints, load_newest
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.evaluate import load_model
from scaling.metrics import si_sdr
from scaling.plan import plan_run
from scaling.processes import ALONE
from scaling.records import RunDirectory
from scaling.shard_reader import ShardReader
from scaling.shards import ShardIndex
from scaling.stopping import StopFlag
from scaling.stream import CropDataset
from scaling.trainer import validation_steps
from tests.scaling.runs import only_run


def test_a_finished_run_leaves_its_model_in_one_file(uninterrupted: RunDirectory):
    _, trained = load_model(uninterrupted)
    from_file = modelfile.load_model(uninterrupted.path)
    assert from_file.config == trained.config
    for name, tensor in trained.state_dict().items():
        assert torch.equal(from_file.state_dict()[name], tensor), name


def test_a_run_leaves_every_record_that_a_table_needs(uninterrupted: RunDirectory):
    plan = uninterrupted.read_plan()
    assert uninterrupted.state()[0] == "finished"
    kinds = [event["event"] for event in uninterrupted.read_events()]
    assert kinds == ["started", *["checkpointed"] * 5, "evaluating", "finished"]
    rows = uninterrupted.read_metrics()
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 25))
    for row in train:
        assert math.isfinite(row["loss"])
        assert row["gradient_norm"] > 0
        assert row["audio_seconds_per_second"] > 0
        assert 0.05 < row["memory_gib"] < 10
        weights = {"magnitude": 0.3, "complex": 0.2, "consistency": 0.3, "waveform": 0.2}
        assert row["loss"] == pytest.approx(sum(weights[name] * row["terms"][name] for name in weights), rel=1e-5)
    (validation,) = [row for row in rows if row["kind"] == "validation"]
    assert validation["step"] == 24
    assert validation["unprocessed_loss"] > 0
    scores = uninterrupted.read_scores()
    assert len(scores) == 4
    for row in scores:
        assert 1 <= row["unprocessed_pesq_wb"] <= 4.64
        assert row["speaker"] in ("p232", "p257")
        assert row["snr_db"] == pytest.approx(row["unprocessed_si_sdr"], abs=0.5)
    assert plan["provenance"]["commit"]
    board = EventAccumulator(str(uninterrupted.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 25))
    assert board.Scalars("validation/loss")[0].value == pytest.approx(validation["loss"])


def test_three_steps_equal_a_loop_written_by_hand(tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path, command):
    """Learning rate, weight decay, clipping, losses, the budget's clips and their crops all reach the weights."""
    words = ["train.budget.steps=3", "train.norm_batch=4", "train.optimiser.learning_rate=0.01", "seed=5"]
    words += ["train.optimiser.weight_decay=0.5", "train.optimiser.max_gradient_norm=0.005", "data.hours=0.02"]
    assert command("scaling.train", *tiny_run, *words).returncode == 0
    directory = only_run(tmp_path / "study")

    torch.set_num_threads(1)  # as the run: AdamW's first steps turn rounding of small gradients into whole steps
    torch.manual_seed(5)
    model = BSRNN(BSRNNConfig(16, 2))
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.95, 0.999), weight_decay=0.5)
    clips = select_hours(tiny_index.clips("train"), 0.02, 0)
    assert len(clips) < len(tiny_index.clips("train"))
    dataset = CropDataset(tiny_index.root, clips, 8_000, seed=5)
    norms = []
    for step, rate in enumerate((0.005, 0.01, 0.01)):  # two steps of warm-up, then the cosine's beginning
        crops = [dataset[t] for t in range(4 * step, 4 * step + 4)]
        noisy, clean = (torch.stack(part).float() / 32768 for part in zip(*crops, strict=True))
        optimiser.zero_grad()
        enhancement_loss(model(noisy), clean, model.stft, LossConfig()).total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.005).item())
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    assert min(norms) > 0.005, "not everything was clipped"
    recorded = [row["gradient_norm"] for row in directory.read_metrics() if row["kind"] == "train"]
    assert recorded == pytest.approx(norms, rel=1e-3)
    state = load_newest(directory.checkpoints)[1]["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), msg=lambda text, name=name: f"{name}: {text}")


def test_validation_and_scores_are_of_the_trained_model_on_their_own_splits(
    uninterrupted: RunDirectory, tiny_index: ShardIndex
):
    _, model = load_model(uninterrupted)
    reader, losses, si_sdrs = ShardReader(tiny_index.root), [], []
    with torch.inference_mode():
        for clip in tiny_index.clips("validation"):
            assert clip.speaker in ("p226", "p287")
            noisy, clean = (torch.from_numpy(part).float()[None] / 32768 for part in reader.read_clip(clip))
            losses.append(enhancement_loss(model(noisy), clean, model.stft, LossConfig()).total.item())
        for clip in sorted(tiny_index.clips("test"), key=lambda clip: clip.id):
            noisy, clean = (torch.from_numpy(part).float()[None] / 32768 for part in reader.read_clip(clip))
            si_sdrs.append(si_sdr(model(noisy).waveform[0].numpy(), clean[0].numpy()))
    (validation,) = [row for row in uninterrupted.read_metrics() if row["kind"] == "validation"]
    assert validation["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert [row["si_sdr"] for row in uninterrupted.read_scores()] == pytest.approx(si_sdrs, abs=1e-3)


def test_what_the_noisy_input_scores_is_taken_once(
    tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_run(load_config(RunConfig, "run", tiny_run), tiny_index)
    num_taken = []
    taken = trainer.unprocessed
    monkeypatch.setattr(trainer, "unprocessed", lambda *signal: num_taken.append(1) or taken(*signal))
    with StopFlag() as stop:
        validating = trainer.Trainer(plan, RunDirectory(tmp_path / "run"), tiny_index, ALONE, stop)
        first, again = validating.validate(), validating.validate()
    assert first == again
    assert first[0]["unprocessed_loss"] > 0 < len(num_taken) == len(tiny_index.clips("validation"))
    assert first[0]["unprocessed_si_sdr"] != first[0]["si_sdr"]


def test_micro_batch_and_workers_change_no_result_beyond_rounding(
    uninterrupted: RunDirectory, tiny_run: list[str], tmp_path: Path, command
):
    done = command("scaling.train", *tiny_run, "execution.micro_batch=2", "execution.num_workers=2")
    assert done.returncode == 0, done.stderr
    directory = only_run(tmp_path / "study")
    assert directory.run_id == uninterrupted.run_id
    for ours, theirs in zip(directory.read_metrics(), uninterrupted.read_metrics(), strict=True):
        assert ours["step"] == theirs["step"]
        # AdamW makes rounding grow with the steps
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4 if ours["step"] <= 5 else 5e-3)


@pytest.mark.parametrize("steps", [1, 24])  # in the last step only the validation can tell
def test_a_diverging_run_stops_on_record_and_is_not_scored(tiny_run: list[str], tmp_path: Path, command, steps: int):
    words = ["train.optimiser.learning_rate=1e30", "train.optimiser.warmup_steps=0", f"train.budget.steps={steps}"]
    done = command("scaling.train", *tiny_run, *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    directory = only_run(tmp_path / "study")
    state, event = directory.state()
    assert (state, event["failure"]) == ("failed", "diverged")
    assert ("the loss of step" if steps > 1 else "the validation loss after step 1") in event["reason"]
    assert not directory.scores.exists()
    assert all(checkpoint.step < steps for checkpoint in list_checkpoints(directory.checkpoints))


def test_the_quick_check_trains_ten_steps_validates_scores_and_ends(tiny_run: list[str], tmp_path: Path, command):
    for _ in range(2):  # it starts anew every time
        done = command("scaling.train", *tiny_run, "train.test=true")
        assert done.returncode == 0, done.stderr
        directory = only_run(tmp_path / "study")
        assert directory.run_id.startswith("test-xxt-seed0-")
        assert [row["step"] for row in directory.read_metrics() if row["kind"] == "validation"] == [10]
        assert [row["step"] for row in directory.read_metrics() if row["kind"] == "train"] == list(range(1, 11))
        assert directory.read_scores()
        assert next(event["event"] for event in directory.read_events()) == "started"
        assert "10 of 10" in done.stderr  # plain lines where there is no terminal


@pytest.mark.parametrize("more", [[], ["train.test=true"], ["force=true"]])
def test_a_folder_that_is_no_runs_is_left_as_it_is(tiny_run: list[str], tmp_path: Path, command, more: list[str]):
    foreign = tmp_path / "mine" / "checkpoints" / "best.pth"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    (tmp_path / "mine" / "model.pt").write_text("precious too")
    done = command("scaling.train", *tiny_run, f"run={tmp_path / 'mine'}", *more)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "mine holds checkpoints, model.pt and no plan.json, so it is not a run's folder: name another" in done.stderr
    assert foreign.read_text() == "precious"


@pytest.mark.parametrize(
    "setting", ["train.precision=bf16", "execution.compile=true", "train.optimiser.max_gradient_norm=0.001"]
)
def test_other_precisions_compilation_and_clipping_train(tiny_run: list[str], tmp_path: Path, command, setting: str):
    done = command("scaling.train", *tiny_run, "train.budget.steps=3", setting)
    assert done.returncode == 0, done.stderr
    directory = only_run(tmp_path / "study")
    assert all(math.isfinite(row["loss"]) for row in directory.read_metrics())
    assert directory.state()[0] == "finished"
    started = directory.read_events()[0]
    assert started["hardware"]["lstm"] == "compiled"
    planned_with = directory.read_plan()["provenance"]
    for key in ("commit", "uncommitted_diff_sha256"):
        assert started[key] == planned_with[key]


def test_an_incomplete_environment_is_refused_before_anything_is_written(tiny_run: list[str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "scaling.train", *tiny_run],
        env=os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: WORLD_SIZE = 2 but MASTER_ADDR, MASTER_PORT not set: start all processes with ")
    assert not list(tmp_path.glob("study/runs/*/plan.json"))


def test_a_users_mistakes_end_in_one_line_and_status_2(tiny_run: list[str], tmp_path: Path, command):
    for words, expected in (
        (["model=huge"], "error: model=huge: no such model"),
        (["data=vbd"], "one of these settings has a parent that is null; leave it out"),
        (["data.hours=5"], "error: data.hours = 5 needs 5 h"),
        (["execution.device=cuda"], "error: execution.device = cuda: torch finds no GPU here"),
    ):
        if "cuda" in words[0] and torch.cuda.is_available():
            continue
        done = command("scaling.train", *tiny_run, *words)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    missing = command("scaling.train", "data=vbd")
    assert missing.returncode == 2
    assert missing.stderr.strip() == (
        "error: data=vbd: no shards at data/vbd/shards; "
        "make them once with python -m scaling.prepare data=vbd data.root=DIR"
    )


def test_a_corrupt_index_is_one_line(tiny_run: list[str], tmp_path: Path, command):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.json").write_text('{"format": 1')
    done = command("scaling.train", *tiny_run, f"data.shards={shards}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"delete {shards} and run python -m scaling.prepare again" in line


def test_validations_are_evenly_spaced_and_the_last_is_at_the_end():
    assert validation_steps(300, 4) == {75, 150, 225, 300}
    assert validation_steps(3, 5) == {1, 2, 3}
    assert validation_steps(1, 1) == {1}
