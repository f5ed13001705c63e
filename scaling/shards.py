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
   first clean sample are, and the CRC-32 of each:

    {"id": "p228_001", "speaker": "p228", "noise": "babble", "snr_db": 10.0, "num_samples": 31367,
     "shard": "train-00000.tar", "noisy_offset": 556, "clean_offset": 64044,
     "noisy_crc32": "5b0c7d1e", "clean_crc32": "90ad3f22"}

3. In the tar a clip is three members: `p228_001.noisy.wav` and `p228_001.clean.wav`, 16 kHz
   mono 16-bit PCM behind the canonical header of 44 bytes, and `p228_001.json`. Stock
   WebDataset reads them. `ShardReader` needs no tar and no decoder: sample k of a clip is the
   two bytes at offset + 2 k, so a crop is one positioned read for noisy and one for clean.

`scaling.shard_writer` makes such a folder, `ShardIndex` loads and checks it, `ShardReader` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError

FORMAT_VERSION = 1
SAMPLE_RATE = 16_000  # Hz
SAMPLE_BYTES = 2
WAV_HEADER_BYTES = 44

Samples = NDArray[np.int16]  # [num_samples], 16 kHz


class DamagedClipError(UserError):
    """A clip whose bytes are not the ones its index promises."""

    def __init__(self, message: str, clip_id: str = "", shard: str = "") -> None:
        super().__init__(message)
        self.clip_id = clip_id
        self.shard = shard


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


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar as the index promises it."""

    name: str
    num_bytes: int
    sha256: str
    num_clips: int


# --- the index -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds. `source` is the fingerprint of what it was made from."""

    root: Path
    corpus: str
    source: str
    index_hash: str
    shards: dict[str, list[Shard]]
    rows: dict[str, list[Clip]]

    @classmethod
    def load(cls, root: Path) -> ShardIndex:
        """Read and check the index of a folder; the shards' sizes are checked, their content is not.

        UserError for an index that is missing, damaged or of another version, and for a shard
        that is missing or has another size than the index says.
        """
        try:
            content = (root / "index.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if root.exists():
                raise _bad_index(root, "index.json is missing") from None
            raise UserError(f"no shards at {root}: make them with python -m scaling.prepare") from None
        try:
            summary = json.loads(content)
            version = summary["format"]
            if version != FORMAT_VERSION:
                raise _bad_index(root, f"its format is {version!r}, expected {FORMAT_VERSION}")
            shards = {split: [Shard(**row) for row in part["shards"]] for split, part in summary["splits"].items()}
            rows = {split: _load_rows(root, split, part["sha256"]) for split, part in summary["splits"].items()}
            index_hash = hashlib.sha256(content).hexdigest()
            index = cls(root, summary["corpus"], summary["source"], index_hash, shards, rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_index(root, f"index.json is damaged ({type(error).__name__}: {error})") from None
        index._check_shards()
        return index

    def clips(self, split: str) -> list[Clip]:
        """The clips of a split, in the order in which they lie in its shards."""
        return list(self._rows(split))

    def num_samples(self, split: str) -> int:
        """The length of a split's clips together."""
        return sum(clip.num_samples for clip in self._rows(split))

    def hours(self, split: str) -> float:
        """The length of a split's clips together, in hours."""
        return self.num_samples(split) / SAMPLE_RATE / 3600

    def shard_paths(self, split: str) -> list[Path]:
        """The tars of a split, in order."""
        self._rows(split)
        return [self.root / shard.name for shard in self.shards[split]]

    def _rows(self, split: str) -> list[Clip]:
        if split not in self.rows:
            raise UserError(f"shards at {self.root} have no split {split!r}: name one of {', '.join(self.rows)}")
        return self.rows[split]

    def _check_shards(self) -> None:
        for shard in (shard for shards in self.shards.values() for shard in shards):
            try:
                num_bytes = (self.root / shard.name).stat().st_size
            except FileNotFoundError:
                raise _bad_index(self.root, f"shard {shard.name} is missing") from None
            if num_bytes != shard.num_bytes:
                raise _bad_index(self.root, f"shard {shard.name} has {num_bytes} bytes, expected {shard.num_bytes}")


def _load_rows(root: Path, split: str, sha256: str) -> list[Clip]:
    try:
        content = (root / f"{split}.jsonl").read_bytes()
    except FileNotFoundError:
        raise _bad_index(root, f"{split}.jsonl is missing") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _bad_index(root, f"{split}.jsonl has SHA-256 {found[:12]}…, expected {sha256[:12]}…")
    return [Clip(**row) for row in json.loads(b"[" + b",".join(content.splitlines()) + b"]")]


def _bad_index(root: Path, what: str) -> UserError:
    return UserError(f"shards at {root}: {what}; delete {root} and run python -m scaling.prepare again")


# --- reading -------------------------------------------------------------------------------


class ShardReader:
    """Reads clips and crops of a folder of shards, without decoding.

    A shard is opened at its first use and stays open. Reads are positioned, so threads and
    forked processes may share a reader; a pickled copy opens the shards for itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}

    def read_crop(self, clip: Clip, start: int, num_samples: int) -> tuple[Samples, Samples]:
        """Samples start to start + num_samples of noisy and clean, each [num_samples].

        A crop is not checked against the clip's checksum. ValueError for a crop that reaches
        outside the clip, DamagedClipError for a shard that ends before it.
        """
        if start < 0 or num_samples < 0 or start + num_samples > clip.num_samples:
            raise ValueError(f"crop {start}+{num_samples} reaches outside {clip.id} of {clip.num_samples} samples")
        descriptor = self._descriptors.get(clip.shard)
        if descriptor is None:
            descriptor = self._open(clip)
        skipped = start * SAMPLE_BYTES
        noisy = np.empty(num_samples, dtype="<i2")
        clean = np.empty(num_samples, dtype="<i2")
        for samples, offset in ((noisy, clip.noisy_offset), (clean, clip.clean_offset)):
            num_bytes = os.preadv(descriptor, [samples.data], offset + skipped)
            if num_bytes != num_samples * SAMPLE_BYTES:
                raise self._damaged(clip, f"its shard ends {num_samples * SAMPLE_BYTES - num_bytes} bytes too early")
        return noisy, clean

    def read_clip(self, clip: Clip, verify: bool = True) -> tuple[Samples, Samples]:
        """All of noisy and clean, each [clip.num_samples]; DamagedClipError where a checksum is not the index's."""
        noisy, clean = self.read_crop(clip, 0, clip.num_samples)
        if verify:
            for name, samples, expected in (("noisy", noisy, clip.noisy_crc32), ("clean", clean, clip.clean_crc32)):
                found = crc32(samples)
                if found != expected:
                    raise self._damaged(clip, f"its {name} samples have CRC-32 {found}, expected {expected}")
        return noisy, clean

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_descriptors": {}}

    def __del__(self) -> None:
        self.close()

    def _open(self, clip: Clip) -> int:
        try:
            opened = os.open(self.root / clip.shard, os.O_RDONLY)
        except FileNotFoundError:
            raise self._damaged(clip, "its shard is missing") from None
        descriptor = self._descriptors.setdefault(clip.shard, opened)
        if descriptor != opened:  # another thread was first
            os.close(opened)
        return descriptor

    def _damaged(self, clip: Clip, what: str) -> DamagedClipError:
        remedy = f"delete {self.root} and run python -m scaling.prepare again"
        return DamagedClipError(f"clip {clip.id} in {self.root / clip.shard}: {what}; {remedy}", clip.id, clip.shard)


def crc32(samples: Samples) -> str:
    """The checksum of a recording: CRC-32 of its bytes, little-endian, in 8 hex digits."""
    return f"{zlib.crc32(np.ascontiguousarray(samples, dtype='<i2').data):08x}"
