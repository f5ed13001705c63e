"""What a sweep costs, before anything is queued.

From measured speeds of the same model and recipe on the same shape of job (launch.throughput: preflights
and earlier runs); where there is none, from the cluster's two figures of compute time. Those of this machine
are of its CPU: of a run that takes GPUs here nothing is known until one of its kind has been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from launch.config import ClusterConfig
from launch.slurm import shape_record
from launch.throughput import Throughput, local_shape
from scaling.errors import UserError
from scaling.gpus import model_of, visible_gpus
from scaling.plan import RunPlan
from scaling.records import Record


class Costs:
    """Of runs on a cluster."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.measured = Throughput(Path(cluster.throughput))
        # by model size and axes of the cluster, and whether the run takes GPUs of this machine
        self.shapes: dict[tuple[str, bool], tuple[ClusterConfig, Record | None]] = {}
        self.speeds: dict[tuple[int, ...], tuple[float | None, object]] = {}  # by the parts they are of, and these

    def shape(self, plan: RunPlan) -> ClusterConfig:
        return self._shape(plan)[0]

    def training_hours(self, plan: RunPlan) -> float | None:
        """Hours of training from start to end; None if nothing is known of this model on this cluster.

        UserError if the run's batch cannot be shared out to the processes of its job.
        """
        config, (shape, record) = plan.config, self._shape(plan)
        config.micro_batches(shape.num_processes)
        if record is not None and (speed := self._speed(plan, record)):
            return plan.audio_seconds_seen / speed / 3600
        if self._takes_gpus_here(plan):
            return None
        alone = shape.training_hours(config.model.num_layers, plan.macs_per_second, plan.audio_seconds_seen)
        return None if alone is None else alone / shape.num_processes

    def filed_as(self, plan: RunPlan) -> Record | None:
        """The shape of job by which the run's speed is filed; None where none is: on this machine's CPU."""
        return self._shape(plan)[1]

    def device_hours(self, plan: RunPlan) -> float | None:
        """Hours of GPUs that the run takes, or of cores where there are none."""
        shape = self.shape(plan)
        return None if plan.estimated_hours is None else plan.estimated_hours * shape.num_devices

    def in_words(self, plans: Sequence[RunPlan]) -> str:
        hours = [self.device_hours(plan) for plan in plans]
        known = sum(each for each in hours if each is not None)
        if None not in hours:
            return f"about {in_hours(known)} of training in all, on one {self._device}"
        unknown = sorted({plan.config.model.name for plan, each in zip(plans, hours, strict=True) if each is None})
        remedy = "set, as measured, cluster.seconds_per_layer and cluster.seconds_per_gmac"
        if self.cluster.executor == "slurm":
            remedy = f"measure them with python -m launch.preflight, or {remedy.replace(', as measured,', '')}"
        elif any(self._takes_gpus_here(plan) for plan, each in zip(plans, hours, strict=True) if each is None):
            remedy = "measure them with python -m launch.preflight"
        return f"time of {', '.join(unknown)} unknown: {remedy}"

    def require_within(self, plans: Sequence[RunPlan], max_hours: float | None) -> None:
        """UserError if runs cost more than they may, or if what they cost is not known."""
        if max_hours is None:
            return
        hours = [self.device_hours(plan) for plan in plans]
        if None in hours:
            raise UserError(f"launch.max_gpu_hours = {max_hours:g}, and {self.in_words(plans)}")
        total = sum(each or 0.0 for each in hours)
        if total > max_hours:
            raise UserError(
                f"the {len(plans)} runs to submit would take about {total:.3g} {self._device}-hours, above "
                f"launch.max_gpu_hours = {max_hours:g}: take fewer or smaller cells, or raise it"
            )

    @property
    def _device(self) -> str:
        return "GPU" if self.cluster.gpus_per_node else "core" if self.cluster.executor == "slurm" else "core or GPU"

    def _speed(self, plan: RunPlan, shape: Record) -> float | None:
        """Measured audio-seconds per second, looked up once for cells that share the parts which decide it."""
        parts = (plan.config.model, plan.config.train, plan.config.execution, shape)
        key = tuple(map(id, parts))
        if key not in self.speeds:  # kept with the parts, so that no others get their ids
            self.speeds[key] = self.measured.speed(plan.science, vars(plan.config.execution), shape), parts
        return self.speeds[key][0]

    @cached_property
    def _gpus_here(self) -> list[str]:
        return visible_gpus() if self.cluster.executor == "local" else []

    @cached_property
    def _model_here(self) -> str | None:
        return model_of(self._gpus_here)

    def _takes_gpus_here(self, plan: RunPlan) -> bool:
        return plan.config.execution.device != "cpu" and bool(self._gpus_here)

    def _shape(self, plan: RunPlan) -> tuple[ClusterConfig, Record | None]:
        key = self.cluster.key_of_run(plan.config.model.name, plan.axes), self._takes_gpus_here(plan)
        if key not in self.shapes:
            shape, record = self.cluster.for_run(plan.config.model.name, plan.axes), None
            if self.cluster.executor == "slurm":
                record = shape_record(shape)
            elif key[1] and self._model_here is not None:
                record = local_shape(shape.num_processes, self._model_here)
            self.shapes[key] = (shape, record)
        return self.shapes[key]


def in_hours(hours: float) -> str:
    return f"{hours * 60:.2g} min" if hours < 1 else f"{hours:.3g} h"
