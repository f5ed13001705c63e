"""Shards in an object store, the store as a process of its own, and processes that read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from scaling.config import DataConfig
from scaling.remote import RemoteRoot
from scaling.shards import ShardIndex
from scaling.stream import CropDataset, MicroBatchSampler, training_loader

NUM_CLIPS, CROP = 48, 4_000

Upload = Callable[[], str]


class Store:
    """The object store of `object_store.py`, in a process of its own."""

    def __init__(self, address: str) -> None:
        self.address = address

    def plan_faults(self, *faults: str | float) -> None:
        request = urllib.request.Request(f"{self.address}/-faults", json.dumps(faults).encode(), method="POST")
        urllib.request.urlopen(request).close()

    def downloads(self) -> Counter[str]:
        with urllib.request.urlopen(f"{self.address}/-log") as answer:
            return Counter(json.load(answer))


def stream(
    index: ShardIndex, num_workers: int = 0, block_shards: int | None = None, epochs: int = 1, seed: int = 5
) -> list[bytes]:
    """The crops of an epoch or more; none may be replaced."""
    dataset = CropDataset(index.root, index.clips("train"), CROP, seed, block_shards)
    crops = []
    for batch in training_loader(dataset, MicroBatchSampler(0, 6 * epochs, 8, 8), num_workers):
        assert not batch.replaced
        crops += [noisy.tobytes() + clean.tobytes() for noisy, clean in zip(*map(rows, batch[:2]), strict=True)]
    return crops


def rows(part) -> list:
    return list(part.numpy())


def remote(url: str, cache: Path, gigabytes: float = 1.0) -> RemoteRoot:
    return DataConfig("noise", url, cache=str(cache), cache_gb=gigabytes).shard_root


READ_EPOCH = """
import hashlib, sys
import scaling.remote
from pathlib import Path
from scaling.config import DataConfig
from scaling.shards import ShardIndex
from tests.reliability.shards_in_store import stream
url, cache, gigabytes, block_shards, seed = sys.argv[1:]
index = ShardIndex.load(DataConfig("noise", url, cache=cache, cache_gb=float(gigabytes)).shard_root)
print(hashlib.sha256(b"".join(stream(index, block_shards=int(block_shards) or None, seed=int(seed)))).hexdigest())
"""


def reading(
    url: str, cache: Path, gigabytes: float = 1.0, block_shards: int = 0, seed: int = 5
) -> subprocess.Popen[str]:
    """A process of its own that reads an epoch and prints its hash."""
    root = Path(__file__).parents[2]
    numbers = map(str, (gigabytes, block_shards, seed))
    words = [sys.executable, "-c", READ_EPOCH, url, str(cache), *numbers]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
