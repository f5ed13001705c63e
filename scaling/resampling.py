"""Brings recordings to the form of the shards: 16 kHz, 16 bits, in parallel and always alike.

Samples at 16 kHz and 16 bits pass through unchanged. 48 kHz is resampled by soxr at its very
high quality and in double precision: sums that one processor takes in another order than the
next differ by far less than a rounding step of 16 bits, so the bytes are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from scaling.corpus.vbd import Utterance
from scaling.corpus.wav import WavHeader, WavSource
from scaling.errors import UserError
from scaling.pool import spawned_pool
from scaling.shards import SAMPLE_RATE, Samples

SOURCE_RATES = (48_000, 16_000)  # Hz
BATCH_UTTERANCES = 16  # a task of a worker process: large against its cost, small against memory
BATCHES_AHEAD = 4  # for each worker: enough that none waits for the writer


@dataclass(frozen=True, slots=True)
class ResampledPair:
    """A resampled utterance: noisy and clean, each [num_samples] at 16 kHz."""

    noisy: Samples
    clean: Samples
    num_clipped: int


def resampled(
    utterances: Sequence[Utterance], num_workers: int
) -> Generator[tuple[Utterance, ResampledPair], None, None]:
    """Each utterance with its resampled pair, in the order given, from `num_workers` processes.

    Close the generator where it is left early: that ends the processes. They also end by
    themselves if this process is killed. UserError for a file that cannot be decoded.
    """
    batches = [utterances[first : first + BATCH_UTTERANCES] for first in range(0, len(utterances), BATCH_UTTERANCES)]
    if num_workers == 1:
        for batch in batches:
            yield from zip(batch, resample(batch), strict=True)
        return
    pending: deque[tuple[Sequence[Utterance], Future[list[ResampledPair]]]] = deque()
    pool = spawned_pool(min(num_workers, len(batches)))
    try:
        for batch in batches:
            pending.append((batch, pool.submit(resample, batch)))
            if len(pending) > BATCHES_AHEAD * num_workers:
                done, pairs = pending.popleft()
                yield from zip(done, pairs.result(), strict=True)
        for done, pairs in pending:
            yield from zip(done, pairs.result(), strict=True)
    except BrokenProcessPool:
        raise UserError(
            f"one of {num_workers} worker processes was killed, perhaps for lack of memory: free some and prepare again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def resample(utterances: Sequence[Utterance]) -> list[ResampledPair]:
    """Decode utterances and bring them to 16 kHz and 16 bits; UserError for a file that cannot be decoded."""
    return [_resample(utterance) for utterance in utterances]


def num_samples_out(header: WavHeader) -> int:
    """Samples at 16 kHz that a file resamples to: soxr rounds the length, halves up."""
    return (2 * header.num_frames * SAMPLE_RATE + header.sample_rate) // (2 * header.sample_rate)


def _resample(utterance: Utterance) -> ResampledPair:
    (clean, clipped_clean), (noisy, clipped_noisy) = (_load(source) for source in (utterance.clean, utterance.noisy))
    return ResampledPair(noisy, clean, clipped_clean + clipped_noisy)


def _load(source: WavSource) -> tuple[Samples, int]:
    """A recording at 16 kHz and 16 bits, and how many of its samples had to be clipped."""
    header = source.read_header()
    samples = source.read_samples()
    if samples.shape != (header.num_frames,):
        raise UserError(
            f"{source.name} decodes to {samples.size} samples, its header says {header.num_frames}: copy it again"
        )
    if not np.isfinite(samples).all():  # a wav of floats can hold them
        raise UserError(f"{source.name} holds samples that are not numbers: remove it and its twin")
    if header.sample_rate != SAMPLE_RATE:
        samples = soxr.resample(samples, header.sample_rate, SAMPLE_RATE, quality="VHQ")
    return quantize(samples)


def quantize(samples: NDArray[np.float64]) -> tuple[Samples, int]:
    """Round samples in [-1, 1) to 16 bits; also the number of those that lay outside and were clipped."""
    scaled = np.rint(samples * 32768)
    clipped = np.clip(scaled, -32768, 32767)
    return clipped.astype(np.int16), int(np.count_nonzero(clipped != scaled))
