"""Shards: the form in which a corpus is trained on.

A folder of shards, walked from the whole to a sample:

    ROOT/index.json            what the corpus holds; written last, so it says "complete"
    ROOT/train.jsonl           one row a clip of the split train, in the order of the shards
    ROOT/train-00000.tar       its shards: plain uncompressed WebDataset tars
    ROOT/train-00001.tar
    ROOT/validation.jsonl ...

1. `index.json` holds the format's version, the corpus, the fingerprint of the source it
   was made from and, for each split, the number of clips and hours, the SHA-256 of the
   split's rows, and name, size, SHA-256 and number of clips of every shard. It holds no
   time and no path: the same source gives the same bytes on every machine. The SHA-256 of
   these bytes, the index hash, therefore names the data down to the last sample.
2. A row of `train.jsonl` says of a clip who speaks, in which noise, at which SNR, how many
   samples it has, in which shard it lies, at which byte of the tar its first noisy and its
   first clean sample are, and the CRC-32 of every block of 8,192 samples of each, one after
   another, the last block as short as it is:

    {"id": "p228_001", "speaker": "p228", "noise": "babble", "snr_db": 10.0, "num_samples": 15367,
     "shard": "train-00000.tar", "noisy_offset": 556, "clean_offset": 32300,
     "noisy_crc32": "5b0c7d1ee7a90c44", "clean_crc32": "90ad3f22183bd0f6"}

3. In the tar a clip is three members: `p228_001.noisy.wav` and `p228_001.clean.wav`, 16 kHz
   mono 16-bit PCM behind the canonical header of 44 bytes, and `p228_001.json`. Stock
   WebDataset reads them. `ShardReader` needs no tar and no decoder: sample k of a clip is the
   two bytes at offset + 2 k, so a crop is one positioned read for noisy and one for clean, of
   the whole blocks that it touches, whose checksums are compared at every read.

What a read finds: any change of the samples it returns, but for one in 2^32 a block. What it
does not look at: headers, JSON and padding of the tar, which it does not use; `scaling.verify`
does. The rows' SHA-256 is compared when the index is loaded.

`scaling.shard_writer` makes such a folder, `ShardIndex` loads and checks it, `scaling.shard_reader`
reads it. The folder may be far away (`scaling.remote`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaling.errors import BadDataError, UserError
from scaling.remote import RemoteRoot, Root

FORMAT_VERSION = 2
SAMPLE_RATE = 16_000  # Hz
SAMPLE_BYTES = 2
WAV_HEADER_BYTES = 44
BLOCK_SAMPLES = 8_192  # behind one checksum: a crop of 2 s touches four or five blocks
BLOCK_BYTES = BLOCK_SAMPLES * SAMPLE_BYTES
CRC_DIGITS = 8

Samples = NDArray[np.int16]  # [num_samples], 16 kHz


@dataclass(frozen=True, slots=True)
class Clip:
    """A row of the index: where a pair of recordings is. Offsets are bytes in the tar."""

    id: str
    speaker: str
    noise: str | None
    snr_db: float | None
    num_samples: int
    shard: str
    noisy_offset: int
    clean_offset: int
    noisy_crc32: str
    clean_crc32: str

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / SAMPLE_RATE

    @property
    def end(self) -> int:
        """The byte of the tar behind the last sample."""
        return self.clean_offset + self.num_samples * SAMPLE_BYTES


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar as the index promises it."""

    name: str
    num_bytes: int
    sha256: str
    num_clips: int


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds. `source` is the fingerprint of what it was made from."""

    root: Root
    corpus: str
    source: str
    index_hash: str
    shards: dict[str, list[Shard]]
    rows: dict[str, list[Clip]]

    @classmethod
    def load(cls, root: Root) -> ShardIndex:
        """Read and check the index of a folder; of the shards nothing is looked at (see `check_sizes`).

        UserError for an index that is missing, damaged or of another version.
        """
        try:
            content = _read(root, "index.json")
        except (FileNotFoundError, NotADirectoryError):
            if isinstance(root, Path) and root.exists():
                raise _bad_index(root, "index.json is missing") from None
            how = "make them with python -m scaling.prepare"
            if isinstance(root, RemoteRoot):
                how += " in a folder and copy all its files there"
            raise UserError(
                f"no shards at {root}: {how}, or name where they are (data.shards=DIR; for scaling.evaluate shards=DIR)"
            ) from None
        try:
            summary = json.loads(content)
            version = summary["format"]
            if version != FORMAT_VERSION:
                raise _bad_index(root, f"its format is {version!r}, expected {FORMAT_VERSION}")
            shards = {split: [Shard(**row) for row in part["shards"]] for split, part in summary["splits"].items()}
            rows = {split: _load_rows(root, split, part["sha256"]) for split, part in summary["splits"].items()}
            index_hash = hashlib.sha256(content).hexdigest()
            if isinstance(root, RemoteRoot):
                promised = {shard.name: (shard.num_bytes, shard.sha256) for part in shards.values() for shard in part}
                root = root.of(promised)
            return cls(root, summary["corpus"], summary["source"], index_hash, shards, rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_index(root, f"index.json is damaged ({type(error).__name__}: {error})") from None

    @property
    def folder(self) -> Path:
        """A folder of this machine for what is kept beside the shards."""
        return self.root if isinstance(self.root, Path) else self.root.cache

    def clips(self, split: str) -> list[Clip]:
        """The clips of a split, in the order in which they lie in its shards."""
        return list(self._rows(split))

    def num_samples(self, split: str) -> int:
        """The length of a split's clips together."""
        return sum(clip.num_samples for clip in self._rows(split))

    def hours(self, split: str) -> float:
        """The length of a split's clips together, in hours."""
        return self.num_samples(split) / SAMPLE_RATE / 3600

    def check_sizes(self) -> None:
        """BadDataError for the first shard of this machine that is missing or has another size than the index says."""
        for shard in (shard for shards in self.shards.values() for shard in shards):
            num_bytes = self._size(shard.name)
            if num_bytes is None:
                raise _bad_index(self.root, f"shard {shard.name} is missing")
            if num_bytes != shard.num_bytes:
                raise _bad_index(self.root, f"shard {shard.name} has {num_bytes} bytes, expected {shard.num_bytes}")

    def cut_off(self, clips: Sequence[Clip]) -> list[Clip]:
        """Those of the clips that reach beyond the end of their shard, by the sizes of this machine's files."""
        if isinstance(self.root, RemoteRoot):
            return []  # a shard's size is seen when it is fetched
        sizes = {name: self._size(name) or 0 for name in {clip.shard for clip in clips}}
        return [clip for clip in clips if clip.end > sizes[clip.shard]]

    def _size(self, shard: str) -> int | None:
        try:
            return (self.root / shard).stat().st_size if isinstance(self.root, Path) else None
        except FileNotFoundError:
            return None

    def _rows(self, split: str) -> list[Clip]:
        if split not in self.rows:
            raise UserError(f"shards at {self.root} have no split {split!r}: name one of {', '.join(self.rows)}")
        return self.rows[split]


def _load_rows(root: Root, split: str, sha256: str) -> list[Clip]:
    try:
        content = _read(root, f"{split}.jsonl")
    except FileNotFoundError:
        raise _bad_index(root, f"{split}.jsonl is missing") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _bad_index(root, f"{split}.jsonl has SHA-256 {found[:12]}…, expected {sha256[:12]}…")
    return [Clip(**row) for row in json.loads(b"[" + b",".join(content.splitlines()) + b"]")]


def _read(root: Root, name: str) -> bytes:
    return root.read(name) if isinstance(root, RemoteRoot) else (root / name).read_bytes()


def remedy(root: Root) -> str:
    """What makes damaged shards whole; preparing them again where they are would find them of the right sizes."""
    if isinstance(root, RemoteRoot):
        return (
            "put there what python -m scaling.prepare makes of the same source: what is damaged in "
            f"{root.cache} is then fetched anew"
        )
    return f"delete {root} and run python -m scaling.prepare again"


def open_shard(root: Root, shard: str) -> int:
    """A descriptor of a shard, fetched first if it is far away; FileNotFoundError if there is none."""
    return root.open(shard) if isinstance(root, RemoteRoot) else os.open(root / shard, os.O_RDONLY)


def _bad_index(root: Root, what: str) -> BadDataError:
    return BadDataError(f"shards at {root}: {what}; {remedy(root)}")
