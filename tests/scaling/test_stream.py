"""The order of crops is a pure function of (seed, step), and every epoch is each clip once."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.shard_reader import ShardReader
from scaling.shards import ShardIndex
from scaling.stream import CropDataset, CropOrder, MicroBatchSampler, to_float, training_loader


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50_000), min_size=1, max_size=40), seed=st.integers(0, 2**31))
def test_every_epoch_takes_every_clip_once_and_every_crop_lies_within_its_clip(lengths: list[int], seed: int):
    order = CropOrder(lengths, 8_000, seed)
    for epoch in range(3):
        crops = [order[t] for t in range(epoch * len(lengths), (epoch + 1) * len(lengths))]
        assert sorted(crop.position for crop in crops) == list(range(len(lengths)))
        for crop in crops:
            assert crop.epoch == epoch
            assert 0 <= crop.start <= max(0, lengths[crop.position] - 8_000)


def test_the_order_differs_from_epoch_to_epoch_and_from_seed_to_seed():
    def epoch_of(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = CropOrder([40_000] * 50, 8_000, seed)
        return [(order[t].position, order[t].start) for t in range(50 * epoch, 50 * (epoch + 1))]

    assert epoch_of(0, 0) == epoch_of(0, 0)
    orders = [epoch_of(0, 0), epoch_of(0, 1), epoch_of(1, 0)]
    assert len({tuple(position for position, _ in order) for order in orders}) == 3
    starts = {start for order in orders for _, start in order}
    assert len(starts) > 100
    assert max(starts) > 30_000  # crops reach the end of the clips, 40,000 - 8,000


def test_any_micro_batch_and_any_first_step_cut_the_same_stream():
    def stream(first_step: int, micro_batch: int) -> list[int]:
        return [t for batch in MicroBatchSampler(first_step, 6, 8, micro_batch) for t in batch]

    assert stream(0, 8) == list(range(48))
    for micro_batch in (1, 2, 4, 8):
        assert len(MicroBatchSampler(2, 6, 8, micro_batch)) == 4 * 8 // micro_batch
        for first_step in range(6):
            assert stream(first_step, micro_batch) == stream(0, 8)[first_step * 8 :]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_resumption_change_no_sample(tiny_index: ShardIndex, num_workers: int):
    clips = tiny_index.clips("train")
    dataset = CropDataset(tiny_index.root, clips, 8_000, seed=3)
    whole = list(training_loader(dataset, MicroBatchSampler(0, 9, 4, 4), 0))
    assert len(clips) < 36, "the stream should cross an epoch's end"
    resumed = list(training_loader(dataset, MicroBatchSampler(5, 9, 4, 2), num_workers))
    noisy = torch.cat([batch[0] for batch in resumed])
    clean = torch.cat([batch[1] for batch in resumed])
    assert torch.equal(noisy, torch.cat([batch[0] for batch in whole[5:]]))
    assert torch.equal(clean, torch.cat([batch[1] for batch in whole[5:]]))


class Stuck:
    """Batches of which the third and later do not come."""

    def __getitems__(self, counters: list[int]) -> list[int]:
        if counters[0] >= 2:
            time.sleep(600)
        return counters


def test_a_reader_that_leaves_off_is_not_kept_by_workers_that_wait_for_storage():
    loader = training_loader(Stuck(), MicroBatchSampler(0, 9, 1, 1), 2)
    batches = iter(loader)
    assert [next(batches), next(batches)] == [[0], [1]]
    workers = multiprocessing.active_children()
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 20
    assert len(workers) >= 2
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


def test_workers_that_began_where_others_could_not_are_not_left(monkeypatch: pytest.MonkeyPatch):
    """Python would wait for them, which ignore its signal, when it ends."""
    started: list[multiprocessing.Process] = []
    start = multiprocessing.Process.start

    def start_two(process: multiprocessing.Process) -> None:
        if len(started) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_two)
    loader = training_loader(Stuck(), MicroBatchSampler(0, 9, 1, 1), 4)
    with pytest.raises(OSError, match="Too many open files"):
        next(iter(loader))
    assert len(started) == 2
    for worker in started:
        worker.join(5)
        assert not worker.is_alive()


def test_a_crop_is_the_named_part_of_its_clip(tiny_index: ShardIndex):
    clips = tiny_index.clips("train")
    dataset = pickle.loads(pickle.dumps(CropDataset(tiny_index.root, clips, 8_000, seed=0)))
    reader = ShardReader(tiny_index.root)
    for t in range(len(clips)):
        at = dataset.order[t]
        whole = reader.read_clip(clips[at.position])
        for crop, signal in zip(dataset[t], whole, strict=True):
            np.testing.assert_array_equal(crop.numpy(), signal[at.start : at.start + 8_000])


def test_a_clip_shorter_than_the_crop_is_padded_on_both_sides(tiny_index: ShardIndex):
    clips = tiny_index.clips("train")
    longest = max(clip.num_samples for clip in clips)
    dataset = CropDataset(tiny_index.root, clips, longest + 1_001, seed=0)
    noisy, _ = dataset[0]
    clip = clips[dataset.order[0].position]
    missing = longest + 1_001 - clip.num_samples
    before = missing // 2
    assert noisy.shape == (longest + 1_001,)
    assert not noisy[:before].any()
    assert not noisy[before + clip.num_samples :].any()
    np.testing.assert_array_equal(
        noisy[before : before + clip.num_samples].numpy(), ShardReader(tiny_index.root).read_clip(clip)[0]
    )


def test_samples_become_float_with_full_scale_one():
    samples = torch.tensor([-32768, 0, 16384], dtype=torch.int16)
    assert to_float(samples).tolist() == [-1.0, 0.0, 0.5]
