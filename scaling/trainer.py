"""Training one run: from the committed step to the last, by its plan.

What a step does depends on the plan and the step's number alone, so a run that was killed
gives the same losses and weights as one that was not, bit for bit on CPU.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bsrnn import BSRNN
from bsrnn.losses import enhancement_loss, unprocessed
from scaling.checkpoint import load_newest, save_checkpoint
from scaling.config import OptimiserConfig
from scaling.errors import UserError
from scaling.metrics import RefusedError, si_sdr
from scaling.plan import RunPlan, training_clips
from scaling.progress import ProgressDisplay
from scaling.records import RunDirectory
from scaling.shards import SAMPLE_RATE, ShardIndex, ShardReader
from scaling.stream import CropDataset, MicroBatchSampler, to_float, training_loader

log = logging.getLogger(__name__)


class DivergedError(Exception):
    """The loss is not finite any more: a result of the run's science, not a defect of its execution."""


def learning_rate(config: OptimiserConfig, step: int, num_steps: int) -> float:
    """Of optimiser step `step` (0 is the first): linear warm-up, then a half cosine to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def validation_steps(num_steps: int, num_validations: int) -> set[int]:
    """The committed steps after which to validate: evenly spaced, the last one always."""
    return {max(1, round(num_steps * count / num_validations)) for count in range(1, num_validations + 1)}


class Trainer:
    """Model, optimiser and stream of a run, at its committed step."""

    def __init__(self, plan: RunPlan, directory: RunDirectory, index: ShardIndex) -> None:
        config = plan.config
        plan.check_index(index)
        self.plan, self.directory, self.index, self.config = plan, directory, index, config
        if config.execution.device == "cuda" and not torch.cuda.is_available():
            raise UserError("execution.device = cuda: torch finds no GPU here; take execution.device=auto")
        on_cpu = config.execution.device == "cpu" or not torch.cuda.is_available()
        if on_cpu and config.train.precision == "fp16":
            raise UserError("train.precision = fp16 needs a GPU and torch finds none: take bf16 or fp32")
        precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
        torch.manual_seed(config.seed)
        self.model = BSRNN(config.model.architecture(config.train.norm_batch))
        optimiser = config.train.optimiser
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimiser.learning_rate,
            betas=(optimiser.betas[0], optimiser.betas[1]),
            weight_decay=optimiser.weight_decay,
        )
        self.network: Any
        self.network, self.optimiser = self.accelerator.prepare(self.model, self.optimiser)
        # Compiled for the one shape of training; validation's whole utterances are of every length.
        self.compiled = torch.compile(self.network) if config.execution.compile else self.network
        self.step = self._restore()
        self.dataset = CropDataset(
            index.root,
            training_clips(config, index),
            round(config.train.crop_seconds * SAMPLE_RATE),
            config.seed,
        )

    def fit(self) -> BSRNN:
        """Train to the plan's last step and return the trained model.

        DivergedError if a loss or gradient stops being finite; UserError for a full disk or a damaged clip.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to load, and needed nowhere else

        config, plan = self.config, self.plan
        validate_at = validation_steps(plan.steps, 1 if config.train.test else config.execution.num_validations)
        sampler = MicroBatchSampler(self.step, plan.steps, config.train.global_batch, config.micro_batch)
        batches = iter(training_loader(self.dataset, sampler, config.execution.num_workers))
        board = SummaryWriter(self.directory.tensorboard, purge_step=self.step or None)
        audio_seconds = config.train.global_batch * config.train.crop_seconds
        since, steps_since = time.perf_counter(), 0
        with board, ProgressDisplay(plan.name, plan.steps, self.step) as progress:
            while self.step < plan.steps:
                lr = learning_rate(config.train.optimiser, self.step, plan.steps)
                loss, terms, gradient_norm = self._optimise(batches, lr)
                self.step += 1
                steps_since += 1
                if not math.isfinite(loss) or not math.isfinite(gradient_norm):
                    raise DivergedError(
                        f"the loss of step {self.step} is {loss:.4g}, its gradient norm {gradient_norm:.4g} "
                        f"(learning rate {lr:.3g})"
                    )
                if self.step % config.execution.log_every == 0 or self.step in (1, plan.steps):
                    now = time.perf_counter()
                    row: dict[str, Any] = {
                        "loss": loss,
                        "terms": terms,
                        "learning_rate": lr,
                        "gradient_norm": gradient_norm,
                        "audio_seconds_per_second": audio_seconds * steps_since / (now - since),
                        "memory_gib": _memory_gib(),
                    }
                    since, steps_since = now, 0
                    self.directory.log_metrics("train", self.step, **row)
                    _write_scalars(board, "train", row, self.step)
                if self.step in validate_at:
                    row = self.validate()
                    self.directory.log_metrics("validation", self.step, **row)
                    _write_scalars(board, "validation", row, self.step)
                    if not math.isfinite(row["loss"]):
                        raise DivergedError(f"the validation loss after step {self.step} is {row['loss']:.4g}")
                    log.info("validation loss %.5f (unprocessed %.5f)", row["loss"], row["unprocessed_loss"])
                    since, steps_since = time.perf_counter(), 0
                if self.step % config.execution.checkpoint_every == 0 or self.step == plan.steps:
                    self._save()
                    since, steps_since = time.perf_counter(), 0
                progress.show(self.step, f"loss {loss:.4f}")
        # As `scaling.evaluate` will load it: not compiled, and in 32 bits whatever the training's precision.
        return self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)

    def validate(self) -> dict[str, Any]:
        """Loss and SI-SDR, enhanced and unprocessed: means over whole validation utterances."""
        reader = ShardReader(self.index.root)
        clips = sorted(self.index.clips("validation"), key=lambda clip: clip.id)
        device = self.accelerator.device
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}

        def add(name: str, value: float) -> None:
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1

        self.network.eval()
        with torch.no_grad():
            for clip in clips:
                noisy, clean = (to_float(torch.from_numpy(part), device)[None] for part in reader.read_clip(clip))
                stft, weights = self.model.stft, self.config.train.losses
                for prefix, estimate in (("", self.network(noisy)), ("unprocessed_", unprocessed(noisy, stft))):
                    loss = enhancement_loss(estimate, clean, stft, weights)
                    add(f"{prefix}loss", loss.total.item())
                    if not prefix:
                        for name, term in loss.terms.items():
                            add(f"terms/{name}", term.item())
                    try:
                        add(
                            f"{prefix}si_sdr",
                            si_sdr(estimate.waveform[0].float().cpu().numpy(), clean[0].cpu().numpy()),
                        )
                    except RefusedError as error:
                        log.warning("validation clip %s: no SI-SDR, %s", clip.id, error)
        self.network.train()
        means = {name: total / counts[name] for name, total in sums.items()}
        terms = {name.removeprefix("terms/"): value for name, value in means.items() if name.startswith("terms/")}
        return {name: value for name, value in means.items() if not name.startswith("terms/")} | {"terms": terms}

    def _optimise(self, batches: Any, lr: float) -> tuple[float, dict[str, float], float]:
        """One optimiser step over a global batch: (loss, its terms, gradient norm)."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        self.optimiser.zero_grad()
        num_micro_batches = self.config.train.global_batch // self.config.micro_batch
        total = torch.zeros((), device=self.accelerator.device)
        terms: dict[str, Tensor] = {}
        for _ in range(num_micro_batches):
            noisy, clean = (to_float(part, self.accelerator.device) for part in next(batches))
            loss = enhancement_loss(self.compiled(noisy), clean, self.model.stft, self.config.train.losses)
            self.accelerator.backward(loss.total / num_micro_batches)
            total += loss.total.detach() / num_micro_batches
            for name, term in loss.terms.items():
                terms[name] = terms.get(name, 0) + term / num_micro_batches
        bound = self.config.train.optimiser.max_gradient_norm
        gradient_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if bound is None else bound)
        norm = float(gradient_norm)
        if self.accelerator.scaler is not None:
            self.optimiser.step()  # fp16: the scaler itself passes over gradients that overflowed
            norm = norm if math.isfinite(norm) else 0.0
        elif math.isfinite(norm):
            self.optimiser.step()
        return total.item(), {name: term.item() for name, term in terms.items()}, norm

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        started = time.perf_counter()
        save_checkpoint(self.directory.checkpoints, self.step, state)
        self.directory.log_event("checkpointed", step=self.step, seconds=time.perf_counter() - started)

    def _restore(self) -> int:
        """Take up the newest checkpoint; the number of steps it has behind it."""
        loaded = load_newest(self.directory.checkpoints, self.accelerator.device)
        if loaded is None:
            return 0
        checkpoint, state = loaded
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        log.info("going on from %s", checkpoint.path)
        return checkpoint.step


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
