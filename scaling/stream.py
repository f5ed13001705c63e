"""The training stream: which crop is the t-th of a run, and how it is read.

A crop on its way to the network:
    1. t, the global sample counter: crop t of a run is number t % B of the batch of step t // B
    2. epoch = t // N over N clips; the t % N-th entry of that epoch's permutation names the clip
    3. the epoch's uniform draws place the crop within the clip
    4. the crop is read from its shard, two positioned reads of 16-bit samples
    5. a clip shorter than the crop is zero-padded on both sides
    6. int16 becomes float, full scale ±1

Steps 1 to 3 are a pure function of (seed, t): the stream has no state but the committed step,
goes on from any step in constant time, is the same for any number of workers or processes,
and takes every clip exactly once an epoch. Batches run across the ends of epochs, so every
batch is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scaling.shards import Clip, ShardReader
from scaling.stopping import ignore_stop_signals

# Keeps the draws of order and crops apart from all other uses of a run's seed.
_ORDER, _CROPS = 1, 2


@dataclass(frozen=True)
class CropAt:
    """Which part of which clip: `position` of the clip in the budget, first sample of the crop."""

    epoch: int
    position: int
    start: int


class CropOrder:
    """The order of a run's crops, as a pure function of (seed, t)."""

    def __init__(self, num_samples: Sequence[int], crop_samples: int, seed: int) -> None:
        """num_samples: length of each clip of the budget, in samples"""
        self.room = np.maximum(0, np.asarray(num_samples, dtype=np.int64) - crop_samples)  # last possible start
        self.seed = seed

    def __getitem__(self, t: int) -> CropAt:
        epoch, within = divmod(t, len(self.room))
        permutation, starts = _epoch(self.seed, epoch, self.room.tobytes())
        position = int(permutation[within])
        return CropAt(epoch, position, int(starts[position]))


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, room: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The permutation of the clips and the first sample of each clip's crop, in an epoch."""
    last_starts = np.frombuffer(room, dtype=np.int64)
    permutation = _generator(seed, epoch, _ORDER).permutation(len(last_starts))
    starts = (_generator(seed, epoch, _CROPS).random(len(last_starts)) * (last_starts + 1)).astype(np.int64)
    return permutation, starts


def _generator(seed: int, epoch: int, use: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, use))))


class CropDataset(Dataset[tuple[Tensor, Tensor]]):
    """Crop t as (noisy, clean), each int16 of (crop_samples,)."""

    def __init__(self, shard_root: Path, clips: Sequence[Clip], crop_samples: int, seed: int) -> None:
        self.reader = ShardReader(shard_root)
        self.clips = list(clips)
        self.crop_samples = crop_samples
        self.order = CropOrder([clip.num_samples for clip in clips], crop_samples, seed)

    def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
        at = self.order[t]
        clip = self.clips[at.position]
        num_samples = min(self.crop_samples, clip.num_samples)
        noisy, clean = self.reader.read_crop(clip, at.start, num_samples)
        missing = self.crop_samples - num_samples
        if missing:
            padding = (missing // 2, missing - missing // 2)
            noisy, clean = np.pad(noisy, padding), np.pad(clean, padding)
        return torch.from_numpy(noisy), torch.from_numpy(clean)


class MicroBatchSampler(Sampler[list[int]]):
    """The global sample counters of each micro-batch of a rank from `first_step` to `num_steps`; holds no state.

    A global batch is V micro-batches; a rank takes V / world_size of them that lie side by side.
    Where `span` ranks share a norm batch they take its micro-batches in turn, so that what one
    statistic covers is side by side in the stream too, on any number of processes.
    """

    def __init__(
        self,
        first_step: int,
        num_steps: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        span: int = 1,
    ) -> None:
        self.first_step, self.num_steps = first_step, num_steps
        self.global_batch, self.micro_batch = global_batch, micro_batch
        num_own = global_batch // micro_batch // world_size
        first = rank // span * num_own
        self.own = [number * span + rank % span for number in range(first, first + num_own)]

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * len(self.own)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.num_steps):
            for number in self.own:
                first = step * self.global_batch + number * self.micro_batch
                yield list(range(first, first + self.micro_batch))


def training_loader(dataset: CropDataset, sampler: MicroBatchSampler, num_workers: int) -> DataLoader:
    """Micro-batches of (noisy, clean), each int16 of (micro_batch, crop_samples)."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        # The numbers drawn for workers' seeds must not touch the process's generator.
        generator=torch.Generator(),
    )


def _start_worker(number: int) -> None:
    ignore_stop_signals()


def to_float(samples: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """16-bit samples to float32, full scale ±1, on a device."""
    return samples.to(device, non_blocking=True).float() / 32768
