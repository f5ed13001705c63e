"""What a cluster is: where and how many runs execute at once, and what a site's scheduler needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.grid import SweepConfig

EXECUTORS = ("local", "slurm")


@dataclass
class ClusterConfig:
    """A place to run (conf/cluster). Fields from `partition` on are for SLURM."""

    executor: str
    max_parallel: int | None = None  # runs at once; local: null fills the machine, slurm: null is no limit
    # Compute time of training, on one core or one GPU, per second of audio that is trained on:
    seconds_per_layer: float | None = None  # a fixed part per block of the model, and
    seconds_per_gmac: float | None = None  # one per 10^9 multiply-accumulates of a forward pass; null: unknown
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 24 * 60
    cpus_per_task: int = 8
    gpus_per_node: int = 1
    mem_gb: int | None = None
    setup: list[str] = field(default_factory=list)  # shell lines before the run: modules, environments
    additional_parameters: dict[str, str] = field(default_factory=dict)  # further sbatch options: {reservation: x}

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UserError(f"cluster.executor = {self.executor}: expected one of {', '.join(EXECUTORS)}")
        if self.max_parallel is not None and self.max_parallel < 1:
            raise UserError(f"cluster.max_parallel = {self.max_parallel}: expected at least 1, or null")
        for name in ("timeout_min", "cpus_per_task"):
            if getattr(self, name) < 1:
                raise UserError(f"cluster.{name} = {getattr(self, name)}: expected at least 1")

    def training_hours(self, num_layers: int, macs_per_second: float, audio_seconds: float) -> float | None:
        """Estimated hours of training on one core or GPU; None if this cluster's speed is not known."""
        if self.seconds_per_layer is None or self.seconds_per_gmac is None:
            return None
        per_second = num_layers * self.seconds_per_layer + macs_per_second / 1e9 * self.seconds_per_gmac
        return per_second * audio_seconds / 3600


@dataclass
class StudyConfig(RunConfig):
    """A sweep over runs: conf/study.yaml. The fields of a run are what every cell starts from."""

    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig("local"))
    sweep: SweepConfig | None = None
    dry_run: bool = False  # print the table of runs and stop
    study: str = "studies/${sweep.name}-${data.name}"
