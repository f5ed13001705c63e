"""Budgets of data: which clips a run of so many hours trains on.

All budgets of a corpus are prefixes of one order (1 h in 2 h in 4 h), so a larger budget adds
clips and takes none away. The order is seeded and balanced over speakers: at every point the
next clip is one of the speaker with the least audio so far.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from scaling.errors import UserError
from scaling.shards import SAMPLE_RATE, Clip


def select_hours(clips: Sequence[Clip], hours: float | None, order_seed: int) -> list[Clip]:
    """The clips of a budget, in the order in which budgets grow; all of them if `hours` is None.

    The shortest prefix that holds at least `hours`; UserError if there is less audio than that.
    """
    ordered = balanced_order(clips, order_seed)
    if hours is None:
        return ordered
    needed = round(hours * 3600 * SAMPLE_RATE)
    total = 0
    for count, clip in enumerate(ordered, start=1):
        total += clip.num_samples
        if total >= needed:
            return ordered[:count]
    raise UserError(
        f"data.hours = {hours:g} needs {hours:g} h of training clips; the shards hold "
        f"{total / SAMPLE_RATE / 3600:.6g} h: lower data.hours or prepare more data"
    )


def balanced_order(clips: Sequence[Clip], order_seed: int) -> list[Clip]:
    """All clips, seeded, always going on with the speaker who has the least audio so far."""
    by_speaker: dict[str, list[Clip]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip.id):
        by_speaker[clip.speaker].append(clip)
    rng = np.random.Generator(np.random.Philox(order_seed))
    speakers = [str(speaker) for speaker in rng.permutation(sorted(by_speaker))]
    queues = {
        speaker: [by_speaker[speaker][i] for i in rng.permutation(len(by_speaker[speaker]))] for speaker in speakers
    }
    heap = [(0, rank, speaker) for rank, speaker in enumerate(speakers)]  # samples so far, tie-break, speaker
    ordered = []
    while heap:
        samples, rank, speaker = heapq.heappop(heap)
        clip = queues[speaker].pop()
        ordered.append(clip)
        if queues[speaker]:
            heapq.heappush(heap, (samples + clip.num_samples, rank, speaker))
    return ordered
