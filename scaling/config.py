"""What can be set, as dataclasses: a run is a model size, data, a recipe and a seed, and how to execute it.

Scientific settings (model, data, train, seed) decide a run's result and make its identity;
execution settings (paths, micro-batch, workers, threads, compile, intervals) do not.
Hydra composes the YAML files of conf/ into these classes, which check themselves and each
other: a bad value or an impossible combination is refused by name before anything runs.
They are not frozen, because OmegaConf makes frozen dataclasses read-only while it composes.
Those of one part alone stand beside it: in `scaling.optimiser`, `scaling.early_stopping`, `bsrnn.losses`,
`scaling.corpus.demo`.

A scientific setting that came after the first runs were planned says so in its field's metadata, `since`: at its
default it is left out of a run's identity (`scaling.plan.science_of`), so that these keep theirs.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

from bsrnn import BSRNNConfig
from bsrnn.front_end import FRONT_ENDS
from bsrnn.losses import LossConfig
from scaling.corpus.demo import DemoConfig
from scaling.early_stopping import EarlyStoppingConfig
from scaling.errors import UserError, require_finite
from scaling.optimiser import OptimiserConfig
from scaling.remote import RemoteRoot, Root
from scaling.shards import SAMPLE_RATE

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
METRIC_NAMES = (
    "pesq_wb", "stoi", "estoi", "si_sdr", "segmental_snr", "csig", "cbak", "covl",
    "dnsmos_p808", "dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl",
)  # fmt: skip
DEFAULT_METRICS = METRIC_NAMES[:4]
MOST_CHANNELS, MOST_LAYERS = 4_096, 256  # a layer so wide is 256 times the compute of one of size l
MOST_THREADS = 1_024  # of a machine, which need not be this one


def require_metrics(setting: str, names: list[str]) -> None:
    """UserError for a name of no metric, or none at all."""
    for name in names:
        if name not in METRIC_NAMES:
            raise UserError(f"{setting}: {name} is not a metric; expected names among {', '.join(METRIC_NAMES)}")
    if not names:
        raise UserError(f"{setting} = []: expected at least one of {', '.join(METRIC_NAMES)}")


@dataclass
class ModelConfig:
    """A model size: its name, width and depth, and which variant of the network it is of (conf/model)."""

    name: str
    num_channels: int
    num_layers: int
    front_end: str = field(default="streaming_16khz", metadata={"since": "0.2"})  # STFT and bands, of bsrnn.front_end
    norm: str = field(default="batch", metadata={"since": "0.2"})  # batch, group or cumulative
    causal: bool = field(default=True, metadata={"since": "0.2"})  # whether the recurrence over time runs forward only

    def __post_init__(self) -> None:
        if self.front_end not in FRONT_ENDS:
            raise UserError(f"model.front_end = {self.front_end}: expected one of {', '.join(FRONT_ENDS)}")
        for name, most in (("num_channels", MOST_CHANNELS), ("num_layers", MOST_LAYERS)):
            if getattr(self, name) > most:
                raise UserError(f"model.{name} = {getattr(self, name)}: expected at most {most}")
        self.architecture(None, FRONT_ENDS[self.front_end].sample_rate)

    def architecture(self, norm_batch: int | None, sample_rate: int = SAMPLE_RATE) -> BSRNNConfig:
        """Of the network for audio of a rate, by default the shards'; UserError if there is none."""
        size = (self.num_channels, self.num_layers, self.front_end, self.norm, self.causal)
        try:
            return _architecture(*size, norm_batch, sample_rate)
        except ValueError as error:
            raise UserError(f"model {self.name}: {error}") from None


@lru_cache
def _architecture(
    num_channels: int,
    num_layers: int,
    front_end: str,
    norm: str,
    causal: bool,
    norm_batch: int | None,
    sample_rate: int,
) -> BSRNNConfig:
    """Every plan of a study asks for that of its size several times."""
    bands = vars(FRONT_ENDS[front_end])
    config = BSRNNConfig(num_channels, num_layers, **bands, norm_batch=norm_batch, norm=norm, causal=causal)
    return config.at_sample_rate(sample_rate)


@dataclass
class DataConfig:
    """A corpus and how much of it to train on (conf/data)."""

    name: str  # "demo" is synthesised on first use; any other is read from root in VBD's layout
    shards: str  # folder of the prepared shards, or the URL of one
    root: str | None = None  # folder of the corpus in VBD's layout, needed only to prepare the shards
    hours: float | None = None  # audio to train on, in hours; null: all there is
    # Train on the speakers held out for validation too, as some published systems did; validation then says little.
    train_on_validation: bool = field(default=False, metadata={"since": "0.2"})
    order_seed: int = 0  # of the order whose prefixes are the budgets of hours; the same for all runs of a study
    samples: list[str] | None = None  # test utterances to listen to on TensorBoard; null: four spread over the test set
    demo: DemoConfig | None = None  # what to synthesise where the corpus is the demo
    # shards mixed at a time by the order of clips; null mixes all
    block_shards: int | None = field(default=None, metadata={"since": "0.2"})
    cache: str | None = None  # folder of this machine for shards behind a URL; null: below the temporary folder
    cache_gb: float = 50.0  # at most so many 10^9 bytes of them
    max_damaged_share: float = 0.01  # of the training clips; with more of them damaged the run stops

    def __post_init__(self) -> None:
        require_finite("data", self)
        if self.block_shards is not None and self.block_shards < 1:
            raise UserError(f"data.block_shards = {self.block_shards}: expected at least 1, or null to mix all shards")
        if not self.cache_gb > 0:
            raise UserError(f"data.cache_gb = {self.cache_gb}: expected above 0")
        if not 0 <= self.max_damaged_share < 1:
            raise UserError(f"data.max_damaged_share = {self.max_damaged_share}: expected 0 (none) to below 1")
        if self.order_seed < 0:
            raise UserError(f"data.order_seed = {self.order_seed}: expected a whole number of at least 0")
        if self.hours is not None and not self.hours > 0:
            raise UserError(f"data.hours = {self.hours}: expected a number of hours above 0, or null for all there is")
        if self.name == "demo" and (self.demo is None or self.root is None):
            raise UserError("data.name = demo needs data.root and data.demo: take data=demo")

    @property
    def shard_root(self) -> Root:
        """Where the shards are: a folder, or what is behind a URL."""
        if "://" not in self.shards:
            return Path(self.shards)
        cache = self.cache or Path(tempfile.gettempdir()) / f"bsrnn-scaling-shards-{os.getuid()}"
        return RemoteRoot(self.shards.rstrip("/"), Path(cache).absolute(), round(self.cache_gb * 1e9))


@dataclass
class BudgetConfig:
    """How long to train: exactly one of these, resolved to steps in one way for all runs."""

    steps: int | None = None  # optimiser steps
    epochs: float | None = None  # passes over the training clips, one crop of each
    audio_hours: float | None = None  # hours of crops seen
    train_pmacs: float | None = None  # compute of the whole training, in 10^15 multiply-accumulates

    def __post_init__(self) -> None:
        require_finite("train.budget", self)
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            said = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
            raise UserError(
                f"train.budget has {said}: expected exactly one of {', '.join(vars(self))}; set the others to null"
            )
        for name, value in given.items():
            if not value > 0:
                raise UserError(f"train.budget.{name} = {value}: expected above 0")

    def resolve_steps(self, num_clips: int, global_batch: int, crop_seconds: float, train_macs: float) -> int:
        """Optimiser steps, at least 1; batches run across the ends of epochs.

        train_macs: multiply-accumulates of training on a second of audio
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            crops = self.epochs * num_clips
        elif self.train_pmacs is not None:
            crops = self.train_pmacs * 1e15 / train_macs / crop_seconds
        else:
            assert self.audio_hours is not None
            crops = self.audio_hours * 3600 / crop_seconds
        return max(1, round(crops / global_batch))


@dataclass
class TrainConfig:
    """The recipe, the same for every cell of a study unless it is an axis (conf/train)."""

    budget: BudgetConfig
    global_batch: int  # crops behind one optimiser step
    norm_batch: int  # crops behind one batch-norm statistic
    crop_seconds: float
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    precision: str = "fp32"  # of the network's matrix products: fp32, bf16 or fp16
    test: bool = False  # quick check of everything: 10 steps, a validation, the metrics
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        require_finite("train", self)
        for name in ("global_batch", "norm_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} = {getattr(self, name)}: expected at least 1 crop")
        if self.global_batch % self.norm_batch:
            raise UserError(
                f"train.global_batch = {self.global_batch} is not a multiple of train.norm_batch = {self.norm_batch}: "
                "set norm_batch to a divisor of global_batch"
            )
        if not 0.1 <= self.crop_seconds <= 60:
            raise UserError(f"train.crop_seconds = {self.crop_seconds}: expected 0.1 to 60 seconds")
        if self.precision not in PRECISIONS:
            raise UserError(f"train.precision = {self.precision}: expected one of {', '.join(PRECISIONS)}")


@dataclass
class ExecutionConfig:
    """How a run is executed; nothing here changes its result beyond rounding."""

    micro_batch: int | None = None  # crops in a process's memory at once; null: its share of the global batch
    device: str = "auto"  # auto takes a GPU where there is one
    threads: int | None = None  # CPU threads of the run; null: all cores (a sweep shares them out)
    num_workers: int = 0  # processes that read crops; 0 reads in the training process
    compile: bool = False  # torch.compile
    log_every: int = 5  # steps between rows of training metrics
    checkpoint_every: int = 50  # steps between checkpoints
    num_validations: int = 4  # evenly spaced, the last at the end
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))  # of the evaluation
    samples_every: int | None = 1  # validations between enhanced utterances on TensorBoard; null: none
    scoring_processes: int | None = None  # of the evaluation's metrics; null: as many as threads
    zero_stage: int | None = None  # of DeepSpeed's ZeRO, 0 to 3 (conf/deepspeed); null: without DeepSpeed
    audit: bool = False  # sums in a fixed order: bit for bit the same for any number of processes, slower
    rendezvous_timeout: float = 300.0  # seconds within which all processes of the run must have come
    silence_timeout: float = 60.0  # seconds without a sign of life after which a process counts as lost
    step_timeout: float = (
        1800.0  # seconds that the reading of a batch, or what a process does between collectives, may take
    )

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "num_validations"):
            if getattr(self, name) < 1:
                raise UserError(f"execution.{name} = {getattr(self, name)}: expected at least 1")
        for name in ("micro_batch", "threads", "scoring_processes", "samples_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"execution.{name} = {getattr(self, name)}: expected at least 1, or null")
        for name in ("threads", "num_workers", "scoring_processes"):
            if (getattr(self, name) or 0) > MOST_THREADS:
                raise UserError(f"execution.{name} = {getattr(self, name)}: expected at most {MOST_THREADS}")
        require_metrics("execution.metrics", self.metrics)
        if self.num_workers < 0:
            raise UserError(f"execution.num_workers = {self.num_workers}: expected at least 0")
        if self.device not in DEVICES:
            raise UserError(f"execution.device = {self.device}: expected one of {', '.join(DEVICES)}")
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise UserError(
                f"execution.zero_stage = {self.zero_stage}: expected 0, 1, 2 or 3, or null for no DeepSpeed"
            )
        if self.zero_stage is not None and self.audit:
            raise UserError("execution.audit does not go with execution.zero_stage: leave one of them out")
        for name, is_on in (("execution.audit", self.audit), ("execution.zero_stage", self.zero_stage is not None)):
            if self.compile and is_on:
                raise UserError(f"execution.compile does not go with {name}: leave one of them out")
        for name in ("rendezvous_timeout", "silence_timeout", "step_timeout"):
            if not 5 <= getattr(self, name) < math.inf:
                raise UserError(f"execution.{name} = {getattr(self, name)}: expected at least 5 seconds")


@dataclass
class RunConfig:
    """One run: conf/run.yaml."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    seed: int = 0
    study: str = "studies/single"  # the study's folder

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed}: expected a whole number from 0 to 2^63 - 1")
        self.model.architecture(self.train.norm_batch)  # there is one for the shards' sample rate
        if self.execution.micro_batch is not None:
            self.micro_batches(world_size=1, norms_may_span=True)
        if self.execution.device == "cpu" and self.train.precision == "fp16":
            raise UserError("train.precision = fp16 needs a GPU: take bf16 or fp32 with execution.device=cpu")
        if self.train.precision == "fp16" and (self.execution.audit or self.execution.zero_stage is not None):
            raise UserError(
                "train.precision = fp16 goes neither with execution.audit nor with execution.zero_stage: take bf16"
            )
        if self.train.optimiser.name == "adamp" and self.execution.zero_stage:
            raise UserError(
                f"train.optimiser.name = adamp does not go with execution.zero_stage = {self.execution.zero_stage}, "
                "which lays all weights in one row, where AdamP needs their shapes: take deepspeed=none, or adamw"
            )

    @staticmethod
    def part_of(config: RunConfig) -> RunConfig:
        """The run of a configuration that holds more: a sweep's, or a command's."""
        return RunConfig(**{field.name: getattr(config, field.name) for field in fields(RunConfig)})

    def micro_batches(self, world_size: int, norms_may_span: bool = False) -> tuple[int, int]:
        """Crops of a micro-batch, and over how many processes side by side a norm batch spans.

        norms_may_span: whether the number of processes is open, as it is before a run starts

        UserError if the global batch cannot be shared out so.
        """
        global_batch = self.train.global_batch
        norm_batch = self.train.norm_batch if self.model.norm == "batch" else 1  # other norms are of one crop each
        micro_batch = self.execution.micro_batch
        if micro_batch is None and global_batch % world_size:
            raise UserError(
                f"train.global_batch = {global_batch} cannot be shared out to {world_size} processes: take a number of "
                "processes that divides it"
            )
        micro_batch = micro_batch or global_batch // world_size
        if global_batch % micro_batch or (micro_batch % norm_batch and norm_batch % micro_batch):
            raise UserError(
                f"execution.micro_batch = {micro_batch}: expected a divisor of train.global_batch = {global_batch} "
                f"that is a multiple or a divisor of train.norm_batch = {norm_batch}"
            )
        span = max(1, norm_batch // micro_batch)
        if span > 1 and self.execution.audit:
            raise UserError(
                f"execution.audit needs whole norm batches in a process: a micro-batch has {micro_batch} crops and "
                f"train.norm_batch = {norm_batch}; raise execution.micro_batch, or take fewer processes"
            )
        if norms_may_span:
            return micro_batch, span
        if (global_batch // micro_batch) % world_size:
            raise UserError(
                f"{global_batch // micro_batch} micro-batches of {micro_batch} crops cannot be shared out to "
                f"{world_size} processes: lower execution.micro_batch, or take a number of processes that divides them"
            )
        if world_size % span:
            raise UserError(
                f"execution.micro_batch = {micro_batch} is below train.norm_batch = {norm_batch}: its batch norms span "
                f"{span} processes and there are {world_size}; take a multiple of {span}, or a larger micro-batch"
            )
        return micro_batch, span

    @property
    def shard_root(self) -> Root:
        return self.data.shard_root
