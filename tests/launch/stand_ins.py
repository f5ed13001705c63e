"""Commands of SLURM's that answer as a test wants them to."""

from __future__ import annotations

from pathlib import Path


def stand_in(folder: Path, commands: dict[str, str]) -> None:
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
