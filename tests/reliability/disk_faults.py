"""What a failing disk does to a run; a program of its own, because faulty_disk.c must be preloaded into it.

    python -m tests.reliability.disk_faults saves FOLDER ERROR... -- OVERRIDE...
    python -m tests.reliability.disk_faults runs FOLDER NAME:AT:ERROR:ALL_AFTER... -- OVERRIDE...

saves: each call of one save of a run's checkpoint fails in turn, with each of the errors
runs: one whole run for each fault, as `python -m scaling.train` executes it
Writes FOLDER/found.json.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from scaling.checkpoint import Checkpoint, newest_whole
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.plan import plan_run
from scaling.prepare import open_shards
from scaling.processes import join
from scaling.stopping import StopFlag
from scaling.trainer import Trainer
from tests.ranks import _execute


class FaultyDisk:
    """The preloaded library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.faulty_disk_failed.restype = ctypes.c_char_p

    def arm(self, folder: Path, at: int, error: int, all_after: bool = False) -> None:
        self.library.faulty_disk_arm(str(folder).encode(), ctypes.c_long(at), error, int(all_after))

    def found(self) -> dict[str, Any]:
        return {
            "calls": self.library.faulty_disk_calls(),
            "fails": self.library.faulty_disk_fails(),
            "failed": self.library.faulty_disk_failed().decode(),
        }


def break_saves(errors: list[int], words: list[str]) -> list[dict[str, Any]]:
    disk = FaultyDisk()
    config = load_config(RunConfig, "run", words)
    index = open_shards(config.data)
    plan = plan_run(config, index)
    processes = join(60, 60, 60, needs_group=config.execution.zero_stage is not None)
    directory = plan.directory
    directory.path.mkdir(parents=True)
    found = []
    with StopFlag() as stop:
        trainer = Trainer(plan, directory, index, processes, stop)
        trainer.step = 1
        trainer._save()
        trainer.step = 2
        before, after = (Checkpoint(directory.checkpoints / f"step-{step:08d}", step) for step in (1, 2))
        for error in errors:
            for at in itertools.count(1):
                disk.arm(directory.checkpoints, at, error)
                said = None
                try:
                    trainer._save()
                except UserError as raised:
                    said = str(raised)
                row = disk.found()
                disk.arm(Path("/nowhere"), 0, 0)
                newest = newest_whole(directory.checkpoints)
                row |= {
                    "said": said,
                    "error": error,
                    "before": before.damage(),
                    "newest": newest.step if newest else None,
                    "left": sorted(path.name for path in directory.checkpoints.iterdir()),
                }
                found.append(row)
                shutil.rmtree(after.path, ignore_errors=True)
                if not row["fails"]:
                    break
    processes.leave()
    return found


def break_runs(folder: Path, faults: list[str], words: list[str]) -> list[dict[str, Any]]:
    disk = FaultyDisk()
    found = []
    for fault in faults:
        name, at, error, all_after = fault.split(":")
        study, log, counts = folder / name, folder / f"{name}.log", folder / f"{name}.json"
        study.mkdir()
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            disk.arm(study, int(at), int(error), all_after == "1")
            atexit.register(lambda path=counts: path.write_text(json.dumps(disk.found())))
            _execute([*words, f"study={study}"])
        _, ended = os.waitpid(pid, 0)
        row = json.loads(counts.read_text())
        found.append(row | {"name": name, "status": os.waitstatus_to_exitcode(ended), "log": log.read_text()})
        found[-1]["seconds"] = time.monotonic() - began
    return found


if __name__ == "__main__":
    what, out, *more = sys.argv[1:]
    cut = more.index("--")
    if what == "saves":
        rows = break_saves([int(word) for word in more[:cut]], more[cut + 1 :])
    else:
        rows = break_runs(Path(out), more[:cut], more[cut + 1 :])
    (Path(out) / "found.json").write_text(json.dumps(rows))
