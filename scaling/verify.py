"""Checks shards down to the last byte, and names every clip that damage touches.

    python -m scaling.verify data=vbd [data.shards=DIR or URL]

A shard whose SHA-256 is the index's is whole. Of another one the index says what every byte
should be: where each clip's recordings lie and their checksums, and with them the tar headers,
wav headers, JSON and padding, as `scaling.shard_writer` writes them. So damage is told apart:

    samples     training replaces the clip, validation and test refuse it
    container   headers, JSON, padding: training does not use them, stock WebDataset does

Exit status: 0 all whole, 1 something is damaged, 2 a mistake in the input.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from scaling.cli import load_config
from scaling.command import run_main
from scaling.config import RunConfig
from scaling.shard_reader import block_checksums
from scaling.shard_writer import TAR_END, clip_members
from scaling.shards import Clip, ShardIndex, open_shard, remedy


@dataclass(frozen=True)
class Finding:
    """Damage in a shard: of a clip's samples or container, or (without a clip) of the tar's end."""

    shard: str
    clip_id: str | None
    part: str  # "noisy samples", "clean samples", "container" or "end"


def check_shard(index: ShardIndex, split: str, number: int) -> list[Finding]:
    """What is damaged in a shard of a split; nothing if its SHA-256 is the index's."""
    shard = index.shards[split][number]
    clips = [clip for clip in index.clips(split) if clip.shard == shard.name]
    try:
        descriptor = open_shard(index.root, shard.name)
    except FileNotFoundError:
        descriptor = os.open(os.devnull, os.O_RDONLY)  # as if all of it were cut off
    file = os.fdopen(descriptor, "rb")
    if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
        file.close()
        return []
    file.seek(0)
    return list(_findings(file, shard.name, shard.num_bytes, clips))


def _findings(file: BinaryIO, shard: str, num_bytes: int, clips: list[Clip]) -> Iterator[Finding]:
    end = 0
    with file:
        for clip in clips:
            silence = np.zeros(clip.num_samples, dtype="<i2")
            facts = clip.id, clip.speaker, clip.noise, clip.snr_db
            expected = b"".join(clip_members(*facts, silence, silence))
            begin, end = end, end + len(expected)
            found = bytearray(file.read(len(expected)))
            for part, offset, checksums in (
                ("noisy samples", clip.noisy_offset, clip.noisy_crc32),
                ("clean samples", clip.clean_offset, clip.clean_crc32),
            ):
                place = slice(offset - begin, offset - begin + 2 * clip.num_samples)
                samples = np.frombuffer(bytes(found[place][: len(found[place]) // 2 * 2]), dtype="<i2")
                if len(samples) < clip.num_samples or block_checksums(samples) != checksums:
                    yield Finding(shard, clip.id, part)
                found[place] = bytes(len(found[place]))
            if found != expected:
                yield Finding(shard, clip.id, "container")
        if file.read(num_bytes - end + 1) != TAR_END:
            yield Finding(shard, None, "end")


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
                print(f"{found.shard}: {'clip ' + found.clip_id if found.clip_id else 'tar'}: {found.part} damaged")
            if not findings:
                print(f"{shard.name}: whole, {shard.num_clips} clips")
    if num_damaged:
        print(f"{num_damaged} of the shards at {index.root} are damaged: {remedy(index.root)}")
    return 1 if num_damaged else 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
