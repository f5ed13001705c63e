"""Where a run came from: commit, uncommitted changes, package versions, hardware."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from scaling.cores import num_cores
from scaling.records import Record

PACKAGES = (
    "torch",
    "accelerate",
    "deepspeed",
    "numpy",
    "webdataset",
    "submitit",
    "hydra-core",
    "pesq",
    "pystoi",
    "speechmos",
    "onnxruntime",
    "soxr",
)


CODE_PROVENANCE = "provenance.json"  # beside the packages, where they are a copy that a job was submitted with


@lru_cache(maxsize=1)
def provenance() -> Record:
    """Of the code: the same for every run planned by this process."""
    recorded = Path(__file__).parent.parent / CODE_PROVENANCE
    if recorded.exists():
        return dict(json.loads(recorded.read_text()))
    return code() | {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def code() -> Record:
    """The commit of this checkout and the hash of its uncommitted changes; None for each where it is no checkout."""
    recorded = Path(__file__).parent.parent / CODE_PROVENANCE
    if recorded.exists():
        known = json.loads(recorded.read_text())
        return {name: known.get(name) for name in ("commit", "uncommitted_diff_sha256")}
    # An installed package may lie in an environment within another project's checkout.
    is_checkout = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "commit": _git("rev-parse", "HEAD") if is_checkout else None,
        "uncommitted_diff_sha256": _uncommitted() if is_checkout else None,
    }


def hardware(device: str) -> Record:
    """Of the machine that this process runs on; the GPU, if execution.device = `device` takes one."""
    import torch

    from bsrnn.processor import processor_name
    from scaling.device import uses_gpu

    return {
        "host": platform.node(),
        "cpu": processor_name(),
        "num_cpus": num_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if uses_gpu(device) else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout: an installed package
        return None
    return result.stdout.strip()


def _uncommitted() -> str | None:
    """SHA-256 of the changes to tracked files; None if there are none."""
    diff = _git("diff", "HEAD")
    return hashlib.sha256(diff.encode()).hexdigest() if diff else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
