"""Budgets are nested prefixes of one speaker-balanced order, and say so when the data is too small."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from scaling.budget import balanced_order, select_hours
from scaling.errors import UserError
from scaling.shards import Clip


def corpus(num_speakers: int = 5, num_clips: int = 400, seed: int = 0) -> list[Clip]:
    rng = random.Random(seed)
    return [
        Clip(
            f"p{k % num_speakers}_{k:03d}",
            f"p{k % num_speakers}",
            None,
            None,
            rng.randint(16_000, 96_000),
            "",
            0,
            0,
            "",
            "",
        )
        for k in range(num_clips)
    ]


def test_each_budget_is_the_beginning_of_the_next():
    clips = corpus()
    budgets = [[clip.id for clip in select_hours(clips, hours, 0)] for hours in (0.05, 0.1, 0.2, None)]
    for smaller, larger in itertools.pairwise(budgets):
        assert len(smaller) < len(larger)
        assert larger[: len(smaller)] == smaller
    assert sorted(budgets[-1]) == sorted(clip.id for clip in clips)


def test_a_budget_holds_its_hours_and_not_a_clip_more():
    clips = select_hours(corpus(), 0.1, 0)
    seconds = sum(clip.duration for clip in clips)
    assert 360 <= seconds < 360 + 6
    assert seconds - clips[-1].duration < 360


def test_speakers_share_every_budget_evenly():
    for hours in (0.02, 0.1, 0.2):
        seconds = Counter()
        for clip in select_hours(corpus(), hours, 0):
            seconds[clip.speaker] += clip.duration
        assert len(seconds) == 5
        assert max(seconds.values()) - min(seconds.values()) <= 6  # the longest clip


def test_the_order_is_the_seeds_and_not_the_listings():
    clips = corpus()
    shuffled = random.Random(1).sample(clips, len(clips))
    assert balanced_order(clips, 0) == balanced_order(shuffled, 0)
    assert balanced_order(clips, 0) != balanced_order(clips, 1)


def test_a_budget_larger_than_the_data_is_refused_with_both_figures():
    with pytest.raises(UserError, match=r"data.hours = 1000 needs 1000 h .* hold 0\.\d+ h: lower data.hours"):
        select_hours(corpus(), 1000, 0)
