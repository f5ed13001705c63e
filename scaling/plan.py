"""From a run's configuration to its plan: identity, counts and steps, before anything runs.

The identity of a run is its science, the resolved scientific settings, compared by their SHA-256; its id
is a readable name and the first digits of that. The same science is the same run, wherever and however
it is executed; a changed setting is a new run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.counting import count_macs, count_parameters
from scaling.budget import select_hours
from scaling.cli import to_object
from scaling.config import DataConfig, RunConfig
from scaling.errors import UserError
from scaling.grid import flat_settings
from scaling.optimiser import parameter_groups
from scaling.provenance import provenance
from scaling.records import Record, RecordError, RunDirectory, StudyDirectory, to_json, write_whole
from scaling.shards import Clip, ShardIndex

# Multiply-accumulates of a training step over those of a forward pass: forward, gradient of
# the activations, gradient of the weights (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
TRAINING_PASSES = 3
TEST_STEPS = 10
NUM_SAMPLES = 4  # to listen to, where the corpus names none
HASH_DIGITS = 8  # of a run's id: among 10,000 runs of one name, two would share them in one study of a hundred


def science_of(settings: Any) -> Any:
    """A tree of settings as plain data, without those that came later (`since`) and stand at their default.

    So a run planned before a setting existed keeps its identity.
    """
    if settings is None or isinstance(settings, str | int | float):
        return settings
    if isinstance(settings, list | tuple):
        return [science_of(entry) for entry in settings]
    kind: type = type(settings)
    if not is_dataclass(kind):
        return settings
    values, later = vars(settings), _later_settings(kind)
    return {name: science_of(value) for name, value in values.items() if name not in later or value != later[name]}


@lru_cache
def _later_settings(kind: type) -> dict[str, Any]:
    """The settings of a dataclass that came later, with their defaults."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
        if "since" in field.metadata
    }


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that is known before it starts."""

    config: RunConfig
    axes: dict[str, Any]  # the sweep's coordinates of this run; empty outside a sweep
    index_hash: str
    hours: float  # of audio the budget's clips hold
    num_clips: int
    steps: int
    estimated_hours: float | None = None  # of the whole job's time, from the cluster's throughput
    label: str = ""  # of the name: how the run is executed, in a sweep that compares that
    folder: str | None = None  # where the run lies, if not in its study under its id

    @property
    def name(self) -> str:
        config = self.config
        hours = f"-{config.data.hours:g}h" if config.data.hours is not None else ""
        return f"{'test-' if config.train.test else ''}{config.model.name}{hours}-seed{config.seed}{self.label}"

    @cached_property
    def science_digest(self) -> str:
        """The same for runs of the same science, and for no others."""
        return hashlib.sha256(json.dumps(self.science, sort_keys=True).encode()).hexdigest()

    @property
    def science_hash(self) -> str:
        """What of it the run's id shows."""
        return self.science_digest[:HASH_DIGITS]

    @cached_property
    def run_id(self) -> str:
        return f"{self.name}-{self.science_hash}"

    @property
    def science(self) -> Record:
        """The resolved scientific settings, which are the run's identity."""
        config = self.config
        model = science_of(config.model)
        train = science_of(config.train)
        data = science_of(config.data)
        names = ("hours", "order_seed", "train_on_validation", "block_shards")
        of_data = {name: data[name] for name in names if name in data}
        del model["name"], train["budget"]  # a label; resolved into steps
        return {
            "model": model,
            "data": {"index_hash": self.index_hash, **of_data},
            "train": train,
            "steps": self.steps,
            "seed": config.seed,
        }

    @property
    def audio_seconds_seen(self) -> float:
        return self.steps * self.config.train.global_batch * self.config.train.crop_seconds

    @property
    def macs_per_second(self) -> float:
        """Multiply-accumulates of a forward pass over a second of audio."""
        return count_macs(self.config.model.architecture(None)).total

    @property
    def train_macs(self) -> float:
        """Multiply-accumulates of the whole training."""
        return TRAINING_PASSES * self.macs_per_second * self.audio_seconds_seen

    @property
    def directory(self) -> RunDirectory:
        if self.folder is not None:
            return RunDirectory(Path(self.folder))
        return StudyDirectory(Path(self.config.study)).run(self.run_id)

    def to_record(self) -> Record:
        """The plan as a row of plan.jsonl."""
        architecture = self.config.model.architecture(None)
        parameters = count_parameters(architecture)
        return {
            "run_id": self.run_id,
            "name": self.name,
            "axes": self.axes,
            "label": self.label,
            "seed": self.config.seed,
            "size": {
                "name": self.config.model.name,
                "num_params": parameters.total,
                "num_params_folded": parameters.folded,
                "num_params_non_decoder": parameters.non_decoder,
                "macs_per_second": self.macs_per_second,
            },
            "data": {
                "name": self.config.data.name,
                "hours": self.hours,
                "num_clips": self.num_clips,
                "index_hash": self.index_hash,
            },
            "steps": self.steps,
            "global_batch": self.config.train.global_batch,
            "crop_seconds": self.config.train.crop_seconds,
            "audio_hours_seen": self.audio_seconds_seen / 3600,
            "train_macs": self.train_macs,
            "estimated_hours": self.estimated_hours,
            "science": self.science,
            "config": _as_plain(self.config),
        }

    @property
    def is_all_warmup(self) -> bool:
        """Whether the learning rate still rises at the end, which compares with no other run."""
        return self.config.train.optimiser.warmup_steps >= self.steps and not self.config.train.test

    def check_steps(self) -> None:
        """UserError if the warm-up is as long as the whole run."""
        if self.is_all_warmup:
            raise UserError(
                f"train.optimiser.warmup_steps = {self.config.train.optimiser.warmup_steps} is as long as the whole "
                f"run of {self.steps} steps of model {self.config.model.name}: lower it, or raise train.budget"
            )

    def check_index(self, index: ShardIndex) -> None:
        """UserError if the shards are not the ones the run was planned on."""
        if index.index_hash != self.index_hash:
            raise UserError(
                f"run {self.run_id} was planned on shards with index hash {self.index_hash[:12]}; {index.root} now has "
                f"{index.index_hash[:12]}: put the planned shards back, or plan again by running the sweep again"
            )

    def check_folder(self) -> None:
        """UserError if the run's folder holds a run of other science."""
        if not self.directory.plan.exists():
            return
        there = read_planned(self.directory)
        if there.science_digest == self.science_digest:
            return
        theirs, ours = flat_settings(there.science), flat_settings(self.science)
        different = [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
        shown = ", ".join(f"{name} = {theirs.get(name)} there and {ours.get(name)} here" for name in different[:3])
        raise UserError(
            f"{self.directory.path} holds another run ({shown}{', ...' if len(different) > 3 else ''}): "
            "name another folder with run=DIR, or replace what is there with force=true"
        )

    def write(self) -> RunDirectory:
        """Make the run's directory with its plan and provenance, unless it is there already."""
        directory = self.directory
        if not directory.plan.exists():
            write_whole(directory.plan, to_json(self.to_record() | {"provenance": provenance()}) + "\n")
        return directory


def _as_plain(value: Any) -> Any:
    """A dataclass as a dictionary, as `dataclasses.asdict` but without copying every leaf: plans come in thousands."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_plain(entry) for entry in value]
    entries = value if isinstance(value, dict) else vars(value)
    return {name: _as_plain(entry) for name, entry in entries.items()}


def require_writable(folder: Path, remedy: str) -> None:
    """Make a folder; UserError, with the remedy, if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {remedy}") from None


def sample_clips(data: DataConfig, index: ShardIndex) -> list[Clip]:
    """The test clips to listen to, which `data.samples` names; without names, a few spread over the test set.

    UserError for a name that the test set lacks.
    """
    clips = {clip.id: clip for clip in sorted(index.clips("test"), key=lambda clip: clip.id)}
    if data.samples is None:
        spread = list(clips.values())
        return spread[:: max(1, len(spread) // NUM_SAMPLES)][:NUM_SAMPLES]
    for name in data.samples:
        if name not in clips:
            raise UserError(
                f"data.samples: {name} is not a test utterance of {index.root}; expected names like "
                f"{', '.join(list(clips)[:2])}, or null for any {NUM_SAMPLES}"
            )
    return [clips[name] for name in data.samples]


@dataclass(frozen=True)
class DataBudget:
    """What a run trains on: the same for all runs with the same hours of the same shards."""

    hours: float
    num_clips: int

    @classmethod
    def of(cls, config: RunConfig, index: ShardIndex) -> DataBudget:
        """UserError if the shards hold less, or lack an utterance that is to be listened to."""
        if config.execution.samples_every is not None:
            sample_clips(config.data, index)
        clips = training_clips(config, index)
        return cls(sum(clip.duration for clip in clips) / 3600, len(clips))


@lru_cache
def _model_without_weights(config: BSRNNConfig) -> BSRNN:
    with torch.device("meta"):
        return BSRNN(config)


def plan_run(
    config: RunConfig, index: ShardIndex, axes: dict[str, Any] | None = None, budget: DataBudget | None = None
) -> RunPlan:
    """Resolve a configuration against the prepared data; UserError if the hours of data are not there.

    UserError too for a group of the optimiser that would be empty.

    budget: the data's, if it is known from another run
    """
    budget = budget or DataBudget.of(config, index)
    if config.train.optimiser.groups:
        parameter_groups(config.train.optimiser, _model_without_weights(config.model.architecture(None)))
    if config.train.test:
        steps = TEST_STEPS
    else:
        train = config.train
        train_macs = TRAINING_PASSES * count_macs(config.model.architecture(None)).total
        steps = train.budget.resolve_steps(budget.num_clips, train.global_batch, train.crop_seconds, train_macs)
    # Absolute, so that the plan holds wherever it is executed or read from.
    data = replace(config.data, shards=_absolute(str(index.root)) if isinstance(index.root, Path) else str(index.root))
    return RunPlan(
        config=replace(config, data=data, study=_absolute(config.study)),
        axes=axes or {},
        index_hash=index.index_hash,
        hours=budget.hours,
        num_clips=budget.num_clips,
        steps=steps,
    )


def _absolute(path: str) -> str:
    return _resolved(os.path.join(os.getcwd(), path))


@lru_cache
def _resolved(path: str) -> str:
    """Looking up every part of the same path would be a tenth of the time of planning thousands of runs."""
    return str(Path(path).resolve())


def training_clips(config: RunConfig, index: ShardIndex) -> list[Clip]:
    clips = index.clips("train")
    if config.data.train_on_validation:
        clips = [*clips, *index.clips("validation")]
    return select_hours(clips, config.data.hours, config.data.order_seed)


def read_planned(directory: RunDirectory) -> RunPlan:
    """The plan of a run directory, its configuration rebuilt; RecordError if there is none."""
    try:
        # the directory may have been moved since
        plan = from_record(directory.read_plan(), directory.path.parent.parent)
        return plan if plan.directory == directory else replace(plan, folder=str(directory.path))
    except (KeyError, TypeError, UserError) as error:
        raise RecordError(
            f"{directory.plan} was written by another version of this project ({error}): "
            "check that version out, or delete the run's folder and run it again"
        ) from None


def from_record(record: Record, study: Path) -> RunPlan:
    """The plan of a row of plan.jsonl; KeyError, TypeError or UserError if another version wrote it."""
    return RunPlan(
        config=replace(to_object(RunConfig, record["config"]), study=str(study)),
        axes=record["axes"],
        index_hash=record["data"]["index_hash"],
        hours=record["data"]["hours"],
        num_clips=record["data"]["num_clips"],
        steps=record["steps"],
        estimated_hours=record["estimated_hours"],
        label=record["label"],
    )
