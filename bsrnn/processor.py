"""What this machine's processor is called."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Its model where the system tells it, else its kind: "AMD EPYC 7763 64-Core Processor", "aarch64"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
