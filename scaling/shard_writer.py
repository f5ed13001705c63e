"""Writes shards: the tars, rows and index whose format `scaling.shards` walks.

Nothing but the clips and their order decides the bytes that are written: members carry no
owner and no time, and the index is committed last, by a rename after everything before it
is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import tarfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from scaling.records import sync, to_json, write_whole
from scaling.shard_reader import block_checksums
from scaling.shards import FORMAT_VERSION, SAMPLE_BYTES, SAMPLE_RATE, WAV_HEADER_BYTES, Clip, Samples, Shard, ShardIndex

SHARD_BYTES = 256_000_000  # about this much a shard
TAR_BLOCK = 512  # a tar is made of blocks: a header of one, then the content, padded
TAR_END = bytes(2 * TAR_BLOCK)
CLIP_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")  # no dot: WebDataset takes what follows it for the kind of a member


class ShardWriter:
    """Writes a folder of shards: `add` every clip, split after split, then `commit`.

    A shard is written under a temporary name and renamed when it is whole and on disk; a new
    one begins where the last would outgrow `shard_bytes`. Without `commit` there is no index,
    and leaving the `with` block then takes the unfinished shard away.
    """

    def __init__(self, root: Path, corpus: str, source: str, shard_bytes: int = SHARD_BYTES) -> None:
        self.root = root
        self.corpus = corpus
        self.source = source
        self.shard_bytes = shard_bytes
        self._shards: dict[str, list[Shard]] = {}
        self._rows: dict[str, list[Clip]] = {}
        self._ids: set[tuple[str, str]] = set()
        self._tar: _Tar | None = None
        root.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        split: str,
        clip_id: str,
        speaker: str,
        noise: str | None,
        snr_db: float | None,
        noisy: Samples,
        clean: Samples,
    ) -> Clip:
        """Append a clip to its split. ValueError for an id twice in a split, or for twins of unlike length."""
        if len(noisy) != len(clean) or not len(noisy):
            raise ValueError(f"clip {clip_id} has {len(noisy)} noisy and {len(clean)} clean samples")
        if not CLIP_ID.fullmatch(clip_id):
            raise ValueError(f"clip id {clip_id!r} is none: expected up to 80 letters, digits, _ and -")
        if (split, clip_id) in self._ids:
            raise ValueError(f"clip {clip_id} is in split {split} already")
        if self._tar is not None and self._tar.split != split:
            self._finish_shard()
        if split in self._rows and self._tar is None:
            raise ValueError(f"split {split} is finished: add the clips of one split after those of another")
        num_bytes = clip_bytes(len(noisy))
        if self._tar is not None and self._tar.num_bytes + num_bytes > self.shard_bytes:
            self._finish_shard()
        if self._tar is None:
            shards = self._shards.setdefault(split, [])
            self._tar = _Tar(self.root, split, f"{split}-{len(shards):05d}.tar")
        tar = self._tar
        before_samples = TAR_BLOCK + WAV_HEADER_BYTES
        noisy_member, clean_member, json_member = clip_members(clip_id, speaker, noise, snr_db, noisy, clean)
        noisy_offset = tar.add(noisy_member) + before_samples
        clean_offset = tar.add(clean_member) + before_samples
        tar.add(json_member)
        tar.num_clips += 1
        where = (tar.name, noisy_offset, clean_offset)
        clip = Clip(clip_id, speaker, noise, snr_db, len(noisy), *where, block_checksums(noisy), block_checksums(clean))
        self._rows.setdefault(split, []).append(clip)
        self._ids.add((split, clip_id))
        return clip

    def commit(self) -> ShardIndex:
        """Write the rows, then the index, and load what was written."""
        if self._tar is not None:
            self._finish_shard()
        splits = {}
        for split, clips in self._rows.items():
            rows = "".join(to_json(asdict(clip)) + "\n" for clip in clips)
            write_whole(self.root / f"{split}.jsonl", rows)
            splits[split] = {
                "num_clips": len(clips),
                "hours": sum(clip.num_samples for clip in clips) / SAMPLE_RATE / 3600,
                "sha256": hashlib.sha256(rows.encode()).hexdigest(),
                "shards": [asdict(shard) for shard in self._shards[split]],
            }
        summary = {"format": FORMAT_VERSION, "corpus": self.corpus, "source": self.source, "sample_rate": SAMPLE_RATE}
        write_whole(self.root / "index.json", json.dumps(summary | {"splits": splits}, indent=1) + "\n")
        sync(self.root)
        index = ShardIndex.load(self.root)
        index.check_sizes()
        return index

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.discard()

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._shards[self._tar.split].append(self._tar.finish())
        self._tar = None


class _Tar:
    """A tar in the making. Owner and time of its members are zero, so equal content makes equal bytes."""

    def __init__(self, root: Path, split: str, name: str) -> None:
        self.split = split
        self.name = name
        self.num_bytes = 0
        self.num_clips = 0
        self._path = root / name
        self._temporary = root / f".{name}.tmp"
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()

    def add(self, member: bytes) -> int:
        """Append a member; the offset in the tar of its first byte."""
        offset = self.num_bytes
        self._write(member)
        return offset

    def finish(self) -> Shard:
        """Bring the tar to the disk and give it its name."""
        self._write(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return Shard(self.name, self.num_bytes, self._sha256.hexdigest(), self.num_clips)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses the buffered rest once more
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.num_bytes += len(content)


def clip_members(
    clip_id: str, speaker: str, noise: str | None, snr_db: float | None, noisy: Samples, clean: Samples
) -> tuple[bytes, bytes, bytes]:
    """A clip as it is in a tar: noisy, clean and JSON, each a header, the content, and padding."""
    facts = {"speaker": speaker, "noise": noise, "snr_db": snr_db}
    length = {"duration": len(noisy) / SAMPLE_RATE, "num_samples": len(noisy)}
    return (
        _member(f"{clip_id}.noisy.wav", _wav(noisy)),
        _member(f"{clip_id}.clean.wav", _wav(clean)),
        _member(f"{clip_id}.json", to_json(facts | length).encode()),
    )


def _member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % TAR_BLOCK)


def clip_bytes(num_samples: int) -> int:
    """Bytes that a clip takes up in a tar: three headers, two wavs, and a JSON of one block."""
    wav = WAV_HEADER_BYTES + num_samples * SAMPLE_BYTES
    return 3 * TAR_BLOCK + 2 * (wav + -wav % TAR_BLOCK) + TAR_BLOCK


def _wav(samples: Samples) -> bytes:
    """A 16-bit mono wav file with the canonical header of 44 bytes."""
    pcm = samples.astype("<i2", copy=False).tobytes()
    riff = struct.pack("<4sI4s", b"RIFF", WAV_HEADER_BYTES - 8 + len(pcm), b"WAVE")
    rates = (SAMPLE_RATE, SAMPLE_RATE * SAMPLE_BYTES, SAMPLE_BYTES, 8 * SAMPLE_BYTES)
    return riff + struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, *rates) + struct.pack("<4sI", b"data", len(pcm)) + pcm
