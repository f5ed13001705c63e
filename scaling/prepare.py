"""Converts a VBD folder as a user has it (see `scaling.corpus.vbd`) into shards (see `scaling.shards`).

    python -m scaling.prepare data=vbd data.root=DIR [data.shards=DIR]
    python -m scaling.prepare data=demo

1. List the utterances. Where the shard folder already holds them, there is nothing to do.
2. Take the lock beside the shard folder: of two preparations the second waits, and then finds
   the work done. Holding it also proves that folders left by an earlier one are nobody's.
3. Read every header, and refuse all that cannot be used in one line, before anything is written;
   so too if the disk has too little room.
4. Convert to 16 kHz in worker processes (see `scaling.resampling`), and write the shards in one
   fixed order into a temporary folder beside the target.
5. Rename it. Until then there is nothing at the target; from then on it is whole.

The bytes that are written depend on the source alone, not on the machine or the workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from scaling.cli import load_config
from scaling.command import run_main
from scaling.config import DataConfig, RunConfig
from scaling.cores import num_cores
from scaling.corpus.demo import DemoConfig, make_demo_corpus, plan_corpus
from scaling.corpus.vbd import SPLITS, Utterance, find_utterances, warn_of_unknown_downloads
from scaling.corpus.wav import WavHeader, close_zips
from scaling.errors import UserError
from scaling.locks import held_when_free
from scaling.progress import ProgressDisplay
from scaling.records import sync
from scaling.remote import RemoteRoot
from scaling.resampling import SOURCE_RATES, num_samples_out, resampled
from scaling.shard_writer import SHARD_BYTES, ShardWriter, clip_bytes
from scaling.shards import ShardIndex

log = logging.getLogger(__name__)

ROW_BYTES = 300  # of the index, about
HEADER_READERS = 16  # threads: on a network file system, opening a file is waiting
NUM_PROBLEMS_SHOWN = 3
ORDER_SEED = "vbd-1"  # changing it changes every index hash


def prepare_shards(
    source_root: Path,
    shard_root: Path,
    corpus: str,
    num_workers: int,
    show_progress: bool,
    shard_bytes: int = SHARD_BYTES,
) -> ShardIndex:
    """Make the shards of the VBD folder `source_root` in `shard_root`, unless they are there.

    `corpus` is the name that the index carries. The resampling runs in `num_workers` spawned
    processes (1: in this one) and shows how far it is if `show_progress`. UserError for whatever
    about the source, the shard folder or the disk stands against it; the shard folder is then as it was before.
    """
    if num_workers < 1:
        raise UserError(f"{num_workers} workers cannot prepare shards: expected at least 1")
    shard_root = shard_root.resolve()
    try:
        utterances = find_utterances(source_root)
        source = fingerprint(utterances)
        # Before the lock, so that finished shards may lie where this user cannot write.
        if (index := _finished(shard_root, corpus, source, source_root)) is not None:
            if corpus != "demo":  # that is synthesised, always alike
                _warn_of_newer_sources(utterances, shard_root)
            return index
        lock = shard_root.parent / f".{shard_root.name}.lock"
        with held_when_free(lock, f"{shard_root} is being made by another process: waiting for it"):
            if (index := _finished(shard_root, corpus, source, source_root)) is not None:
                return index
            _remove_stale(shard_root)
            headers = check_headers(utterances)
            _check_space(shard_root, headers)
            warn_of_unknown_downloads(utterances)
            with ShardWriter(_temporary_folder(shard_root), corpus, source, shard_bytes) as writer:
                return _write(shard_root, writer, shard_order(utterances), num_workers, show_progress)
    except OSError as error:  # a full disk, a folder that may not be written, a source that went away
        raise UserError(
            f"shards cannot be made at {shard_root} ({error}): fix that or name another data.shards"
        ) from error
    finally:
        close_zips()


def fingerprint(utterances: Sequence[Utterance]) -> str:
    """What names a source: the SHA-256 of its sorted names, sizes in bytes, noises and SNRs.

    Neither places nor times go into it: a folder and the zip it came from are the same source.
    """
    return _fingerprint((u.split, u.id, u.clean.num_bytes, u.noisy.num_bytes, u.noise, u.snr_db) for u in utterances)


def demo_fingerprint(config: DemoConfig) -> str:
    """The fingerprint of the demo corpus that a configuration makes, whether it is there or not."""
    return _fingerprint((u.split, u.name, u.num_bytes, u.num_bytes, u.noise, u.snr_db) for u in plan_corpus(config))


def _fingerprint(rows: Iterable[tuple[str, str, int, int, str | None, float | None]]) -> str:
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row[:2]):  # by split and name
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def shard_order(utterances: Sequence[Utterance]) -> list[Utterance]:
    """The order in which clips are written: train shuffled, so that every shard mixes speakers.

    The shuffle sorts by a hash of the id: it is the same with every version of every library.
    """

    def key(utterance: Utterance) -> tuple[int, str]:
        split = SPLITS.index(utterance.split)
        shuffled = hashlib.sha256(f"{ORDER_SEED}/{utterance.id}".encode()).hexdigest()
        return split, shuffled if utterance.split == "train" else utterance.id

    return sorted(utterances, key=key)


# --- before anything is written -------------------------------------------------------------


def check_headers(utterances: Sequence[Utterance]) -> list[WavHeader]:
    """The header that each utterance's two files share; one UserError that sums up all that is wrong.

    Refused are files that are unreadable, cut off or empty, rates other than 48 and 16 kHz,
    more than one channel, and twins that differ in rate or length.
    """
    with ThreadPoolExecutor(HEADER_READERS) as threads:
        checked = list(threads.map(_check_utterance, utterances))
    problems = [found for found in checked if isinstance(found, str)]
    if problems:
        shown = "; ".join(problems[:NUM_PROBLEMS_SHOWN])
        more = f"; and {len(problems) - NUM_PROBLEMS_SHOWN} more" if len(problems) > NUM_PROBLEMS_SHOWN else ""
        raise UserError(f"{len(problems)} of {len(utterances)} utterances cannot be used: {shown}{more}")
    return [found for found in checked if isinstance(found, WavHeader)]


def _check_utterance(utterance: Utterance) -> WavHeader | str:
    """The header that an utterance's two files share, or what is wrong with them."""
    headers = []
    for source in (utterance.clean, utterance.noisy):
        try:
            header = source.read_header()
        except UserError as error:
            return str(error)
        if header.sample_rate not in SOURCE_RATES:
            return f"{source.name} has {header.sample_rate} Hz, expected 48000 or 16000 Hz: resample it and its twin"
        if header.num_channels != 1:
            return f"{source.name} has {header.num_channels} channels, expected 1: make it and its twin mono"
        if num_samples_out(header) < 1:
            return f"{source.name} has {header.num_frames} samples, too short for one at 16 kHz: remove it and its twin"
        headers.append(header)
    clean, noisy = headers
    if clean.sample_rate != noisy.sample_rate:
        return (
            f"{utterance.clean.name} has {clean.sample_rate} Hz and its noisy twin "
            f"{noisy.sample_rate} Hz: bring both to one rate"
        )
    if clean.num_frames != noisy.num_frames:
        return (
            f"{utterance.clean.name} has {clean.num_frames} samples and its noisy twin "
            f"{noisy.num_frames}: copy both again from one source, or remove both"
        )
    return clean


def _check_space(shard_root: Path, headers: Sequence[WavHeader]) -> None:
    needed = sum(clip_bytes(num_samples_out(header)) + ROW_BYTES for header in headers)
    free = shutil.disk_usage(shard_root.parent).free
    if needed > free:
        raise UserError(
            f"shards at {shard_root} need {needed / 1e6:.1f} MB, {shard_root.parent} has {free / 1e6:.1f} MB free: "
            f"make room or set data.shards to a folder on another disk"
        )


# --- the shard folder -----------------------------------------------------------------------


def _finished(shard_root: Path, corpus: str, source: str, source_root: Path) -> ShardIndex | None:
    """The shards if they have been made of this source; UserError if something else is there."""
    if not shard_root.exists() or (shard_root.is_dir() and not any(shard_root.iterdir())):
        if shard_root.is_mount():
            raise UserError(f"{shard_root} is a mount point, which shards cannot replace: name a folder below it")
        return None
    if not (shard_root / "index.json").exists():
        raise UserError(f"{shard_root} is there but holds no shards: delete it or name another data.shards")
    index = ShardIndex.load(shard_root)
    index.check_sizes()
    if (index.corpus, index.source) != (corpus, source):
        raise UserError(
            f"{shard_root} holds shards of another source ({index.corpus}, fingerprint {index.source[:12]}) than "
            f"{source_root} ({corpus}, fingerprint {source[:12]}): delete {shard_root} or name another data.shards"
        )
    return index


def _warn_of_newer_sources(utterances: Sequence[Utterance], shard_root: Path) -> None:
    """The fingerprint knows names and sizes: noise that was mixed anew leaves both as they were."""
    made = (shard_root / "index.json").stat().st_mtime
    paths = {source.path for utterance in utterances for source in (utterance.clean, utterance.noisy)}
    newer = sorted(path for path in paths if path.stat().st_mtime > made)
    if newer:
        log.warning(
            "%d of %d source files are newer than the shards at %s, of the same names and sizes, first %s: if what "
            "they hold has changed, delete the shards to have them made again",
            len(newer),
            len(paths),
            shard_root,
            newer[0],
        )


def _temporary_folder(shard_root: Path) -> Path:
    return shard_root.with_name(f".{shard_root.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _remove_stale(shard_root: Path) -> None:
    """Remove what dead preparations left; called with the lock held, so none of it is in use."""
    for path in shard_root.parent.iterdir():
        if path.name.startswith(f".{shard_root.name}.") and path.name.endswith(".tmp") and path.is_dir():
            log.info("removing %s, left by an interrupted preparation", path)
            shutil.rmtree(path)


def _write(
    shard_root: Path, writer: ShardWriter, utterances: Sequence[Utterance], num_workers: int, show_progress: bool
) -> ShardIndex:
    """Write all shards into the writer's folder, and rename it to `shard_root`."""
    begun, num_clipped, num_clipped_clips = time.monotonic(), 0, 0
    try:
        # closing: the worker processes end with the loop, however it ends
        with (
            contextlib.closing(resampled(utterances, num_workers)) as pairs,
            ProgressDisplay("resampling to shards", len(utterances), shown=show_progress) as progress,
        ):
            for utterance, pair in pairs:
                facts = utterance.speaker, utterance.noise, utterance.snr_db
                writer.add(utterance.split, utterance.id, *facts, pair.noisy, pair.clean)
                num_clipped += pair.num_clipped
                num_clipped_clips += pair.num_clipped > 0
                progress.advance()
        writer.commit()
        os.rename(writer.root, shard_root)
        sync(shard_root.parent)
    finally:
        shutil.rmtree(writer.root, ignore_errors=True)
    index = ShardIndex.load(shard_root)
    if num_clipped:
        log.warning("%d samples in %d clips exceeded 16 bits and were clipped", num_clipped, num_clipped_clips)
    hours = ", ".join(f"{split} {index.hours(split):.2f} h" for split in index.rows)
    log.info("%s: %s, made in %.0f s", shard_root, hours, time.monotonic() - begun)
    return index


# --- command -------------------------------------------------------------------------------


def open_shards(data: DataConfig) -> ShardIndex:
    """The shards a configuration asks for, made first where they can be.

    The demo corpus is synthesised on first use; another corpus is prepared if its root is
    given. Shards behind a URL are only read. UserError if they are not there and there is
    nothing to make them from.
    """
    shard_root = data.shard_root
    num_workers = num_cores()
    is_made = isinstance(shard_root, RemoteRoot) or (shard_root / "index.json").exists()
    if isinstance(shard_root, RemoteRoot) or (is_made and (data.root is None or not Path(data.root).exists())):
        index = ShardIndex.load(shard_root)
        if index.corpus != data.name:
            raise UserError(
                f"data={data.name}: {shard_root} holds shards of {index.corpus}: name another data.shards, or delete it"
            )
        if data.demo is not None and index.source != demo_fingerprint(data.demo):
            said = ", ".join(f"data.demo.{name} = {value}" for name, value in asdict(data.demo).items())
            raise UserError(
                f"data=demo: {shard_root} holds shards of another corpus than {said} make: set these as they were when "
                "the shards were made, or name another data.shards"
            )
        return index
    if data.root is None:
        raise UserError(
            f"data={data.name}: no shards at {shard_root}; "
            f"make them once with python -m scaling.prepare data={data.name} data.root=DIR"
        )
    if data.name == "demo":
        assert data.demo is not None
        if not is_made:
            log.info("data=demo: synthesising %g h of speech in noise at %s, once", data.demo.hours, data.root)
        with ProgressDisplay("synthesising", 1) as progress:
            make_demo_corpus(Path(data.root), data.demo, num_workers, progress.show_of)
        num_workers = min(num_workers, round(1 + data.demo.hours))  # starting processes takes longer than half an hour
    return prepare_shards(Path(data.root), shard_root, data.name, num_workers, show_progress=True)


def main(words: list[str]) -> int:
    config = load_config(RunConfig, "run", words)
    index = open_shards(config.data)
    for split in SPLITS:
        print(f"{split:<10} {len(index.clips(split)):>6} clips  {index.hours(split):7.3f} h")
    print(f"shards at {index.root}, index hash {index.index_hash}")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
