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


def model_of(gpus: list[str]) -> str | None:
    """What these are ("NVIDIA H100 80GB HBM3"), joined where they differ.

    None if the driver does not say, or one is a part of a GPU (MIG), which has a speed of its own.
    """
    lines = _ask("--query-gpu=index,uuid,name,mig.mode.current", "--format=csv,noheader") or []
    listed = [fields for line in lines if len(fields := [field.strip() for field in line.split(",")]) == 4]
    models = set()
    for gpu in gpus:
        found = [
            fields for fields in listed if gpu == fields[0] or (gpu.startswith("GPU-") and fields[1].startswith(gpu))
        ]
        if len(found) != 1 or found[0][3] == "Enabled":
            return None
        models.add(found[0][2])
    return " and ".join(sorted(models)) or None


def _ask(*words: str) -> list[str] | None:
    """The lines that nvidia-smi answers; None where it is not there or fails."""
    try:
        result = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()
