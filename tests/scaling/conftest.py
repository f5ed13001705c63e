"""A VoiceBank+DEMAND folder to prepare, and where to."""

from pathlib import Path

import pytest

from tests.scaling.vbd_folder import make_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "vbd")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "prepared" / "shards"
