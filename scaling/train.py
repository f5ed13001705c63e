"""One run, here.

    python -m scaling.train model=xxt                     train and score it
    python -m scaling.train model=xxt train.test=true     everything once, quickly
    python -m scaling.train model=xxt run=DIR             in a folder of your own
    python -m scaling.train run=DIR                       go on, with the settings that the folder holds
    accelerate launch -m scaling.train model=xxt          the same, in one process

The same command again goes on from the last checkpoint; a finished run is not trained again. A folder that holds a
run with other scientific settings is refused; force=true deletes that run and starts anew.
Settings: docs/configuration.md. Beside run=DIR alone may stand execution.*, data.shards, data.cache, data.cache_gb,
data.max_damaged_share and force.

Exit status: 0 finished; 1 it diverged, or met an error of the code; 2 a mistake in the input, or data or a disk of no
use; 75 a signal (SIGTERM, SIGUSR1, SIGUSR2, SIGHUP) asked it to stop and it has saved: run it again to go on;
76 another process of the run is lost; 130 interrupted, without saving.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from scaling.cli import compose_config, get_value, to_object, with_values
from scaling.command import run_main
from scaling.config import RunConfig
from scaling.device import warn_of_idle_gpu
from scaling.plan import RunPlan, plan_run, read_planned, require_writable
from scaling.prepare import open_shards
from scaling.records import RunDirectory
from scaling.run import execute

# Of a run's data: where it lies, and how much damage to it is borne.
MAY_CHANGE = ("data.shards", "data.cache", "data.cache_gb", "data.max_damaged_share")


@dataclass
class TrainCommandConfig(RunConfig):
    """A run and where it goes."""

    run: str | None = None  # its folder; null: in the study, named by its settings
    force: bool = False  # start anew where the folder holds a run of other science, or no checkpoint that is whole


def main(words: list[str]) -> int:
    composed = compose_config(TrainCommandConfig, "run", words)
    folder, force = (get_value(composed, key, TrainCommandConfig) for key in ("run", "force"))
    plan = _plan(words, composed, Path(folder).resolve() if folder is not None else None)
    require_writable(plan.directory.path, f"name another folder with {'run' if folder else 'study'}=DIR")
    if os.environ.get("RANK", "0") == "0":
        warn_of_idle_gpu(plan.config.execution.device)
    print(f"run {plan.run_id}: {plan.steps} steps, in {plan.directory.path}", flush=True)
    return execute(plan, force=force)


def _plan(words: Sequence[str], composed: DictConfig, folder: Path | None) -> RunPlan:
    """The run of a command: the one that its folder holds, where the words set nothing that makes it another run."""
    if folder is not None and all(_key(word) in ("run", "force") or _may_change(word) for word in words):
        return _planned(folder, [_key(word) for word in words if _may_change(word)], composed)
    config = to_object(TrainCommandConfig, composed)
    plan = plan_run(RunConfig.part_of(config), open_shards(config.data))
    plan.check_steps()
    return plan if folder is None else replace(plan, folder=str(folder))


def _planned(folder: Path, keys: Sequence[str], composed: DictConfig) -> RunPlan:
    """The run that a folder holds, as planned but for the settings of these keys, which are as composed.

    Checked is that run alone: what else is composed are the defaults, which need not go with these settings.
    """
    plan = read_planned(RunDirectory(folder))
    values = {key: get_value(composed, key, TrainCommandConfig) for key in keys}
    stored = OmegaConf.create(asdict(plan.config))
    return replace(plan, config=to_object(RunConfig, with_values(stored, values, RunConfig)))


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _may_change(word: str) -> bool:
    """Whether a setting leaves a run the same run: how it is executed, and what concerns no sample of its data."""
    return _key(word).startswith("execution.") or _key(word) in MAY_CHANGE


if __name__ == "__main__":
    run_main(main, __doc__ or "")
