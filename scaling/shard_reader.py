"""Reads crops of shards (the format: `scaling.shards`), every one checked against its blocks' checksums."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from isal import isal_zlib

from scaling.errors import BadDataError, UnreachableError
from scaling.remote import RemoteRoot, Root
from scaling.shards import BLOCK_BYTES, CRC_DIGITS, SAMPLE_BYTES, Clip, Samples, open_shard, remedy

MAX_RETIRED = 64
READ_PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and fourth attempt to read
OF_THE_SHARD = (errno.EIO, errno.ENOENT)  # what a file system says of bytes that are lost, rather than of itself


class DamagedClipError(BadDataError):
    """A clip that four attempts did not read as its index promises it."""

    def __init__(self, message: str, clip_id: str = "", shard: str = "", what: str = "") -> None:
        super().__init__(message)
        self.clip_id = clip_id
        self.shard = shard
        self.what = what


class _Damage(Exception):
    """What an attempt to read a clip found wrong."""


class ShardReader:
    """Reads clips and crops of a folder of shards, without decoding.

    A shard is opened at its first use and stays open. Reads are positioned, so threads and
    forked processes may share a reader; a pickled copy opens the shards for itself. What a
    read finds wrong is tried again three times, from a shard opened anew and past the page
    cache, since a network file system may fail for a moment.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self.num_retries = 0  # reads that were tried again
        self._descriptors: dict[str, int] = {}
        self._retired: list[int] = []  # descriptors that another thread may still be reading

    def read_crop(self, clip: Clip, start: int, num_samples: int) -> tuple[Samples, Samples]:
        """Samples start to start + num_samples of noisy and clean, each [num_samples]; see `read_crop_into`."""
        noisy = np.empty(num_samples, dtype="<i2")
        clean = np.empty(num_samples, dtype="<i2")
        self.read_crop_into(clip, start, noisy, clean)
        return noisy, clean

    def read_clip(self, clip: Clip) -> tuple[Samples, Samples]:
        """All of noisy and clean, each [clip.num_samples]; see `read_crop_into`."""
        return self.read_crop(clip, 0, clip.num_samples)

    def read_crop_into(self, clip: Clip, start: int, noisy: Samples, clean: Samples) -> None:
        """Fill noisy and clean, of one length, with the samples of a clip from `start` on.

        ValueError for a crop that reaches outside the clip, DamagedClipError where the bytes
        cannot be read (EIO, no such file) or a block that the crop touches does not have the
        index's checksum, UnreachableError where the file system refuses otherwise.
        """
        stop = start + len(noisy)
        if start < 0 or stop > clip.num_samples:
            raise ValueError(f"crop {start}+{len(noisy)} reaches outside {clip.id} of {clip.num_samples} samples")
        for pause in (*READ_PAUSES, None):
            try:
                descriptor = self._descriptors.get(clip.shard)
                if descriptor is None:
                    descriptor = self._open(clip.shard)
                _read_blocks(descriptor, "noisy", clip.noisy_offset, clip.noisy_crc32, clip.num_samples, start, noisy)
                _read_blocks(descriptor, "clean", clip.clean_offset, clip.clean_crc32, clip.num_samples, start, clean)
                return
            except (OSError, _Damage) as error:
                what = "its shard is missing" if isinstance(error, FileNotFoundError) else str(error)
                if pause is None and isinstance(error, OSError) and error.errno not in OF_THE_SHARD:
                    # says nothing of the data: the run should stop and go on from here when the file system is back
                    raise unreachable(self.root, clip.shard, error) from None
                if pause is None:
                    message = f"clip {clip.id} in {self.root}/{clip.shard}: {what}; {remedy(self.root)}"
                    raise DamagedClipError(message, clip.id, clip.shard, what) from None
                self.num_retries += 1
                if isinstance(error, OSError):  # a file system that fails now may work in a moment
                    time.sleep(pause)
                self._forget(clip.shard, wrong_bytes=isinstance(error, _Damage))

    def prefetch(self, shards: Sequence[str]) -> None:
        """Let go of all shards but these and, if they are far away, fetch them in the background, in this order."""
        if isinstance(self.root, RemoteRoot):
            for shard in set(self._descriptors) - set(shards):
                os.close(self._descriptors.pop(shard))
            self.root.prefetch(shards)

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        while self._retired:
            os.close(self._retired.pop())

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "num_retries": 0, "_descriptors": {}, "_retired": []}

    def __del__(self) -> None:
        self.close()

    def _open(self, shard: str) -> int:
        opened = open_shard(self.root, shard)
        descriptor = self._descriptors.setdefault(shard, opened)
        if descriptor != opened:  # another thread was first
            os.close(opened)
        return descriptor

    def _forget(self, shard: str, wrong_bytes: bool) -> None:
        """Make the next read of a shard a fresh one."""
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._retire(shard)
        if wrong_bytes and isinstance(self.root, RemoteRoot):
            self.root.discard(shard)

    def _retire(self, shard: str) -> None:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            self._retired.append(descriptor)
        while len(self._retired) > MAX_RETIRED:
            os.close(self._retired.pop(0))


def unreachable(root: Root, shard: str, error: OSError) -> UnreachableError:
    """The error of a shard whose file system failed at every attempt, which says nothing of the data."""
    return UnreachableError(
        f"shard {root}/{shard} cannot be read ({error}), in {len(READ_PAUSES) + 1} attempts: "
        "check the file system, then run the same command again"
    )


def _read_blocks(
    descriptor: int, name: str, offset: int, checksums: str, clip_samples: int, start: int, samples: Samples
) -> None:
    """Fill `samples` from `start` on, and check the whole blocks around them; _Damage if they are not as promised."""
    content = samples.data.cast("B")
    begin, end = start * SAMPLE_BYTES, start * SAMPLE_BYTES + len(content)
    first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
    if begin == end:
        return
    head = bytearray(begin - first * BLOCK_BYTES)  # of the first block, what is before the samples
    tail = bytearray(min(last * BLOCK_BYTES, clip_samples * SAMPLE_BYTES) - end)  # of the last, what is behind them
    num_bytes = os.preadv(descriptor, [head, content, tail], offset + first * BLOCK_BYTES)
    missing = len(head) + len(content) + len(tail) - num_bytes
    if missing:
        raise _Damage(f"its shard ends {missing} bytes too early")
    found = _checksums(content, head, tail)
    expected = checksums[first * CRC_DIGITS : last * CRC_DIGITS]
    if found != expected:
        raise _Damage(f"its {name} samples have CRC-32 {found}, expected {expected}, in blocks {first} to {last - 1}")


def _checksums(content: memoryview, head: bytes | bytearray = b"", tail: bytes | bytearray = b"") -> str:
    """CRC-32 of each block of head, content and tail, which follow one another; none but the last is short."""
    crc = isal_zlib.crc32  # ten times as fast as zlib's, the same sum
    found, value, at = [], crc(head), 0
    for edge in range(BLOCK_BYTES - len(head), len(content), BLOCK_BYTES):
        found.append(crc(content[at:edge], value))
        value, at = 0, edge
    found.append(crc(tail, crc(content[at:], value)))
    return struct.pack(f">{len(found)}I", *found).hex()


def block_checksums(samples: Samples) -> str:
    """The checksums of a recording: CRC-32 of each block of its bytes, little-endian, each in 8 hex digits."""
    return _checksums(np.ascontiguousarray(samples, dtype="<i2").data.cast("B"))
