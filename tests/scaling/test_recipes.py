"""The recipes are those of the papers, and what came later has renamed no run."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import soundfile
import torch
from torch import nn

from bsrnn.losses import LossConfig
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.early_stopping import EarlyStopping, EarlyStoppingConfig
from scaling.errors import UserError
from scaling.plan import plan_run, training_clips
from scaling.records import RunDirectory
from scaling.shards import SAMPLE_RATE, ShardIndex
from scaling.train import main
from tests.scaling.vbd_folder import make_corpus, prepare

MISTAKES = {
    "train.optimiser.name=sgd": r"train.optimiser.name = sgd: expected one of adamw, adam, adamp",
    "train.optimiser.schedule=linear": r"train.optimiser.schedule = linear: expected one of cosine, step",
    "train.optimiser.schedule=step": r"step_interval = None, step_factor = None: expected at least 1 step",
    "train.optimiser.step_interval=5": r"schedule = cosine uses no step_interval or step_factor",
    "train.optimiser.groups=[{pattern: a, lr_scale: -1}]": r"groups, a: lr_scale = -1.0: expected at least 0",
    "train.early_stopping={interval: 0, patience: 1}": r"train.early_stopping.interval = 0: expected at least 1",
    "train.early_stopping.patience=3": r"interval = None and patience = 3: give both or neither",
    "train.losses.pesq=-1": r"train.losses.pesq = -1.0: expected a finite weight",
    "execution.metrics=[mos]": r"execution.metrics: mos is not a metric; expected names among pesq_wb",
    "execution.metrics=[]": r"execution.metrics = \[\]: expected at least one of pesq_wb",
    "execution.samples_every=0": r"execution.samples_every = 0: expected at least 1, or null",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_in_a_recipe_is_one_line(override: str):
    with pytest.raises(UserError, match=MISTAKES[override]) as caught:
        load_config(RunConfig, "run", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stage", "is_refused"), [("none", False), ("zero0", False), ("zero1", True), ("zero3", True)])
def test_adamp_does_not_become_adamw_where_its_weights_lose_their_shapes(stage: str, is_refused: bool):
    words = ["train.optimiser.name=adamp", f"deepspeed={stage}"]
    if is_refused:
        with pytest.raises(UserError, match=r"adamp does not go with execution\.zero_stage = \d, which lays"):
            load_config(RunConfig, "run", words)
    else:
        load_config(RunConfig, "run", words)


@pytest.mark.parametrize(
    ("words", "run_id"),
    [
        ((), "xt-seed0-edf29387"),
        (("train=fastenhancer", "train.losses.pesq=0", "train.budget.epochs=10000"), "xt-seed0-fa1ebdfb"),
        (
            ("model=t", "train.precision=bf16", "data.hours=0.02", "train.optimiser.max_gradient_norm=5"),
            "t-0.02h-seed0-49cf55e7",
        ),
    ],
)
def test_runs_planned_before_a_setting_existed_keep_their_id(
    tiny_data: list[str], tiny_index: ShardIndex, words: tuple[str, ...], run_id: str
):
    index = replace(tiny_index, index_hash="0" * 64)
    assert plan_run(load_config(RunConfig, "run", [*tiny_data, *words]), index).run_id == run_id


LATER = ("train.losses.pesq=1e-3", "train.losses.multi_resolution=1", "train.optimiser.name=adamp",
         "train.optimiser={schedule: step, step_interval: 5, step_factor: 0.5}",
         "train.optimiser.groups=[{pattern: '*bias*', weight_decay: 0}]", "data.train_on_validation=true",
         "train.early_stopping={interval: 5, patience: 2}")  # fmt: skip


def test_a_later_setting_that_is_not_at_its_default_makes_another_run(tiny_run: list[str], tiny_index: ShardIndex):
    plans = [plan_run(load_config(RunConfig, "run", [*tiny_run, *words]), tiny_index) for words in [(), *zip(LATER)]]
    assert len({plan.run_id for plan in plans}) == len(plans)


def test_fastenhancer_is_the_published_recipe():
    train = load_config(RunConfig, "run", ["train=fastenhancer", "data=vbd28"]).train
    assert asdict(train.losses) == {
        "magnitude": 0.3,
        "complex": 0.2,
        "consistency": 0.3,
        "waveform": 0.2,
        "pesq": 1e-3,
        "multi_resolution": 0.0,
    }
    optimiser = train.optimiser
    assert (optimiser.name, optimiser.learning_rate, optimiser.min_learning_rate) == ("adamw", 2e-3, 1e-6)
    assert ([*optimiser.betas], optimiser.weight_decay, optimiser.warmup_steps) == ([0.95, 0.999], 0.01, 500)
    assert optimiser.max_gradient_norm is None
    assert (train.budget.epochs, train.global_batch, train.crop_seconds, train.precision) == (500, 64, 2.0, "fp32")


def test_espnet_is_the_published_recipe_with_one_patience_for_all_sizes():
    recipes = [load_config(RunConfig, "run", ["train=espnet", f"model={size}"]).train for size in ("xxt", "xl")]
    assert recipes[0] == recipes[1]
    train, optimiser = recipes[0], recipes[0].optimiser
    assert {name for name, weight in asdict(train.losses).items() if weight} == {"multi_resolution"}
    assert (optimiser.name, optimiser.learning_rate, optimiser.weight_decay) == ("adam", 1e-3, 1e-5)
    assert (optimiser.schedule, optimiser.step_interval, optimiser.step_factor) == ("step", 2 * 8_000, 0.99)
    assert (train.budget.steps, train.global_batch, optimiser.max_gradient_norm) == (100 * 8_000, 4, 5.0)
    assert train.early_stopping == EarlyStoppingConfig(interval=8_000, patience=30)


def test_all_28_speakers_are_trained_on_where_that_is_asked(tiny_data: list[str], tiny_index: ShardIndex):
    speakers = {}
    for asked in ("false", "true"):
        config = load_config(RunConfig, "run", [*tiny_data, f"data.train_on_validation={asked}"])
        speakers[asked] = {clip.speaker for clip in training_clips(config, tiny_index)}
    held_out = {clip.speaker for clip in tiny_index.clips("validation")}
    assert held_out
    assert not speakers["false"] & held_out
    assert speakers["true"] == speakers["false"] | held_out
    assert load_config(RunConfig, "run", ["data=vbd28"]).data.train_on_validation
    assert load_config(RunConfig, "run", ["data=vbd28"]).data.shards == "data/vbd/shards"


def test_early_stopping_keeps_the_best_weights_and_ends_after_its_patience():
    stopping = EarlyStopping(patience=2)
    model = nn.Linear(1, 1, bias=False)
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.0], 1):
        assert not stopping.is_over
        nn.init.constant_(model.weight, step)
        stopping.update(loss, step, model)
    assert stopping.is_over
    assert (stopping.best_step, stopping.best_loss) == (2, 1.0)
    assert stopping.best_weights["weight"].item() == 2
    again = EarlyStopping(patience=2)
    again.load_state_dict(stopping.state_dict())
    assert again.is_over
    assert torch.equal(again.best_weights["weight"], stopping.best_weights["weight"])


def test_a_run_stops_early_and_is_scored_with_its_best_weights(tiny_run: list[str], tmp_path: Path, command):
    """A learning rate that explodes after its warm-up makes every later validation worse."""
    words = [*tiny_run, "train.early_stopping={interval: 2, patience: 2}", "train.optimiser.warmup_steps=4"]
    words += ["train.optimiser.learning_rate=3", "execution.metrics=[si_sdr]"]
    done = command("scaling.train", *words)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "study" / "runs").iterdir()
    directory = RunDirectory(run)
    losses = {row["step"]: row["loss"] for row in directory.read_metrics() if row["kind"] == "validation"}
    best = min(losses, key=lambda step: (losses[step], step))
    assert max(losses) == best + 4 < 24
    assert directory.state()[0] == "finished"
    state = torch.load(max((run / "checkpoints").iterdir()) / "state.pt", weights_only=True)
    assert state["early_stopping"]["best_step"] == best
    before = directory.read_scores()
    done = command("scaling.evaluate", f"run={run}", "processes=1")
    assert done.returncode == 0, done.stderr
    for old, new in zip(before, directory.read_scores(), strict=True):
        assert new["si_sdr"] == pytest.approx(old["si_sdr"], abs=1e-3)


# --- a run's folder ------------------------------------------------------------------------


def test_a_folder_of_ones_own_is_not_taken_from_another_run_and_goes_on_alone(
    tiny_run: list[str], tmp_path: Path, command
):
    folder = tmp_path / "mine"
    words = [*tiny_run, "train.budget.steps=4", "execution.metrics=[si_sdr]", f"run={folder}"]
    done = command("scaling.train", *words)
    assert done.returncode == 0, done.stderr
    assert RunDirectory(folder).state()[0] == "finished"
    assert not (tmp_path / "study").exists()

    done = command("scaling.train", *words, "seed=1", "train.precision=bf16")
    assert done.returncode == 2
    assert f"{folder} holds another run (seed = 0 there and 1 here, train.precision = fp32 there" in done.stderr
    assert "force=true" in done.stderr

    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:]:
        raise AssertionError(f"{checkpoint}: one was expected")
    (folder / "scores.jsonl").unlink()
    events = (folder / "events.jsonl").read_text().splitlines()
    (folder / "events.jsonl").write_text("\n".join(line for line in events if '"finished"' not in line) + "\n")
    folder = folder.rename(tmp_path / "moved")
    done = command("scaling.train", f"run={folder}", "execution.log_every=2")
    assert done.returncode == 0, done.stderr
    assert RunDirectory(folder).state()[0] == "finished"
    assert (folder / "scores.jsonl").exists()
    assert [event["event"] for event in RunDirectory(folder).read_events()].count("resumed") == 1

    own = folder / "papers" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("mine")
    for more in (["seed=1", "force=true"], ["train.test=true", "force=true"], ["train.test=true"]):
        (folder / "scores.jsonl").write_text("of the run before")
        done = command("scaling.train", *words[:-1], f"run={folder}", *more)
        assert done.returncode == 0, done.stderr
        assert RunDirectory(folder).state()[0] == "finished"
        assert "of the run before" not in (folder / "scores.jsonl").read_text()
        assert own.read_text() == "mine", "what is no part of a run stays"
    done = command("scaling.train", f"run={tmp_path / 'nothing'}")
    assert done.returncode == 2
    assert f"no run at {tmp_path / 'nothing'}" in done.stderr


def test_going_on_is_checked_against_the_folders_run_and_not_the_default_one(
    tiny_run: list[str], tmp_path: Path, command
):
    folder = f"run={tmp_path / 'mine'}"
    words = [*tiny_run, "train.budget.steps=4", "train.global_batch=16", "train.norm_batch=16", folder]
    done = command("scaling.train", *words, "execution.metrics=[si_sdr]")
    assert done.returncode == 0, done.stderr
    done = command("scaling.train", folder, "execution.micro_batch=16")  # the default run's global batch is 8
    assert done.returncode == 0, done.stderr
    for more, expected in (
        (["execution.micro_batch=5"], "execution.micro_batch = 5: expected a divisor of train.global_batch = 16 that"),
        (["execution.micro_batc=16"], "execution.micro_batc: no such setting; did you mean execution.micro_batch?"),
        (["+execution.micro_batc=16"], "execution.micro_batc: no such setting; did you mean execution.micro_batch?"),
        (["execution.log_every=${nothing}"], "execution.log_every: Interpolation key 'nothing' not found"),
        (["seed=0", "execution.micro_batch=16"], "expected a divisor of train.global_batch = 8 that"),
        (["seed=0", "+execution.micro_batc=16"], "execution.micro_batc: no such setting; did you mean"),
    ):
        done = command("scaling.train", folder, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert expected in done.stderr


def test_enhanced_utterances_and_spectrograms_go_to_tensorboard(tiny_run: list[str], tmp_path: Path, command):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*tiny_run, "train.budget.steps=4", "execution.metrics=[si_sdr]"]
    done = command("scaling.train", *words, "execution.num_validations=2", "execution.samples_every=1")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "study" / "runs").iterdir()
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    assert len({tag.split("/")[1] for tag in tags["audio"]}) == 4
    (utterance, *_) = sorted({tag.split("/")[1] for tag in tags["audio"]})
    for name, steps in (("enhanced", [2, 4]), ("noisy", [2]), ("clean", [2])):
        audio = board.Audio(f"samples/{utterance}/{name}")
        assert [event.step for event in audio] == steps
        assert audio[0].sample_rate == 16_000
        assert audio[0].encoded_audio_string.startswith(b"RIFF")
        images = board.Images(f"samples/{utterance}/{name}/spectrogram")
        assert [event.step for event in images] == steps
        assert images[0].height == 257


def test_a_sample_that_the_test_set_lacks_is_refused(tiny_run: list[str], command):
    done = command("scaling.train", *tiny_run, "execution.samples_every=1", "data.samples=[p999_001]")
    assert done.returncode == 2
    assert "data.samples: p999_001 is not a test utterance of" in done.stderr


def test_a_validation_clip_too_short_for_a_term_of_the_loss_is_padded_and_ends_no_run(tmp_path: Path):
    corpus = make_corpus(tmp_path / "corpus", 16_000)
    for kind in ("clean", "noisy"):
        path = corpus / f"{kind}_trainset_28spk_wav" / "p226_001.wav"
        soundfile.write(path, soundfile.read(path)[0][4_000:4_100], 16_000, "PCM_16")
    prepare(corpus, tmp_path / "shards")
    words = ["data=vbd", f"data.root={corpus}", f"data.shards={tmp_path / 'shards'}", f"run={tmp_path / 'run'}"]
    words += ["model=xxt", "train.test=true", "train.crop_seconds=0.1", "train.global_batch=2", "train.norm_batch=2"]
    words += ["train.losses.pesq=1e-3", "train.losses.multi_resolution=1e-3", "execution.metrics=[si_sdr]"]
    assert main([*words, "execution.device=cpu", "execution.threads=1", "execution.samples_every=null"]) == 0
    (row,) = [row for row in RunDirectory(tmp_path / "run").read_metrics() if row["kind"] == "validation"]
    assert all(math.isfinite(row["terms"][name]) for name in ("pesq", "multi_resolution"))


def test_the_shortest_crop_has_every_term_of_the_loss():
    with pytest.raises(UserError, match=r"crop_seconds = 0.09: expected 0.1 to 60"):
        load_config(RunConfig, "run", ["train.crop_seconds=0.09"])
    assert LossConfig(pesq=1.0, multi_resolution=1.0).fewest_samples <= 0.1 * SAMPLE_RATE
