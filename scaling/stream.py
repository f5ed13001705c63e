"""The training stream: which crop is the t-th of a run, and how it is read.

A crop on its way to the network:
    1. t, the global sample counter: crop t of a run is number t % B of the batch of step t // B
    2. epoch = t // N over N clips; the t % N-th entry of that epoch's permutation names the clip
    3. the epoch's uniform draws place the crop within the clip
    4. the crop is read from its shard, two positioned reads of 16-bit samples, checked
    5. where it is damaged, another takes its place: a pure function of (seed, epoch, clip)
    6. a clip shorter than the crop is zero-padded on both sides
    7. int16 becomes float, full scale ±1

Steps 1 to 3 are a pure function of (seed, t): the stream has no state but the committed step,
goes on from any step in constant time, is the same for any number of workers or processes,
and takes every clip exactly once an epoch. Batches run across the ends of epochs, so every
batch is full. A global batch of B crops is V micro-batches; process r of W takes those v of
them with v·W // V == r.

Where shards are far away, `block_shards` makes the permutation one of two levels: the shards
are permuted and cut into blocks of so many, and the clips of a block are permuted among
themselves. Then only a block's shards are needed at a time, and the next one's can be fetched.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data._utils import signal_handling

from scaling.errors import BadDataError, UserError
from scaling.remote import RemoteRoot, Root
from scaling.shard_reader import DamagedClipError, ShardReader
from scaling.shards import Clip, remedy
from scaling.stopping import end_with_parent, ignore_stop_signals

# Keeps the draws of order, crops and replacements apart from all other uses of a run's seed.
_ORDER, _CROPS, _REPLACEMENTS = 1, 2, 3
SECONDS_TO_END = 1.0  # of a loader's workers
_NEAR_CANDIDATES, _FAR_CANDIDATES = 16, 64  # of a replacement: from the same block of shards, and from all


@dataclass(frozen=True)
class CropAt:
    """Which part of which clip: `position` of the clip in the budget, first sample of the crop."""

    epoch: int
    position: int
    start: int


class Epoch(NamedTuple):
    """The order of an epoch, each an array over the clips of the budget."""

    permutation: NDArray[np.int64]  # of positions, in the order in which they are taken
    starts: NDArray[np.int64]  # by position: first sample of the clip's crop
    blocks: NDArray[np.int64]  # by position: number of the clip's block of shards


class CropOrder:
    """The order of a run's crops, as a pure function of (seed, t)."""

    def __init__(
        self,
        num_samples: Sequence[int],
        crop_samples: int,
        seed: int,
        shards: Sequence[str] | None = None,
        block_shards: int | None = None,
    ) -> None:
        """num_samples, shards: length of each clip of the budget, in samples, and its shard.

        block_shards: how many shards are mixed at a time; None mixes all clips.
        """
        self.room = np.maximum(0, np.asarray(num_samples, dtype=np.int64) - crop_samples)  # last possible start
        self.seed = seed
        self.block_shards = block_shards
        self.shard_names, self.shards = np.unique([""] if shards is None else shards, return_inverse=True)
        self._epochs: dict[int, Epoch] = {}

    def __len__(self) -> int:
        """Clips an epoch."""
        return len(self.room)

    def __getitem__(self, t: int) -> CropAt:
        number, within = divmod(t, len(self.room))
        epoch = self.epoch(number)
        position = int(epoch.permutation[within])
        return CropAt(number, position, int(epoch.starts[position]))

    def epoch(self, number: int) -> Epoch:
        """The order of an epoch; those of the last few asked for are kept."""
        found = self._epochs.get(number)
        if found is None:
            while len(self._epochs) >= 3:
                self._epochs.pop(next(iter(self._epochs)))
            found = self._epochs[number] = self._draw(number)
        return found

    def replacements(self, at: CropAt, clip_id: str) -> Iterator[CropAt]:
        """What can take a crop's place, in order: other clips of its block first, then any."""
        epoch = self.epoch(at.epoch)
        name = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big")
        rng = _generator(self.seed, at.epoch, _REPLACEMENTS, name)
        near = rng.permutation(np.flatnonzero(epoch.blocks == epoch.blocks[at.position]))[:_NEAR_CANDIDATES]
        for position in (*near, *rng.permutation(len(self.room))[:_FAR_CANDIDATES]):
            start = int(rng.random() * (self.room[position] + 1))
            if position != at.position:
                yield CropAt(at.epoch, int(position), start)

    def block(self, t: int) -> tuple[int, int]:
        """The epoch of crop t, and its block of shards."""
        number, within = divmod(t, len(self.room))
        epoch = self.epoch(number)
        return number, int(epoch.blocks[epoch.permutation[within]])

    def upcoming(self, number: int, block: int) -> list[str]:
        """The shards of a block of an epoch and of the block after it, in the order of their use."""
        last = int(self.epoch(number).blocks.max())
        after = (number, block + 1) if block < last else (number + 1, 0)
        shards: list[str] = []
        for of, which in ((number, block), after):
            epoch = self.epoch(of)
            ordered = self.shards[epoch.permutation[epoch.blocks[epoch.permutation] == which]]
            _, first = np.unique(ordered, return_index=True)
            shards += [str(self.shard_names[shard]) for shard in ordered[np.sort(first)]]
        return list(dict.fromkeys(shards))

    def _draw(self, number: int) -> Epoch:
        rng = _generator(self.seed, number, _ORDER)
        if self.block_shards is None:
            permutation = rng.permutation(len(self.room))
            blocks = np.zeros(len(self.room), dtype=np.int64)
        else:
            places = rng.permutation(len(self.shard_names))  # of each shard, in the epoch's order of shards
            blocks = places[self.shards] // self.block_shards
            shuffled = rng.permutation(len(self.room))
            permutation = shuffled[np.argsort(blocks[shuffled], kind="stable")]
        starts = (_generator(self.seed, number, _CROPS).random(len(self.room)) * (self.room + 1)).astype(np.int64)
        return Epoch(permutation, starts, blocks)


def _generator(seed: int, epoch: int, *use: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, *use))))


class Replaced(NamedTuple):
    """A crop that could not be had, and what took its place."""

    t: int  # the global sample counter
    clip_id: str
    shard: str
    what: str  # what was wrong with it
    by: str  # the id of the clip that was taken instead


class CropBatch(NamedTuple):
    """A micro-batch: noisy and clean, each int16 of (micro_batch, crop_samples), and its crops that are substitutes."""

    noisy: Tensor
    clean: Tensor
    replaced: tuple[Replaced, ...]


class CropDataset(Dataset[tuple[Tensor, Tensor]]):
    """Crop t as (noisy, clean), each int16 of (crop_samples,); many of them as a `CropBatch`.

    A crop is replaced if a block of its clip that it touches is damaged. What is delivered is so
    a function of (seed, t) and the shards' bytes alone, whoever reads it and whatever was read before.
    """

    def __init__(
        self,
        shard_root: Root,
        clips: Sequence[Clip],
        crop_samples: int,
        seed: int,
        block_shards: int | None = None,
    ) -> None:
        self.reader = ShardReader(shard_root)
        self.clips = list(clips)
        self.crop_samples = crop_samples
        shards = [clip.shard for clip in clips]
        self.order = CropOrder([clip.num_samples for clip in clips], crop_samples, seed, shards, block_shards)
        self._fetched_for: tuple[int, int] | None = None
        if isinstance(shard_root, RemoteRoot):
            _check_cache(shard_root, sorted(set(shards)), block_shards)

    def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
        batch = self.__getitems__([t])
        return batch.noisy[0], batch.clean[0]

    def __getitems__(self, counters: Sequence[int]) -> CropBatch:
        """The crops of these global sample counters; BadDataError where nothing can take a damaged one's place."""
        self._fetch_ahead(counters[0])
        noisy, clean = _empty(len(counters), self.crop_samples), _empty(len(counters), self.crop_samples)
        rows = zip(noisy.numpy(), clean.numpy(), strict=True)
        replaced = tuple(
            substitute
            for t, (noisy_row, clean_row) in zip(counters, rows, strict=True)
            if (substitute := self._fill(t, noisy_row, clean_row)) is not None
        )
        return CropBatch(noisy, clean, replaced)

    def _fill(self, t: int, noisy: NDArray[np.int16], clean: NDArray[np.int16]) -> Replaced | None:
        """Read crop t into its row of a batch; what was replaced, if it was."""
        at = self.order[t]
        clip = self.clips[at.position]
        what = self._read(at, noisy, clean)
        if what is None:
            return None
        for candidate in self.order.replacements(at, clip.id):
            if self._read(candidate, noisy, clean) is None:
                return Replaced(t, clip.id, clip.shard, what, self.clips[candidate.position].id)
        raise BadDataError(
            f"clip {clip.id} in {self.reader.root}/{clip.shard} is damaged ({what}) and so is all that "
            f"could take its place: {remedy(self.reader.root)}"
        )

    def _read(self, at: CropAt, noisy: NDArray[np.int16], clean: NDArray[np.int16]) -> str | None:
        """Read a crop, zero-padded on both sides; what is wrong with its clip, if it cannot be read."""
        clip = self.clips[at.position]
        num_samples = min(self.crop_samples, clip.num_samples)
        before = (self.crop_samples - num_samples) // 2
        if num_samples < self.crop_samples:
            noisy[:], clean[:] = 0, 0
        try:
            taken = slice(before, before + num_samples)
            self.reader.read_crop_into(clip, at.start, noisy[taken], clean[taken])
        except DamagedClipError as error:
            return error.what
        return None

    def _fetch_ahead(self, t: int) -> None:
        if isinstance(self.reader.root, RemoteRoot) and (block := self.order.block(t)) != self._fetched_for:
            self._fetched_for = block
            self.reader.prefetch(self.order.upcoming(*block))


def _check_cache(root: RemoteRoot, shards: Sequence[str], block_shards: int | None) -> None:
    """UserError if the cache cannot hold the shards that are in use at a time: all, or those of two blocks."""
    sizes = sorted((root.promised[shard][0] for shard in shards), reverse=True)
    needed = sum(sizes if block_shards is None else sizes[: 2 * block_shards])
    if needed > root.cache_bytes:
        how = "mixes all of" if block_shards is None else "keeps two blocks of"
        raise UserError(
            f"data.cache_gb = {root.cache_bytes / 1e9:g} does not hold the {needed / 1e9:.3g} GB of shards in use at a "
            f"time, as the order {how} them: raise it, or set data.block_shards lower"
        )


def _empty(*shape: int) -> Tensor:
    """An int16 tensor, in shared memory where a worker makes it, so that it need not be copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.int16)
    storage = torch.UntypedStorage._new_shared(2 * math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.int16).set_(storage, 0, shape)  # type: ignore[call-overload]


class MicroBatchSampler(Sampler[list[int]]):
    """The global sample counters of each micro-batch of a process, from `first_step` to `num_steps`; holds no state.

    A global batch is V micro-batches; a process takes V / W of them that lie side by side, where
    W, which must divide V, is the number of processes: all take the same number of steps.
    Where `span` processes share a norm batch they take its micro-batches in turn, so that what one
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
        if not 0 <= rank < world_size or global_batch % (micro_batch * world_size) or world_size % span:
            raise ValueError(
                f"process {rank} of {world_size} cannot take its part of a global batch of {global_batch} in "
                f"micro-batches of {micro_batch}, with norms over {span}: expected the processes to divide the "
                "micro-batches"
            )
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


def training_loader(
    dataset: CropDataset, sampler: MicroBatchSampler, num_workers: int, for_gpu: bool = False
) -> CropLoader:
    """The micro-batches of a sampler, each a `CropBatch`; for a GPU in memory from which it is copied at once."""
    # Workers beyond the cores are a choice: they wait for storage. torch warns at every start of the loader.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    return CropLoader(
        _TellingErrors(dataset) if num_workers else dataset,  # type: ignore[arg-type]  # __getitems__ makes the batch
        batch_sampler=sampler,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=for_gpu,
        worker_init_fn=_start_worker,
        # The numbers drawn for workers' seeds must not touch the process's generator.
        generator=torch.Generator(),
    )


class _TellingErrors:
    """A dataset for workers: errors come as they are; torch would put a traceback in the place of their message."""

    def __init__(self, dataset: CropDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, counters: Sequence[int]) -> CropBatch | Exception:
        try:
            return self.dataset.__getitems__(counters)
        except (UserError, OSError) as error:
            return error


class CropLoader(DataLoader[CropBatch]):
    """Raises what its workers tell, and ends them when its reader leaves off.

    They ignore the signal by which Python would end them, and wait for it without end: an error's traceback that keeps
    a loader alive would keep the process.
    """

    def __iter__(self) -> Generator[CropBatch]:  # type: ignore[override]
        before = set(multiprocessing.active_children())
        try:
            batches: Any = super().__iter__()
        except BaseException:  # some have begun, and nobody else knows them: Python would wait for them when it ends
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
            raise
        try:
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            if self.num_workers:
                _end_workers(batches)


def _end_workers(batches: Any) -> None:
    """End the workers of a loader's iterator; those that still wait for storage a second later without regard.

    The iterator itself gives each of them five seconds and then a signal that they ignore, and the process waits for
    them when it ends: a run that has saved would be kept until its job is killed.
    """
    if batches._worker_pids_set:  # torch would take their end for a fault
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False

    def kill() -> None:
        for worker in batches._workers:
            worker.kill()

    killer = threading.Timer(SECONDS_TO_END, kill)
    killer.start()
    try:
        batches._shutdown_workers()
    finally:
        killer.cancel()


def _start_worker(number: int) -> None:
    ignore_stop_signals()
    end_with_parent()


def _as_it_is(batch: CropBatch) -> CropBatch:
    return batch


def to_float(samples: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """16-bit samples to float32, full scale ±1, on a device."""
    return samples.to(device, non_blocking=True).float() / 32768
