"""A mistake in a setting is one line that names it, its value, what was expected and the remedy."""

from __future__ import annotations

import pytest

from scaling.cli import CONFIG_FOLDER, load_config
from scaling.config import BudgetConfig, RunConfig
from scaling.errors import UserError

MISTAKES = {
    "model=xxl": r"model=xxl: no such model; expected one of .*c2, c24, .*xt, xxt.* \(the files of conf/model\)",
    "train=nope": r"train=nope: no such train; expected one of .*demo, .*espnet, .*fastenhancer",
    "sede=1": r"sede: no such setting; did you mean seed or data.demo.seed",
    "train.optimiser.lerning_rate=1": r"train.optimiser.lerning_rate: no such setting; did you mean train.optimiser.l",
    "losses.magnitude=1": r"losses: no such setting; did you mean train.losses\?",
    "nonsense=1": r"nonsense: no such setting; the settings are listed in docs/configuration.md",
    "+sede=1": r"sede: no such setting; did you mean seed or data.demo.seed",
    "++train.optimiser.lerning_rate=1": r"lerning_rate: no such setting",
    "foo": r"foo: not understood as KEY=VALUE",
    "execution.metrics=si_sdr": r"execution.metrics: expected a list, execution.metrics=\[\.\.\.\]",
    "seed=one": r"seed: Value 'one' of type 'str' could not be converted to Integer",
    "seed=-1": r"seed = -1: expected a whole number from 0 to 2\^63 - 1",
    "data.hours=0": r"data.hours = 0.0: expected a number of hours above 0",
    "data.demo.hours=-1": r"hours=-1.0, expected 0.04",
    "model.num_channels=0": r"model xt: num_channels = 0: expected a whole number of at least 1",
    "train.budget.epochs=2": r"train.budget has steps=\d+, epochs=2.0: expected exactly one of steps, ",
    "train.budget.steps=null": r"train.budget has none: expected exactly one of",
    "train.budget.steps=0": r"train.budget.steps = 0: expected above 0",
    "train.global_batch=12": r"train.global_batch = 12 is not a multiple of train.norm_batch = 8",
    "execution.micro_batch=3": r"execution.micro_batch = 3: expected a divisor of train.global_batch = 8 that is",
    "train.precision=int8": r"train.precision = int8: expected one of fp32, bf16, fp16",
    "train.losses.waveform=-1": r"train.losses.waveform = -1.0: expected a finite weight of at least 0",
    "train.losses.magnitude=nan": r"train.losses.magnitude = nan: expected a finite weight",
    "data.hours=inf": r"data.hours = inf: expected a finite number",
    "train.budget.steps=null train.budget.epochs=inf": r"train.budget.epochs = inf: expected a finite number",
    "train.optimiser.learning_rate=inf": r"learning_rate = inf: expected a finite number",
    "train.optimiser.betas=[0.9]": r"betas = \[0.9\]: expected two numbers",
    "data.block_shards=0": r"data.block_shards = 0: expected at least 1, or null",
    "data.cache_gb=0": r"data.cache_gb = 0.0: expected above 0",
    "data.max_damaged_share=1": r"data.max_damaged_share = 1.0: expected 0 \(none\) to below 1",
    "data.order_seed=-1": r"data.order_seed = -1: expected a whole number",
    "model=null": r"model",
    "=3": r"=3",
    "train.crop_seconds=0": r"train.crop_seconds = 0.0: expected 0.1 to 60 seconds",
    "train.optimiser.learning_rate=0": r"expected learning_rate >= min_learning_rate >= 0",
    "train.optimiser.max_gradient_norm=0": r"max_gradient_norm = 0.0: expected above 0, or null",
    "execution.device=tpu": r"execution.device = tpu: expected one of auto, cpu, cuda",
    "execution.num_workers=-1": r"execution.num_workers = -1: expected at least 0",
    "model=music_v7": r"samples at 44100 Hz are no whole numbers of samples at 16000 Hz",
    "model.front_end=mel": r"model.front_end = mel: expected one of streaming_16khz, universal_48khz, music_44khz",
    "model.norm=layer": r"model xt: norm = layer: expected one of batch, group, cumulative",
    "model=ses_tiny model.norm=batch": r"n_fft = 320 has 161: .* or a norm other than batch",
    "model.name=???": r"model.name is not set: give model.name=VALUE",
    "model.num_channels=100000": r"^model.num_channels = 100000: expected at most 4096$",
    "model.num_layers=257": r"^model.num_layers = 257: expected at most 256$",
    "execution.threads=9999999": r"^execution.threads = 9999999: expected at most 1024$",
    "execution.compile=true execution.audit=true": r"^execution.compile does not go with execution.audit: leave one",
    "execution.compile=true deepspeed=zero0": r"^execution.compile does not go with execution.zero_stage: leave one of",
    "train.precision=fp16 execution.audit=true": r"^train.precision = fp16 goes neither with execution.audit nor with",
    "train.precision=fp16 deepspeed=zero2": r"^train.precision = fp16 goes neither with .* execution.zero_stage: take",
    "execution.num_workers=1025": r"^execution.num_workers = 1025: expected at most 1024$",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_each_mistake_is_answered_in_one_line(override: str):
    with pytest.raises(UserError, match=MISTAKES[override]) as caught:
        load_config(RunConfig, "run", override.split())
    assert "\n" not in str(caught.value)


def test_impossible_combinations_are_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        load_config(RunConfig, "run", ["train.precision=fp16", "execution.device=cpu"])


@pytest.mark.parametrize("group", ["model", "data", "train"])
def test_every_choice_of_every_group_makes_a_configuration(group: str):
    choices = {path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")} - {"music_v7"}  # which is for 44.1 kHz
    assert choices
    for choice in choices:
        config = load_config(RunConfig, "run", [f"{group}={choice}"])
        assert getattr(config, group) is not None


def test_a_micro_batch_carries_the_norm_batch_only_where_there_are_batch_norms():
    words = ["train=espnet", "execution.micro_batch=1"]
    for world_size in (1, 2, 4):  # norm_batch is 4
        config = load_config(RunConfig, "run", ["model=ses_xlarge", *words])
        assert config.micro_batches(world_size) == (1, 1)
    with pytest.raises(UserError, match="its batch norms span 4 processes and there are 1"):
        load_config(RunConfig, "run", ["model=xt", *words]).micro_batches(1)


def test_steps_come_from_the_budget_in_one_way():
    assert BudgetConfig(steps=7).resolve_steps(100, 8, 1.0, 1e9) == 7
    assert BudgetConfig(epochs=500).resolve_steps(10_802, 64, 2.0, 1e9) == 84_391  # 500 · 10802 / 64 = 84390.6
    assert BudgetConfig(audio_hours=1).resolve_steps(100, 8, 2.0, 1e9) == 225
    assert BudgetConfig(epochs=0.001).resolve_steps(10, 8, 1.0, 1e9) == 1
    assert BudgetConfig(train_pmacs=2e-3).resolve_steps(10, 8, 1.0, 1e9) == 250


@pytest.mark.parametrize("name", ["ü (1)", "it's", "a,b", "a=b", "日本", "a#b & c", "x[1]", "plain-1.2_3", "a b"])
def test_a_place_may_be_called_whatever_a_file_system_allows(name: str):
    config = load_config(RunConfig, "run", [f"study=studies/{name}", f"data.shards=/data/{name}", "+data.cache=null"])
    assert (config.study, config.data.shards, config.data.cache) == (f"studies/{name}", f"/data/{name}", None)


def test_a_home_folder_is_named_by_a_tilde_behind_any_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(RunConfig, "run", ["data.shards=~/VBD (16 k)"]).data.shards == "/home/me/VBD (16 k)"
