"""A small VoiceBank+DEMAND folder of real wavs, in the layouts that users have."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from scaling.prepare import prepare_shards
from scaling.shards import ShardIndex

TRAIN = ["p228_001", "p228_002", "p226_001", "p287_005", "p230_003", "p230_004", "p236_002", "p236_010"]
TEST = ["p232_001", "p257_001", "p257_002"]
SETS = {"trainset_28spk": TRAIN, "testset": TEST}


def voice(num_samples: int, sample_rate: int, seed: int) -> NDArray[np.float64]:
    """A few harmonics of a gliding pitch under a syllable-like envelope, in [-0.5, 0.5]."""
    time = np.arange(num_samples) / sample_rate
    phase = 2 * np.pi * (100 + 15 * seed) * (time + 0.1 * time**2)
    harmonics = np.sum([np.sin(k * phase) / k for k in range(1, 12)], axis=0)
    return np.asarray(0.25 * harmonics * np.sin(2 * np.pi * 2 * time) ** 2)


def make_corpus(root: Path, sample_rate: int = 48_000, logs: str | None = "logfiles", repeats: int = 1) -> Path:
    """A small VBD folder of real wavs; `repeats` multiplies the training utterances."""
    lines: dict[str, list[str]] = {}
    for name, ids in SETS.items():
        ids = ids + [f"p239_{number:03d}" for number in range((repeats - 1) * len(ids))] if name != "testset" else ids
        for kind in ("clean", "noisy"):
            (root / f"{kind}_{name}_wav").mkdir(parents=True)
        for number, utterance_id in enumerate(ids):
            num_samples = sample_rate // 2 + 1009 * (number % 11)
            clean = voice(num_samples, sample_rate, seed=number)
            noisy = clean + 0.1 * np.random.default_rng(number).standard_normal(num_samples)
            for kind, samples in (("clean", clean), ("noisy", noisy)):
                soundfile.write(root / f"{kind}_{name}_wav" / f"{utterance_id}.wav", samples, sample_rate, "PCM_16")
            lines.setdefault(name, []).insert(0, f"{utterance_id} bus {2.5 * number:g}")
    write_logs(root, logs, lines)
    return root


def write_logs(root: Path, place: str | None, lines: dict[str, list[str]]) -> None:
    texts = {f"log_{name}.txt": "\n".join(entries) + "\n" for name, entries in lines.items()}
    if place == "zip":
        with zipfile.ZipFile(root / "logfiles.zip", "w") as archive:
            for name, text in texts.items():
                archive.writestr(f"logfiles/{name}", text)
    elif place is not None:
        for name, text in texts.items():
            (root / place).mkdir(exist_ok=True)
            (root / place / name).write_text(text)


def zip_sets(root: Path, inside: str = "", keep_folders: bool = False) -> None:
    """Put each wav folder into a zip of its name, at `inside`, with what macOS adds to zips."""
    for folder in sorted(root.glob("*_wav")):
        with zipfile.ZipFile(f"{folder}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir(), reverse=True):
                archive.write(path, f"{inside}{folder.name}/{path.name}")
                archive.writestr(f"__MACOSX/{folder.name}/._{path.name}", b"Mac OS X resource fork")
        if not keep_folders:
            shutil.rmtree(folder)


def prepare(source: Path, target: Path, num_workers: int = 1, shard_bytes: int = 100_000) -> ShardIndex:
    return prepare_shards(source, target, "vbd", num_workers, show_progress=False, shard_bytes=shard_bytes)


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}
