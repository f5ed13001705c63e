"""Training one run: from the committed step to the last, by its plan.

What a step does depends on the plan and the step's number alone, so a run that was killed
gives the same losses and weights as one that was not, bit for bit on CPU. How a step is computed,
on one process or many, is the engine's (`scaling.engines`).
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bsrnn import BSRNN
from bsrnn.losses import enhancement_loss, unprocessed
from bsrnn.model import Enhanced
from scaling.board import SampleBoard
from scaling.checkpoint import Checkpoint, save_checkpoint, take_up
from scaling.config import RunConfig
from scaling.early_stopping import EarlyStopping
from scaling.engines import make_engine
from scaling.engines.base import Step
from scaling.errors import UserError
from scaling.liveness import Deadline
from scaling.metrics import RefusedError, si_sdr
from scaling.optimiser import learning_rate
from scaling.plan import RunPlan, training_clips
from scaling.processes import Processes
from scaling.progress import ProgressDisplay
from scaling.quarantine import Quarantine
from scaling.records import RunDirectory, sync
from scaling.shard_reader import ShardReader
from scaling.shards import SAMPLE_RATE, Clip, ShardIndex
from scaling.stopping import StopFlag, StoppedError
from scaling.stream import CropDataset, MicroBatchSampler, to_float, training_loader

log = logging.getLogger(__name__)


STOPPING = "stopping for a signal"  # the phase of a rank that breaks off a validation, by which the others know


class DivergedError(Exception):
    """The loss is not finite any more: a result of the run's science, not a defect of its execution."""


def planned_validations(config: RunConfig, num_steps: int) -> set[int]:
    """The committed steps after which to validate; the last one always."""
    interval = config.train.early_stopping.interval
    if interval is not None and not config.train.test:
        return {*range(interval, num_steps, interval), num_steps}
    return validation_steps(num_steps, 1 if config.train.test else config.execution.num_validations)


def validation_steps(num_steps: int, num_validations: int) -> set[int]:
    """The committed steps after which to validate: evenly spaced, the last one always."""
    return {max(1, round(num_steps * count / num_validations)) for count in range(1, num_validations + 1)}


class Pace:
    """How long a step of training takes, without what lies between steps: validations and saves."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._num_steps = time.perf_counter(), 0

    def count_step(self) -> None:
        self._num_steps += 1

    def lap(self) -> float:
        """Seconds a step, a mean over those that were counted; counting begins anew."""
        now = time.perf_counter()
        seconds = (now - self._since) / self._num_steps
        self._since, self._num_steps = now, 0
        return seconds


class Trainer:
    """Model, optimiser and stream of a run, at its committed step; the same object on every rank."""

    def __init__(
        self, plan: RunPlan, directory: RunDirectory, index: ShardIndex, processes: Processes, stop: StopFlag
    ) -> None:
        config = plan.config
        plan.check_index(index)
        self.plan, self.directory, self.index, self.config = plan, directory, index, config
        self.processes, self.stop = processes, stop
        self.engine = make_engine(config, processes)
        self.validate_at = planned_validations(config, plan.steps)
        patience = config.train.early_stopping.patience
        self.early_stopping = EarlyStopping(patience) if patience is not None else None
        self._unprocessed: dict[str, dict[str, float]] = {}  # of this rank's validation clips: the same every time
        self.validation_is_due = False  # after the committed step, as a signal broke it off
        self._reading: Callable[[], AbstractContextManager[None]] = nullcontext  # bounded in time while `fit` lasts
        self.step = self._restore()
        clips = training_clips(config, index)
        self.quarantine = Quarantine(directory, index, clips, config.data.max_damaged_share, processes.rank)
        self.dataset = CropDataset(
            index.root,
            clips,
            round(config.train.crop_seconds * SAMPLE_RATE),
            config.seed,
            config.data.block_shards,
        )

    def fit(self) -> BSRNN:
        """Train to the plan's last step and return the trained model.

        DivergedError if a loss or gradient stops being finite; StoppedError once a signal has asked
        any rank to stop and all have saved; UserError for a full disk or damaged data;
        LostRankError if a process of the run is dead or frozen.
        """
        config, plan = self.config, self.plan
        deadline = Deadline(config.execution.step_timeout, self._end_for_hung_reading)
        self._reading = deadline.running
        with (
            closing(deadline),
            closing(self._batches()) as batches,
            self._board() as board,
            ProgressDisplay(plan.name, plan.steps, self.step, shown=self.processes.is_first) as progress,
            self.stop.deferred(),
        ):
            samples = SampleBoard(board, config.data, self.index) if board and config.execution.samples_every else None
            if self.validation_is_due:
                should_stop = self._validate(board, samples)
                if self.is_over:
                    self._save()
                elif should_stop:
                    raise self._stopped()
            pace = Pace()
            while not self.is_over:
                should_stop = self._train_step(batches, board, progress, pace)
                self.validation_is_due = self.step in self.validate_at
                if self.validation_is_due and not should_stop:
                    should_stop = self._validate(board, samples)
                    pace.restart()
                if self.step % config.execution.checkpoint_every == 0 or self.is_over or should_stop:
                    self._save()
                    pace.restart()
                if should_stop and not self.is_over:
                    raise self._stopped()
        model = self.engine.trained_model()
        if self.early_stopping is not None:
            log.info("the best validation was after step %d of %d", self.early_stopping.best_step, self.step)
            model.load_state_dict(self.early_stopping.best_weights)
        return model

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train or to validate."""
        stopped_early = self.early_stopping is not None and self.early_stopping.is_over
        return (self.step == self.plan.steps or stopped_early) and not self.validation_is_due

    def _stopped(self) -> StoppedError:
        return StoppedError(self.stop.signal or "another rank's signal", by_all=True)

    def _train_step(self, batches: Generator[Any], board: Any, progress: ProgressDisplay, pace: Pace) -> bool:
        """Take an optimiser step, and put it on record where that is due; whether any rank is asked to stop."""
        lr = learning_rate(self.config.train.optimiser, self.step, self.plan.steps)
        taken = self.engine.optimise(batches, lr, self.stop.signal is not None)
        self.step += 1
        pace.count_step()
        progress.show(self.step, f"loss {taken.loss:.4f}")
        if not math.isfinite(taken.loss) or not math.isfinite(taken.gradient_norm):
            raise DivergedError(
                f"the loss of step {self.step} is {taken.loss:.4g}, its gradient norm {taken.gradient_norm:.4g} "
                f"(learning rate {lr:.3g})"
            )
        if self.step % self.config.execution.log_every == 0 or self.step in (1, self.plan.steps):
            self._log(board, "train", self._train_row(taken, lr, pace.lap()))
        return taken.should_stop

    def _train_row(self, taken: Step, lr: float, step_seconds: float) -> dict[str, Any]:
        """What the metrics say of a step; step_seconds: of it and those since the row before, a mean"""
        train, communication = self.config.train, self.engine.communication_seconds()
        row = {
            "loss": taken.loss,
            "terms": taken.terms,
            "learning_rate": lr,
            "gradient_norm": taken.gradient_norm,
            "audio_seconds_per_second": train.global_batch * train.crop_seconds / step_seconds,
            "step_seconds": step_seconds,
            "memory_gib": _memory_gib(),
            "replaced_crops": self.quarantine.num_replaced(self.step * train.global_batch),
        }
        return row if communication is None else row | {"communication_seconds": communication}

    def _validate(self, board: Any, samples: SampleBoard | None) -> bool:
        """Validate after the committed step and put it on record; whether the run is to stop, validated or not."""
        row, should_stop = self.validate()
        if row is None:
            return should_stop
        self.validation_is_due = False
        self._log(board, "validation", row)
        if not math.isfinite(row["loss"]):
            raise DivergedError(f"the validation loss after step {self.step} is {row['loss']:.4g}")
        if self.processes.is_first:
            log.info("validation loss %.5f (unprocessed %.5f)", row["loss"], row["unprocessed_loss"])
        self._after_validation(samples, row["loss"], sum(at <= self.step for at in self.validate_at))
        return should_stop

    def validate(self) -> tuple[dict[str, Any] | None, bool]:
        """Loss and SI-SDR, enhanced and unprocessed: means over whole utterances, which the ranks share out.

        One too short for a term of the loss is zero-padded on both sides, as it is for a crop of training.
        And whether a signal has asked any rank to stop: then all break it off at their next utterance, with None
        for the means.
        """
        processes = self.processes
        processes.at("validating")
        clips = sorted(self.index.clips("validation"), key=lambda clip: clip.id)
        model, device = self.engine.evaluation_model(), self.engine.device
        reader = ShardReader(self.index.root)
        own: list[dict[str, float]] = []
        model.eval()
        with torch.no_grad():
            for clip in clips[processes.rank :: processes.world_size]:
                if self.stop.signal is not None:
                    processes.at(STOPPING)
                if self.stop.signal is not None or processes.is_any_at(STOPPING):
                    break
                lacking = max(0, self.config.train.losses.fewest_samples - clip.num_samples)
                processes.mark()
                with self._reading():
                    parts = reader.read_clip(clip)
                noisy, clean = (
                    pad(to_float(torch.from_numpy(part), device)[None], (lacking // 2, lacking - lacking // 2))
                    for part in parts
                )
                if clip.id not in self._unprocessed:
                    values = self._score(clip, unprocessed(noisy, model.stft), clean)
                    self._unprocessed[clip.id] = {
                        f"unprocessed_{name}": value for name, value in values.items() if name in ("loss", "si_sdr")
                    }
                own.append(self._score(clip, model(noisy), clean) | self._unprocessed[clip.id])
        model.train()
        given = processes.gather((own, self.stop.signal is not None))
        shares, should_stop = [share for share, _ in given], any(is_asked for _, is_asked in given)
        if sum(map(len, shares)) < len(clips):
            return None, should_stop
        rows = [shares[number % processes.world_size][number // processes.world_size] for number in range(len(clips))]
        return _means(rows), should_stop

    def _score(self, clip: Clip, estimate: Enhanced, clean: Tensor) -> dict[str, float]:
        """Loss, its terms and, where it is defined, SI-SDR of what was made of a validation clip."""
        stft = self.engine.model.stft
        loss = enhancement_loss(estimate, clean, stft, self.config.train.losses)
        values = {"loss": loss.total.item()} | {f"terms/{name}": term.item() for name, term in loss.terms.items()}
        try:
            values["si_sdr"] = si_sdr(estimate.waveform[0].float().cpu().numpy(), clean[0].cpu().numpy())
        except RefusedError as error:
            log.warning("validation clip %s: no SI-SDR, %s", clip.id, error)
        return values

    def _after_validation(self, samples: SampleBoard | None, loss: float, count: int) -> None:
        """Write what is to be listened to, and see whether training still improves; every rank."""
        every = self.config.execution.samples_every
        writes = every is not None and count % every == 0
        if writes or self.early_stopping is not None:
            model = self.engine.evaluation_model()
            if samples is not None and writes:
                samples.write(model, self.step)
            if self.early_stopping is not None:
                self.early_stopping.update(loss, self.step, model)

    def _batches(self) -> Generator[Any]:
        """This rank's micro-batches from the committed step on; the process ends if one cannot be read in time."""
        config, execution = self.config, self.config.execution
        sampler = MicroBatchSampler(
            self.step,
            self.plan.steps,
            config.train.global_batch,
            self.engine.micro_batch,
            self.processes.rank,
            self.processes.world_size,
            self.engine.span,
        )
        for_gpu = self.engine.device.type == "cuda"
        loader = training_loader(self.dataset, sampler, execution.num_workers, for_gpu)
        with closing(iter(loader)) as batches:
            while True:
                with self._reading():
                    batch = next(batches, None)
                if batch is None:
                    return
                self.processes.mark()
                self.quarantine.add(batch.replaced)
                yield batch.noisy, batch.clean

    def _end_for_hung_reading(self, what: str) -> None:
        """Last words of this rank: on record, and to the other ranks."""
        seconds = self.config.execution.step_timeout
        reason = f"rank {self.processes.rank} has been reading one batch or clip for {seconds:g} s: {what}"
        log.critical("%s", reason)
        self.directory.log_event("failed", failure="node failure", reason=reason, rank=self.processes.rank)
        self.processes.tell_failure(f"node failure: {reason}")

    def _board(self) -> Any:
        """Where TensorBoard's scalars go; nothing on the ranks that write no records."""
        if not self.processes.is_first:
            return nullcontext()
        from torch.utils.tensorboard import SummaryWriter  # slow to load, and needed nowhere else

        return SummaryWriter(self.directory.tensorboard, purge_step=self.step + 1)

    def _log(self, board: Any, kind: str, row: dict[str, Any]) -> None:
        if self.processes.is_first:
            self.directory.log_metrics(kind, self.step, **row)
            _write_scalars(board, kind, row, self.step)

    def _save(self) -> None:
        self.processes.at("saving")
        extra = {
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping is not None else None,
            "validation_is_due": self.validation_is_due,
        }
        started = time.perf_counter()
        if self.processes.is_first and self.directory.metrics.exists():
            sync(self.directory.metrics)  # the steps that the checkpoint covers are not logged again
        save_checkpoint(
            self.directory.checkpoints,
            self.step,
            lambda folder: self.engine.write(folder, extra),
            self.processes,
            self.engine.layout,
        )
        if self.processes.is_first:
            self.directory.log_event("checkpointed", step=self.step, seconds=time.perf_counter() - started)

    def _restore(self) -> int:
        """Take up the newest checkpoint, the same on every rank; the number of steps it has behind it."""

        def choose() -> Checkpoint | None:
            checkpoint = take_up(self.directory.checkpoints)
            if checkpoint is not None and checkpoint.layout != self.engine.layout:
                raise UserError(
                    f"checkpoint {checkpoint.path} was written {_describe_layout(checkpoint.layout)}; this is a run "
                    f"{_describe_layout(self.engine.layout)}: go on as it was written, or delete the run's checkpoints"
                )
            return checkpoint

        checkpoint = self.processes.from_first(choose)
        if checkpoint is None:
            return 0
        state = self.engine.load(checkpoint.path)
        if self.early_stopping is not None:
            self.early_stopping.load_state_dict(state["early_stopping"])
        self.validation_is_due = state.get("validation_is_due", False)  # which older checkpoints do not say
        if self.processes.is_first:
            log.info("going on from %s", checkpoint.path)
        return checkpoint.step


def _means(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Of each value over the rows that have it; those called terms/NAME under "terms"."""
    means: dict[str, Any] = {"terms": {}}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        mean = sum(values) / len(values)
        if name.startswith("terms/"):
            means["terms"][name.removeprefix("terms/")] = mean
        else:
            means[name] = mean
    return means


def _describe_layout(layout: dict[str, int] | None) -> str:
    if layout is None:
        return "without DeepSpeed"
    return f"with deepspeed=zero{layout['zero_stage']} by {layout['world_size']} processes"


def _memory_gib() -> float:
    """Most memory held so far: of the GPU if there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _write_scalars(board: Any, kind: str, row: dict[str, Any], step: int) -> None:
    for name, value in row.items():
        scalars = (
            {f"{name}/{term}": number for term, number in value.items()} if isinstance(value, dict) else {name: value}
        )
        for tag, number in scalars.items():
            board.add_scalar(f"{kind}/{tag}", number, step)
