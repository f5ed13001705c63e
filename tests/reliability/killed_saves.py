"""A process that does nothing but save, killed over and over, and what it leaves behind each time."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import torch

from scaling.checkpoint import list_checkpoints, load_newest, save_checkpoint

NUM_WEIGHTS = 100_000


def kill_saves(folder: Path, wanted: int, result: Path) -> None:
    """Fork the saving process `wanted` times and kill it; the findings go to `result` as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder.mkdir()
    committed = folder.parent / "committed"
    committed.write_text("0")
    rng = random.Random(0)
    found = {"kills": 0, "unloadable": 0, "half_written": 0, "lost": 0, "most_lost": 0}
    while found["kills"] < wanted:
        before = int(committed.read_text())
        pid = os.fork()
        if pid == 0:
            try:
                _save_for_ever(folder, committed)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 180
        while int(committed.read_text() or 0) < before + 1:
            assert time.monotonic() < deadline, "nothing was saved within three minutes"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found["kills"] += 1
        found["half_written"] += any(folder.glob(".writing-*"))
        last = int(committed.read_text())
        loaded = load_newest(folder)
        if loaded is None or any(not tensor.eq(loaded[0].step).all() for tensor in loaded[1]["weights"]):
            found["unloadable"] += 1
            continue
        lost = last - loaded[0].step  # negative where the kill came between the rename and the report
        found["lost"] += lost > 0
        # Of the steps that were taken, all after the one under way when the kill came.
        found["most_lost"] = max(found["most_lost"], lost + 1)
    sizes = [path.stat().st_size for path in list_checkpoints(folder)[-1].path.rglob("*") if path.is_file()]
    result.write_text(json.dumps(found | {"mebibytes": sum(sizes) / 2**20}))


def _save_for_ever(folder: Path, committed: Path) -> None:
    loaded = load_newest(folder)
    step = loaded[0].step if loaded else 0
    report = os.open(committed, os.O_WRONLY)
    while True:
        step += 1
        save_checkpoint(folder, step, lambda part, step=step: _write(part, step))
        os.pwrite(report, str(step).encode(), 0)


def _write(folder: Path, step: int) -> None:
    """As ZeRO does: the model, and a part a rank in a folder below."""
    weights = [torch.full((NUM_WEIGHTS,), float(step)) for _ in range(2)]
    torch.save({"step": step, "weights": weights}, folder / "state.pt")
    (folder / "zero").mkdir()
    for rank in range(2):
        torch.save({"step": step, "part": torch.full((NUM_WEIGHTS,), float(step))}, folder / "zero" / f"rank-{rank}.pt")
