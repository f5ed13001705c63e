"""The GPUs of this machine, asked of the driver: to ask torch takes the seconds of loading it."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

DRIVERS_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each


def visible_gpus() -> list[str]:
    """The GPUs, named as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        entries = [entry.strip() for entry in named.split(",")]
        return list(itertools.takewhile(lambda entry: entry and entry != "-1", entries))  # as CUDA reads it
    said = _ask("--list-gpus")
    num_gpus = len(list(DRIVERS_GPUS.glob("*"))) if said is None else sum(line.startswith("GPU ") for line in said)
    return [str(index) for index in range(num_gpus)]


def has_driver() -> bool:
    """Whether the NVIDIA driver knows of a GPU, whatever torch makes of it."""
    return any(DRIVERS_GPUS.glob("*"))


def _ask(*words: str) -> list[str] | None:
    """The lines that nvidia-smi answers; None where it is not there or fails."""
    try:
        result = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()
