"""The sample ledger: whatever stops and resumes a run, on however many processes, each epoch takes every clip once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling.shards import Clip, ShardIndex
from scaling.stream import CropDataset, CropOrder, MicroBatchSampler, training_loader
from tests.reliability.shards_under_test import write_shards

SAMPLES = 400  # of the shortest clip
NUM_CLIPS = 120


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(
        tmp_path_factory.mktemp("ledger"), [SAMPLES + number % 40 for number in range(NUM_CLIPS)], 36_000
    )


@dataclass(frozen=True)
class Segment:
    """A stretch of a run on one set of processes: it commits `steps` steps, then reads `lost` more and is killed."""

    world_size: int
    micro_batch: int
    num_workers: int
    steps: int
    lost: int


@dataclass(frozen=True)
class Schedule:
    """How a run was executed: over so many clips, in blocks of so many shards, stretch after stretch."""

    seed: int
    num_clips: int
    block_shards: int | None
    global_batch: int
    segments: tuple[Segment, ...]

    @property
    def num_steps(self) -> int:
        return sum(segment.steps for segment in self.segments)

    @property
    def most_resumptions(self) -> int:
        """In the epoch that was resumed most often."""
        steps = accumulate(segment.steps for segment in self.segments[:-1])
        return max(Counter(step * self.global_batch // self.num_clips for step in steps).values(), default=0)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    global_batch = draw(st.sampled_from([4, 6, 8, 12]))
    num_clips = draw(st.one_of(st.integers(1, 12), st.integers(40, NUM_CLIPS), st.integers(40, NUM_CLIPS)))
    segments = []
    for _ in range(draw(st.integers(3, 10))):
        micro_batch = draw(st.sampled_from([size for size in (1, 2, 3, 4) if global_batch % size == 0]))
        processes = [count for count in range(1, 13) if global_batch // micro_batch % count == 0]
        # In processes of their own only now and then: starting one takes longer than all else here.
        num_workers = draw(st.sampled_from([0] * 40 + [1, 2]))
        world_size = draw(st.sampled_from(processes))
        segments.append(Segment(world_size, micro_batch, num_workers, draw(st.integers(0, 5)), draw(st.integers(0, 3))))
    last = segments[-1]  # goes on for an epoch or so, so that whole ones are seen
    segments.append(replace(last, steps=num_clips // global_batch + draw(st.integers(0, 5)), lost=0))
    block_shards = draw(st.one_of(st.none(), st.integers(1, 4)))
    return Schedule(draw(st.integers(0, 2**32)), num_clips, block_shards, global_batch, tuple(segments))


class Ledger(dict[int, list[tuple[int, str]]]):
    """Of every committed step: (micro-batch, clip id), as identified by the samples that were delivered."""


def clip_of(clips: list[Clip], contents: dict[bytes, str], noisy: np.ndarray, clean: np.ndarray) -> str:
    found = contents[noisy.tobytes() + clean.tobytes()]
    assert found in {clip.id for clip in clips}
    return found


def execute(schedule: Schedule, index: ShardIndex, contents: dict[bytes, str]) -> Ledger:
    """Run the real loaders of every process through a schedule; only committed steps enter the ledger."""
    ledger = Ledger()
    clips = index.clips("train")[: schedule.num_clips]
    committed = 0
    for segment in schedule.segments:
        until = committed + segment.steps + segment.lost  # the run's end lies further on; a kill comes before it
        per_step = schedule.global_batch // segment.micro_batch // segment.world_size
        steps_taken = []
        for rank in range(segment.world_size):
            dataset = CropDataset(index.root, clips, SAMPLES + 40, schedule.seed, schedule.block_shards)
            sampler = MicroBatchSampler(
                committed, until, schedule.global_batch, segment.micro_batch, rank, segment.world_size
            )
            delivered: Iterator = iter(training_loader(dataset, sampler, segment.num_workers))
            for step in range(committed, until):
                for _ in range(per_step):
                    batch = next(delivered)
                    assert len(batch.noisy) == segment.micro_batch
                    if step < committed + segment.steps:
                        pairs = zip(batch.noisy.numpy(), batch.clean.numpy(), strict=True)
                        ids = [(rank, clip_of(clips, contents, *pair)) for pair in pairs]
                        ledger.setdefault(step, []).extend(ids)
            assert next(delivered, None) is None
            steps_taken.append(len(sampler) // per_step)
        assert set(steps_taken) == {segment.steps + segment.lost}, "every process takes the same number of steps"
        committed += segment.steps
    return ledger


def test_committed_steps_take_every_clip_of_every_epoch_exactly_once(index: ShardIndex, times, report):
    dataset = CropDataset(index.root, index.clips("train"), SAMPLES + 40, 0)
    contents = {}
    for t in range(NUM_CLIPS):  # every clip is shorter than a crop, so its padded whole is what any epoch delivers
        noisy, clean = dataset[t]
        clip = dataset.clips[dataset.order[t].position]
        contents[noisy.numpy().tobytes() + clean.numpy().tobytes()] = clip.id
    assert len(contents) == NUM_CLIPS
    seen: Counter[str] = Counter()

    @settings(
        max_examples=times(40, 1_000),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(schedule=schedules())
    def check(schedule: Schedule) -> None:
        ledger = execute(schedule, index, contents)
        taken = [clip_id for step in sorted(ledger) for _, clip_id in ledger[step]]
        assert len(taken) == schedule.num_steps * schedule.global_batch
        ids = sorted(clip.id for clip in index.clips("train")[: schedule.num_clips])
        for first in range(0, len(taken), schedule.num_clips):
            epoch = taken[first : first + schedule.num_clips]
            if len(epoch) == schedule.num_clips:
                assert sorted(epoch) == ids
            else:
                assert len(set(epoch)) == len(epoch)
        # and in the order of one process that is never stopped
        order = CropDataset(
            index.root, index.clips("train")[: schedule.num_clips], SAMPLES + 40, schedule.seed, schedule.block_shards
        ).order
        assert taken == [index.clips("train")[order[t].position].id for t in range(len(taken))]
        seen.update(
            schedules=1,
            resumptions=len(schedule.segments) - 1,
            epochs=len(taken) // schedule.num_clips,
            samples=len(taken),
            several=schedule.most_resumptions >= 2,
            processes=max(segment.world_size for segment in schedule.segments) > 1,
            workers=any(segment.num_workers for segment in schedule.segments),
        )

    check()
    assert seen["several"] > seen["schedules"] / 2, "too few schedules resume several times an epoch"
    assert seen["processes"] > seen["schedules"] / 3
    assert seen["workers"]
    report(
        "ledger",
        f"{seen['schedules']:,} schedules made by Hypothesis (1 to 12 processes, 0 to 2 workers, 1 to 120 clips, "
        f"blocks of shards or none, 3 to 10 kills and resumptions, in {seen['several']:,} several within an epoch): "
        f"{seen['samples']:,} samples of committed steps, {seen['epochs']:,} whole epochs, {seen['resumptions']:,} "
        "resumptions: **0 missing, 0 twice**, all processes took the same number of steps, and the global batches were "
        "those of one process never stopped. Samples are identified by the bytes that the loaders delivered.",
    )


@settings(max_examples=50, deadline=None)
@given(
    num_clips=st.integers(1, 10**6),
    micro_batches=st.integers(1, 24),
    micro_batch=st.integers(1, 8),
    num_steps=st.integers(0, 50),
    data=st.data(),
)
def test_every_process_takes_the_same_number_of_steps_whatever_there_is_to_read(
    num_clips: int, micro_batches: int, micro_batch: int, num_steps: int, data: st.DataObject
):
    world_size = data.draw(st.sampled_from([count for count in range(1, 25) if micro_batches % count == 0]))
    batches = [
        list(MicroBatchSampler(0, num_steps, micro_batches * micro_batch, micro_batch, rank, world_size))
        for rank in range(world_size)
    ]
    assert {len(taken) for taken in batches} == {num_steps * micro_batches // world_size}
    assert sorted(t for taken in batches for batch in taken for t in batch) == list(
        range(num_steps * micro_batches * micro_batch)
    )


def test_processes_that_cannot_share_a_global_batch_are_refused():
    for rank, world_size in ((0, 3), (2, 2), (-1, 1)):
        with pytest.raises(ValueError, match=f"process {rank} of {world_size} cannot take its part"):
            MicroBatchSampler(0, 1, 8, 2, rank, world_size)


def test_blocks_keep_a_block_together_and_take_all_once():
    shards = [f"s{number % 7}" for number in range(200)]
    for block_shards in (1, 2, 3, 7, 9):
        order = CropOrder([1_000] * 200, 500, 3, shards, block_shards)
        num_blocks = -(-7 // block_shards)
        for epoch in range(3):
            taken = [order[t].position for t in range(200 * epoch, 200 * (epoch + 1))]
            assert sorted(taken) == list(range(200))
            used = [shards[position] for position in taken]
            blocks = [order.block(t) for t in range(200 * epoch, 200 * (epoch + 1))]
            assert blocks == sorted(blocks)
            assert len(set(blocks)) == num_blocks
            for block in set(blocks):
                members = {shard for shard, of in zip(used, blocks, strict=True) if of == block}
                assert len(members) <= block_shards
                assert members <= set(order.upcoming(*block))
        firsts = {tuple(order[t].position for t in range(200 * e, 200 * e + 20)) for e in range(3)}
        assert len(firsts) == 3
    assert [CropOrder([1_000] * 200, 500, 3, shards)[t] for t in range(400)] == [
        CropOrder([1_000] * 200, 500, 3)[t] for t in range(400)
    ], "without blocks the shards do not enter"


def test_resumption_costs_the_same_at_any_point(tmp_path: Path, times, report):
    """Time and bytes until the first micro-batch, in a stream whose epochs are large."""
    index = write_shards(tmp_path / "shards", [500 + number % 50 for number in range(2_000)], 10**9)
    clips = index.clips("train") * 50  # 100,000 entries
    rows = []
    for share in (0.01, 0.5, 0.99):
        step = int(share * len(clips)) // 64
        spent = []
        for _ in range(times(3, 9)):
            dataset = CropDataset(index.root, clips, 500, 1)
            before, began = _bytes_read(), time.process_time()
            next(iter(training_loader(dataset, MicroBatchSampler(step, 10**6, 64, 64), 0)))
            spent.append((time.process_time() - began, _bytes_read() - before))
        rows.append((share, min(seconds for seconds, _ in spent), max(num_bytes for _, num_bytes in spent)))
    seconds, num_bytes = [row[1] for row in rows], [row[2] for row in rows]
    assert max(num_bytes) < 1.1 * min(num_bytes), rows
    assert max(num_bytes) < 64 * 2 * 1_200, "the reads are the batch's own"
    assert max(seconds) < 3 * min(seconds) + 0.05, rows
    said = "; ".join(f"at {row[0]:.0%}: {1e3 * row[1]:.0f} ms, {row[2] / 1e3:.0f} kB" for row in rows)
    report(
        "resume",
        f"To the first batch of 64 crops in an epoch of {len(clips):,} clips, CPU time and bytes read: {said}.",
    )


def _bytes_read() -> int:
    """Bytes that this process has asked the kernel for."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
