"""Models as files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds model.pt, a model like a trained one, and through.pt, which lets everything pass."""
    # Here, because shapes are checked in what is imported after the tests' options are read.
    from bsrnn import BSRNNConfig
    from bsrnn.modelfile import save_model
    from tests.bsrnn.sounds import passing_through
    from tests.bsrnn.test_model import trained_like

    folder = tmp_path_factory.mktemp("models")
    save_model(trained_like(BSRNNConfig(16, 2)), folder / "model.pt")
    save_model(passing_through(), folder / "through.pt")
    return folder
