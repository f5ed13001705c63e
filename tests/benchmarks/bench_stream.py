"""How fast crops come from shards, beside webdataset over FLAC and a folder of wavs; what the checks cost.

Batches of 64 crops of 2 s of noisy and clean, from the page cache, in one process on one thread, by
CPU time; the three take turns over the same recordings of the demo corpus.
"""

from __future__ import annotations

import io
import os
import random
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset

from bsrnn.losses import enhancement_loss
from scaling.allocator import keep_freed_memory
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.plan import plan_run
from scaling.prepare import open_shards
from scaling.processes import ALONE
from scaling.quarantine import Quarantine
from scaling.records import RunDirectory
from scaling.shard_reader import ShardReader, block_checksums
from scaling.shards import SAMPLE_RATE, ShardIndex
from scaling.stopping import StopFlag
from scaling.stream import CropDataset, MicroBatchSampler, to_float, training_loader
from scaling.trainer import Trainer
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block

BATCH, CROP = 64, 2 * SAMPLE_RATE
ROUNDS = 5
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    root = tmp_path_factory.mktemp("corpus")
    words = [f"data.root={root / 'corpus'}", f"data.shards={root / 'shards'}", "data.demo.hours=0.15"]
    return open_shards(load_config(RunConfig, "run", words).data)


def shards(index: ShardIndex) -> Batches:
    dataset = CropDataset(index.root, index.clips("train"), CROP, 0)
    for batch in training_loader(dataset, MicroBatchSampler(0, 10**6, BATCH, BATCH), 0):
        yield batch.noisy, batch.clean


def write_flac_tar(index: ShardIndex, path: Path) -> Path:
    reader = ShardReader(index.root)
    with tarfile.open(path, "w") as tar:
        for clip in index.clips("train"):
            for kind, samples in zip(("noisy", "clean"), reader.read_clip(clip), strict=True):
                content = io.BytesIO()
                soundfile.write(content, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                member = tarfile.TarInfo(f"{clip.id}.{kind}.flac")
                member.size = len(content.getvalue())
                tar.addfile(member, io.BytesIO(content.getvalue()))
    return path


def flac(path: Path) -> Batches:
    """webdataset as its users write it: decode both, take the same crop of both, batch."""

    def decode(key: str, content: bytes) -> np.ndarray | None:
        return soundfile.read(io.BytesIO(content), dtype="int16")[0] if key.endswith(".flac") else None

    def crop(pair: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, ...]:
        start = random.randrange(max(1, len(pair[0]) - CROP + 1))
        return tuple(torch.from_numpy(_padded(samples[start : start + CROP])) for samples in pair)

    dataset = (
        webdataset.WebDataset(str(path), shardshuffle=False)
        .shuffle(100)
        .decode(decode)
        .to_tuple("noisy.flac", "clean.flac")
        .map(crop)
        .batched(BATCH, partial=False)
        .repeat()
    )
    yield from torch.utils.data.DataLoader(dataset, batch_size=None)


def write_wavs(index: ShardIndex, folder: Path) -> Path:
    reader = ShardReader(index.root)
    for clip in index.clips("train"):
        for kind, samples in zip(("noisy", "clean"), reader.read_clip(clip), strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / kind / f"{clip.id}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
    return folder


class WavFolder(torch.utils.data.Dataset):
    """A folder of wavs as the field reads it: open, seek, read the crop."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, sorted(path.name for path in (folder / "noisy").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        path = self.folder / "noisy" / self.names[number]
        start = random.randrange(max(1, soundfile.info(path).frames - CROP + 1))
        return tuple(
            torch.from_numpy(
                _padded(soundfile.read(self.folder / kind / self.names[number], CROP, start, dtype="int16")[0])
            )
            for kind in ("noisy", "clean")
        )


def wavs(folder: Path) -> Batches:
    while True:
        yield from torch.utils.data.DataLoader(WavFolder(folder), batch_size=BATCH, shuffle=True, drop_last=True)


def _padded(samples: np.ndarray) -> np.ndarray:
    return np.pad(samples, (0, CROP - len(samples)))


def seconds_of(batches: Batches, count: int) -> float:
    """CPU seconds a batch."""
    began = time.process_time()
    for _ in range(count):
        noisy, clean = next(batches)
        assert noisy.shape == clean.shape == (BATCH, CROP)
    return (time.process_time() - began) / count


def test_batches_a_second_from_shards_flac_and_wavs(corpus: ShardIndex, tmp_path: Path):
    keep_freed_memory()
    torch.set_num_threads(1)
    sources = {
        "shards, every crop checked (this project)": (shards(corpus), 100),
        f"webdataset {webdataset.__version__} over FLAC, soundfile": (
            flac(write_flac_tar(corpus, tmp_path / "t.tar")),
            3,
        ),
        "folder of wavs, soundfile": (wavs(write_wavs(corpus, tmp_path / "wavs")), 10),
    }
    times: dict[str, list[float]] = {name: [] for name in sources}
    for batches, count in sources.values():
        seconds_of(batches, count)  # the page cache, and what is loaded at first use
    for _ in range(ROUNDS):
        for name, (batches, count) in sources.items():
            times[name].append(seconds_of(batches, count))
    best = {name: min(spent) for name, spent in times.items()}
    ours = next(iter(best.values()))
    rows = [
        f"| {name} | {1 / seconds:,.1f} | {BATCH / seconds:,.0f} | {min(times[name]) * 1e3:.2f} to "
        f"{max(times[name]) * 1e3:.2f} | {seconds / ours:,.1f} |"
        for name, seconds in best.items()
    ]
    clips = corpus.clips("train")
    length = np.mean([clip.duration for clip in clips])
    write_block(
        PERFORMANCE,
        "stream",
        "\n".join(
            [
                f"Batches of {BATCH} pairs of 2 s, of {len(clips)} clips of {length:.1f} s on average, from the page "
                f"cache; best of {ROUNDS} rounds in turn.",
                "",
                "| source | batches/s | crops/s | ms a batch, best to worst | times ours |",
                "|---|--:|--:|--:|--:|",
                *rows,
                "",
                f"`make benchmarks`, or `{COMMAND}`  ",
                measured_on("torch", "webdataset", "soundfile", "isal"),
            ]
        ),
    )
    assert best["folder of wavs, soundfile"] > ours
    assert ours * 5 < sorted(best.values())[-1]


def test_what_checksums_ledger_and_checkpoints_cost_of_training(corpus: ShardIndex, tmp_path: Path):
    """Of training the smallest size on one core by the demo's recipe: a larger model's share is smaller."""
    torch.set_num_threads(1)
    keep_freed_memory()
    words = ["model=xxt", f"data.shards={corpus.root}", f"data.root={corpus.root.parent / 'corpus'}"]
    config = load_config(
        RunConfig, "run", [*words, "data.demo.hours=0.15", "execution.device=cpu", f"study={tmp_path}"]
    )
    plan = plan_run(config, corpus)
    train, clips = config.train, corpus.clips("train")
    crop = round(train.crop_seconds * SAMPLE_RATE)
    longest = max(clips, key=lambda clip: clip.num_samples)
    samples = ShardReader(corpus.root).read_crop(longest, 0, crop)
    checks = min(_seconds(lambda: [block_checksums(part) for part in samples], 2_000) for _ in range(ROUNDS))
    quarantine = Quarantine(RunDirectory(tmp_path), corpus, clips, 0.01)
    ledger = _seconds(lambda: (quarantine.add(()), quarantine.num_replaced(10**6)), 2_000)

    plan.directory.path.mkdir(parents=True)
    with StopFlag() as stop:
        trainer = Trainer(plan, plan.directory, corpus, ALONE, stop)
        batches = iter(
            training_loader(trainer.dataset, MicroBatchSampler(0, 10**6, train.norm_batch, train.norm_batch), 0)
        )
        loading = min(_seconds(lambda: next(batches), 20) for _ in range(ROUNDS)) / train.norm_batch
        saves = []
        for trainer.step in range(1, 12):  # by the clock: most of a save is waiting for the disk
            began = time.perf_counter()
            trainer._save()
            saves.append(time.perf_counter() - began)
    save = statistics.median(saves)
    model = trainer.engine.model
    noisy, clean = (to_float(part) for part in next(batches)[:2])

    def step() -> None:
        model.zero_grad()
        enhancement_loss(model(noisy), clean, model.stft, train.losses).total.backward()

    step()
    training = min(_seconds(step, 1) for _ in range(3)) / len(noisy)
    batch, every = train.global_batch, config.execution.checkpoint_every
    total = checks / training + ledger / (batch * training) + save / (every * batch * training)
    write_block(
        PERFORMANCE,
        "stream checks",
        f"A step of {batch} crops of {train.crop_seconds:g} s at size xxt on one core takes {batch * training:.2f} s; "
        f"reading them {1e3 * batch * loading:.2f} ms ({loading / training:.3%}), of which their checksums "
        f"{1e3 * batch * checks:.2f} ms ({checks / training:.4%} of the step); the list of replaced crops "
        f"{1e6 * ledger:.0f} µs; a checkpoint, flushed to the disk, {1e3 * save:.0f} ms every {every} steps "
        f"({save / (every * batch * training):.3%}). **Ledger, checksums and checkpoints together: {total:.3%} of "
        f"training.** Of a GPU's step of 100 ms for 64 crops the checksums would be {64 * checks / 0.1:.2%}, in "
        f"workers beside it.\n\n`make benchmarks`, or `{COMMAND}`  \n{measured_on('torch', 'isal')}",
    )
    assert total < 0.02


COMMAND = "OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/bench_stream.py"


def _seconds(call: Callable[[], object], count: int) -> float:
    began = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - began) / count


assert os.environ.get("OMP_NUM_THREADS", "1") == "1", "one thread: set OMP_NUM_THREADS=1"
