"""The same run on one, two and four processes: bit for bit in audit mode, to rounding otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scaling.checkpoint import load_newest
from tests.ranks import end_all, run_ranks
from tests.reliability.small_runs import loss_log, run_of


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


def weights(study: Path) -> torch.Tensor:
    loaded = load_newest(run_of(study).checkpoints)
    assert loaded is not None
    return torch.cat([tensor.flatten().double() for tensor in loaded[1]["model"].values()])


def test_the_world_size_changes_no_bit_in_audit_mode_and_little_in_the_ordinary(
    tiny_run: list[str], tmp_path: Path, times, report
):
    num_steps = times(8, 30)
    words = [*tiny_run, f"train.budget.steps={num_steps}", "train.global_batch=8"]
    hashes: dict[str, list[str]] = {"audit": [], "ordinary": []}
    for mode, more in (("audit", ["execution.audit=true", "execution.micro_batch=2"]), ("ordinary", [])):
        for world_size in (1, 2, 4):
            study = tmp_path / f"{mode}-{world_size}"
            hashes[mode].append(run_ranks([*words, *more, f"study={study}"], tmp_path, world_size))
    assert len(set(hashes["audit"])) == 1
    logs = [loss_log(run_of(tmp_path / f"audit-{world_size}")) for world_size in (1, 2, 4)]
    assert logs[0] == logs[1] == logs[2]
    assert len(logs[0]) == num_steps + 1
    of_losses, of_weights = [], []
    one = tmp_path / "ordinary-1"
    for world_size in (2, 4):
        other = tmp_path / f"ordinary-{world_size}"
        pairs = zip(loss_log(run_of(one)), loss_log(run_of(other)), strict=True)
        of_losses.append(max(abs(theirs[2] - ours[2]) / abs(ours[2]) for ours, theirs in pairs))
        of_weights.append(float((weights(other) - weights(one)).norm() / weights(one).norm()))
    # AdamW makes whole steps of the rounding of gradients near zero, so this grows with the steps.
    assert max(of_losses) < 1e-2
    assert max(of_weights) < 1e-2
    report(
        "world size",
        f"After {num_steps} steps (xxt, global batch 8, `train.norm_batch=2`): with `execution.audit=true "
        f"execution.micro_batch=2` 1, 2 and 4 processes end with one weight hash ({hashes['audit'][0][:16]}…) and "
        f"equal losses in all {len(logs[0])} rows. In the ordinary mode there are {len(set(hashes['ordinary']))} "
        f"hashes: losses differ from one process's by at most {of_losses[0]:.1e} (2 processes) and "
        f"{of_losses[1]:.1e} (4) of their value, weights by "
        f"{of_weights[0]:.1e} and {of_weights[1]:.1e} of their norm.",
    )
