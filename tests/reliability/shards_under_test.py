"""Shards for the tests of damage and of the stream: short recordings, several shards, written by the project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling.shard_writer import ShardWriter
from scaling.shards import ShardIndex


def write_shards(root: Path, lengths: Sequence[int], shard_bytes: int) -> ShardIndex:
    """Clips c0000, c0001, ... of these lengths, of white noise, so that no crop equals another."""
    with ShardWriter(root, "noise", "a source", shard_bytes) as writer:
        for number, num_samples in enumerate(lengths):
            rng = np.random.default_rng(number)
            noisy, clean = rng.integers(-3000, 3000, (2, num_samples)).astype(np.int16)
            writer.add("train", f"c{number:04d}", f"p{number % 3}", "bus", 5.0, noisy, clean)
        return writer.commit()
