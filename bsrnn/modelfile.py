"""A trained model in one file: its configuration and its weights.

The file is torch's own format and holds plain data only, so that loading it runs no code:
{"format": "bsrnn", "config": the fields of BSRNNConfig by name, "state": the state dict}.
A field that the file lacks takes its default; one that is unknown here is an error.
A training run leaves such a file as `model.pt` in its directory.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsrnn.model import BSRNN, BSRNNConfig

MODEL_FILE = "model.pt"  # in a run's directory
FORMAT = "bsrnn"


def save_model(model: BSRNN, path: Path) -> None:
    """Write a model, whole or not at all. A folded model cannot be trained on and is not for keeping: ValueError."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if _mismatch(model.config, state):
        raise ValueError("this model has been changed since it was built (folded?): save the one it was made from")
    config = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    write_whole(path, {"format": FORMAT, "config": config, "state": state})


def load_model(path: Path | str) -> BSRNN:
    """The model of a file, or of a run's directory, on the CPU in evaluation mode.

    FileNotFoundError if there is none; ValueError if the file is no model or does not fit this version.
    """
    path = Path(path)
    if path.is_dir():
        path = model_path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such file; a run writes its model there when its training ends: let it finish"
            )
    content = read_content(path)
    if not is_model(content):
        raise ValueError(
            f"{path} holds no BSRNN of this project: give a run's directory, its {MODEL_FILE}, "
            "or what `python -m bsrnn.convert` makes of a checkpoint of the FastEnhancer repository"
        )
    known = {field.name for field in fields(BSRNNConfig)}
    if unknown := sorted(set(content["config"]) - known):
        raise ValueError(f"{path} has the setting {unknown[0]}, unknown here: take the version that wrote it")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content["config"].items()
    }
    try:
        config = BSRNNConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: it is not a valid BSRNN configuration ({error})") from None
    if reason := _mismatch(config, content["state"]):
        raise ValueError(f"{path}: its weights do not fit its configuration ({reason})")
    model = BSRNN(config)
    model.load_state_dict(content["state"])
    return model.eval()


def model_path(path: Path) -> Path:
    """The model's own file, where a run's directory stands for it."""
    return path / MODEL_FILE if path.is_dir() else path


def is_model(content: Any) -> bool:
    """Whether what a file holds is a model of this project."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    config, state = content.get("config"), content.get("state")
    return (
        isinstance(config, dict)
        and isinstance(state, dict)
        and all(isinstance(tensor, Tensor) for tensor in state.values())
    )


def read_content(path: Path) -> Any:
    """What a file of torch's holds, read without running code from it; ValueError if it is not such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # a file that may not be read is no bad file
    if not zipfile.is_zipfile(path):  # as torch.save writes them; it fails in many ways on anything else
        raise ValueError(f"{path} is not a checkpoint that torch can read")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than plain data, which could run code when it is read: "
            "save its state dict alone and give that"
        ) from None
    except (RuntimeError, EOFError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{path} is not a checkpoint that torch can read safely ({first[:120]})") from None


def write_whole(path: Path, content: Any) -> None:
    """Write a file of torch's under a temporary name and rename it, so that no half of one is ever found."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to it at the end unless an error ends it before.

    An OSError names `path`, whatever was the matter, and says what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        refusal = OSError(f"{path}: cannot be written ({error.strerror or error}): choose another path")
        refusal.errno = error.errno  # by which a full disk is told from other errors
        raise refusal from None


def _mismatch(config: BSRNNConfig, state: dict[str, Tensor]) -> str | None:
    """How a state dict differs from a model of this configuration; None if it does not."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in BSRNN(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name}: {found.get(name, 'missing')}, expected {expected.get(name, 'none such')}"
    return None
