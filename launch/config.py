"""What a cluster is: where and how many runs execute at once, and what a site's scheduler needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from scaling.cli import to_object
from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.grid import SweepConfig

EXECUTORS = ("local", "slurm")
PER_SIZE = (
    "nodes",
    "processes_per_node",
    "gpus_per_node",
    "cpus_per_task",
    "mem_gb",
    "timeout_min",
    "partition",
    "account",
    "qos",
    "constraint",
    "additional_parameters",
)


# Options of sbatch by which a sweep knows and orders its jobs, and where else to say what they are for.
OWN_OPTIONS = {
    "array": "cluster.max_parallel bounds how many runs there are at once",
    "clusters": "type the sweep on a login node of that cluster, in a study of its own",
    "comment": "jobs are known by their comment",
    "dependency": "cluster.max_parallel orders the runs of a sweep",
    "open-mode": "all attempts of a run write one log",
    "output": "logs lie in STUDY/jobs",
    "signal": "cluster.signal_seconds says when",
}


@dataclass
class ClusterConfig:
    """A place to run (conf/cluster). Fields from `gpus_per_node` on are for SLURM: what the job of one run asks for."""

    executor: str
    max_parallel: int | None = None  # runs at once; local: null fills the machine, slurm: null is no limit
    # Compute time of training, on one core or one GPU, per second of audio that is trained on:
    seconds_per_layer: float | None = None  # a fixed part per block of the model, and
    seconds_per_gmac: float | None = None  # one per 10^9 multiply-accumulates of a forward pass; null: unknown
    throughput: str = "studies/throughput.jsonl"  # measured speeds, from preflights and finished runs
    nodes: int = 1
    processes_per_node: int | None = None  # null: one a GPU, or one
    gpus_per_node: int = 0
    cpus_per_task: int = 8  # cores of one process
    mem_gb: float | None = None  # of a node
    timeout_min: int = 24 * 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)  # what a model size asks for instead: {xl: {nodes: 2}}
    modules: list[str] = field(default_factory=list)  # to load before the run
    setup: list[str] = field(default_factory=list)  # shell lines before the run, after the modules
    container: str | None = None  # what stands before every python: "apptainer exec --nv image.sif"
    python: str | None = None  # the interpreter in the job; null: the one that submits
    srun_args: list[str] = field(default_factory=list)
    additional_parameters: dict[str, str] = field(default_factory=dict)  # further sbatch options: {reservation: x}
    signal_seconds: int = 120  # before the time limit: when the processes are told to save and stop
    max_fruitless_attempts: int = 3  # attempts without a new committed step, after which a run has failed

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UserError(f"cluster.executor = {self.executor}: expected one of {', '.join(EXECUTORS)}")
        for name in ("max_parallel", "processes_per_node"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"cluster.{name} = {getattr(self, name)}: expected at least 1, or null")
        for name in ("nodes", "timeout_min", "cpus_per_task", "signal_seconds", "max_fruitless_attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"cluster.{name} = {getattr(self, name)}: expected at least 1")
        if self.executor == "local" and self.nodes > 1:
            raise UserError(
                f"cluster.nodes = {self.nodes}: this machine is one node: take cluster=slurm, or several processes on "
                "it with cluster.processes_per_node"
            )
        if self.gpus_per_node < 0:
            raise UserError(f"cluster.gpus_per_node = {self.gpus_per_node}: expected at least 0")
        if self.mem_gb is not None and not self.mem_gb > 0:
            raise UserError(f"cluster.mem_gb = {self.mem_gb}: expected above 0, or null")
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise UserError(
                f"cluster.processes_per_node = {self.processes_per_node} with cluster.gpus_per_node = "
                f"{self.gpus_per_node}: a GPU takes one process: leave processes_per_node at null"
            )
        if self.executor == "slurm" and self.signal_seconds >= 60 * self.timeout_min:
            raise UserError(
                f"cluster.signal_seconds = {self.signal_seconds} is not shorter than cluster.timeout_min = "
                f"{self.timeout_min}: the processes would be told to stop before they start"
            )
        for name in set(self.additional_parameters) & set(OWN_OPTIONS):
            raise UserError(f"cluster.additional_parameters has {name}, which is not a site's: {OWN_OPTIONS[name]}")
        for size, settings in self.sizes.items():
            wrong = set(settings) - set(PER_SIZE) if isinstance(settings, dict) else {str(settings)}
            if wrong:
                raise UserError(
                    f"cluster.sizes.{size} has {', '.join(sorted(wrong))}: expected settings of "
                    f"{', '.join(PER_SIZE)}, as {{{size}: {{nodes: 2}}}}"
                )

    @property
    def tasks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def num_processes(self) -> int:
        """Of one run: its world size."""
        return self.nodes * self.tasks_per_node

    @property
    def num_devices(self) -> int:
        """What a run's cost is counted in: its GPUs, or its cores where it has none."""
        if self.executor != "slurm":
            return self.num_processes
        return self.num_processes if self.gpus_per_node else self.num_processes * self.cpus_per_task

    @staticmethod
    def key_of_run(size: str, axes: dict[str, Any]) -> str:
        """The same for runs whose jobs ask for the same."""
        return size + "".join(f" {axis}={value}" for axis, value in axes.items() if axis.startswith("cluster."))

    def for_run(self, size: str, axes: dict[str, Any]) -> ClusterConfig:
        """What the job of a run of this model size, at these coordinates of a sweep, asks for."""
        of_axes = {axis.removeprefix("cluster."): value for axis, value in axes.items() if axis.startswith("cluster.")}
        changed = self.sizes.get(size, {}) | of_axes
        return to_object(ClusterConfig, asdict(self) | {"sizes": {}} | changed) if changed else self

    def training_hours(self, num_layers: int, macs_per_second: float, audio_seconds: float) -> float | None:
        """Estimated hours of training on one core or GPU; None if this cluster's speed is not known."""
        if self.seconds_per_layer is None or self.seconds_per_gmac is None:
            return None
        per_second = num_layers * self.seconds_per_layer + macs_per_second / 1e9 * self.seconds_per_gmac
        return per_second * audio_seconds / 3600


@dataclass
class LaunchConfig:
    """What a sweep may do."""

    max_gpu_hours: float | None = None  # a sweep that would cost more is refused; of cores where there are no GPUs

    def __post_init__(self) -> None:
        if self.max_gpu_hours is not None and not self.max_gpu_hours > 0:
            raise UserError(f"launch.max_gpu_hours = {self.max_gpu_hours}: expected above 0, or null for no bound")


@dataclass
class StudyConfig(RunConfig):
    """A sweep over runs: conf/study.yaml. The fields of a run are what every cell starts from."""

    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig("local"))
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig | None = None
    dry_run: bool = False  # print the table of runs and stop
    study: str = "studies/${sweep.name}-${data.name}"
