"""A VoiceBank+DEMAND folder to prepare, and where to; a run that was left alone; and a noisy utterance."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling.records import RunDirectory
from scaling.shard_reader import ShardReader
from scaling.shards import ShardIndex
from tests.scaling.vbd_folder import make_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "vbd")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "prepared" / "shards"


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_data: list[str], tiny_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A tiny run of 24 steps that nothing has cut off."""
    # Here, because shapes are checked in what is imported after the tests' options are read.
    from tests.scaling.runs import only_run

    study = tmp_path_factory.mktemp("uninterrupted")
    words = [*tiny_data, *tiny_settings, f"study={study}"]
    subprocess.run([sys.executable, "-m", "scaling.train", *words], check=True, capture_output=True)
    return only_run(study)


@pytest.fixture(scope="module")
def speech(tiny_index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """(noisy, clean) of the test utterance with the most noise, full scale ±1."""
    clip = min(tiny_index.clips("test"), key=lambda clip: clip.snr_db)
    noisy, clean = ShardReader(tiny_index.root).read_clip(clip)
    return noisy.astype(np.float32) / 32768, clean.astype(np.float32) / 32768
