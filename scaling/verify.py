"""Checks shards down to the last byte, and names every clip that damage touches.

    python -m scaling.verify data=vbd [data.shards=DIR or URL]

A shard whose SHA-256 is the index's is whole. Of another one the index says what every byte
should be: where each clip's recordings lie and their checksums, and with them the tar headers,
wav headers, JSON and padding, as `scaling.shard_writer` writes them. So damage is told apart:

    samples     training replaces the clip, validation and test refuse it
    container   headers, JSON, padding: training does not use them, stock WebDataset does

What cannot be read (EIO), in four attempts, is damage too, as in training. A copy in the cache that is not whole
is fetched once more first: damage is its source's.

Exit status: 0 all whole, 1 something is damaged, 2 a mistake in the input.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

import numpy as np

from scaling.cli import load_config
from scaling.command import run_main
from scaling.config import RunConfig
from scaling.remote import RemoteRoot
from scaling.shard_reader import OF_THE_SHARD, READ_PAUSES, block_checksums, unreachable
from scaling.shard_writer import TAR_END, clip_members
from scaling.shards import Clip, Shard, ShardIndex, open_shard, remedy


@dataclass(frozen=True)
class Finding:
    """Damage in a shard: of a clip's samples or container, or (without a clip) of the tar's end."""

    shard: str
    clip_id: str | None
    part: str  # "noisy samples", "clean samples", "container" or "end"; "bytes" where they cannot be read
    why: str = ""  # the file system's word for what it does not read

    def __str__(self) -> str:
        where = f"clip {self.clip_id}" if self.clip_id else "tar"
        return f"{self.shard}: {where}: {self.part} damaged{f' ({self.why})' if self.why else ''}"


def check_shard(index: ShardIndex, split: str, number: int) -> list[Finding]:
    """What is damaged in a shard of a split; nothing if its SHA-256 is the index's.

    UnreachableError where the file system refuses to read it otherwise than by EIO.
    """
    shard = index.shards[split][number]
    clips = [clip for clip in index.clips(split) if clip.shard == shard.name]
    for pause in (*READ_PAUSES, None):
        try:
            findings = _check(index, shard, clips)
            if pause is None or not any(found.why for found in findings):
                return findings
        except OSError as error:
            if pause is None:
                raise unreachable(index.root, shard.name, error) from None
        time.sleep(pause)
    raise AssertionError


def _check(index: ShardIndex, shard: Shard, clips: list[Clip]) -> list[Finding]:
    """One attempt at a shard; a copy in the cache that is not whole is given up and fetched anew first."""
    for is_fetched_anew in (False, True):
        try:
            descriptor = open_shard(index.root, shard.name)
        except FileNotFoundError:
            descriptor = os.open(os.devnull, os.O_RDONLY)  # as if all of it were cut off
        with os.fdopen(descriptor, "rb") as file:
            if _is_whole(file, shard):
                return []
            has_copy = isinstance(index.root, RemoteRoot) and not is_fetched_anew and index.root.discard(shard.name)
            if not has_copy:
                return list(_findings(file, shard, clips))
    raise AssertionError


def _is_whole(file: BufferedReader, shard: Shard) -> bool:
    """Whether all of a shard can be read and has the index's SHA-256."""
    try:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError as error:
        if error.errno in OF_THE_SHARD:
            return False
        raise


def _findings(file: BufferedReader, shard: Shard, clips: list[Clip]) -> Iterator[Finding]:
    end = 0
    for clip in clips:
        silence = np.zeros(clip.num_samples, dtype="<i2")
        facts = clip.id, clip.speaker, clip.noise, clip.snr_db
        expected = b"".join(clip_members(*facts, silence, silence))
        begin, end = end, end + len(expected)
        found, why = _read(file, begin, len(expected))
        if why:
            yield Finding(shard.name, clip.id, "bytes", why)
            continue
        for part, offset, checksums in (
            ("noisy samples", clip.noisy_offset, clip.noisy_crc32),
            ("clean samples", clip.clean_offset, clip.clean_crc32),
        ):
            place = slice(offset - begin, offset - begin + 2 * clip.num_samples)
            samples = np.frombuffer(bytes(found[place][: len(found[place]) // 2 * 2]), dtype="<i2")
            if len(samples) < clip.num_samples or block_checksums(samples) != checksums:
                yield Finding(shard.name, clip.id, part)
            found[place] = bytes(len(found[place]))
        if found != expected:
            yield Finding(shard.name, clip.id, "container")
    found, why = _read(file, end, shard.num_bytes - end + 1)
    if found != TAR_END:
        yield Finding(shard.name, None, "end", why)


def _read(file: BufferedReader, begin: int, num_bytes: int) -> tuple[bytearray, str]:
    """Bytes of a shard from `begin` on, and the file system's word where they are lost."""
    try:
        file.seek(begin)
        return bytearray(file.read(num_bytes)), ""
    except OSError as error:
        if error.errno in OF_THE_SHARD:
            return bytearray(), str(error.strerror)
        raise


# --- command -------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    data = load_config(RunConfig, "run", words).data
    index = ShardIndex.load(data.shard_root)
    num_damaged = 0
    for split, shards in index.shards.items():
        for number, shard in enumerate(shards):
            findings = check_shard(index, split, number)
            num_damaged += bool(findings)
            for found in findings:
                print(found)
            if not findings:
                print(f"{shard.name}: whole, {shard.num_clips} clips")
    if num_damaged:
        print(f"{num_damaged} of the shards at {index.root} are damaged: {remedy(index.root)}")
    return 1 if num_damaged else 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
