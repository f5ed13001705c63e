"""The batch behind a normalisation statistic is a setting, not a consequence of the hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.norm import BatchNorm, synchronise
from tests.ranks import CONTEXT


def test_the_whole_batch_is_normalised_as_torch_does():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6), nn.BatchNorm1d(6)
    for _ in range(3):
        x = torch.randn(5, 4, 3, 6) * 2 + 1  # (T, B, K, C)
        torch.testing.assert_close(ours(x), theirs(x.reshape(-1, 6)).view(x.shape))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    x = torch.randn(5, 4, 3, 6)
    scale, shift = ours.eval().inference_affine()
    torch.testing.assert_close(ours(x), x * scale + shift)


def test_a_micro_batch_of_several_norm_batches_equals_those_one_by_one():
    def model() -> BSRNN:
        torch.manual_seed(0)
        return BSRNN(BSRNNConfig(16, 2, norm_batch=2))

    noisy = torch.randn(6, 4_000)
    at_once, one_by_one = model(), model()
    whole = at_once(noisy).waveform
    parts = torch.cat([one_by_one(part).waveform for part in noisy.split(2)])
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    whole.square().mean().backward()
    parts.square().mean().backward()
    for (name, a), (_, b) in zip(at_once.named_parameters(), one_by_one.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3, msg=name)
    for (name, a), (_, b) in zip(at_once.named_buffers(), one_by_one.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def make_norm_and_batch(affine: bool) -> tuple[BatchNorm, torch.Tensor, torch.Tensor]:
    """A norm of the whole batch; the batch, the crops of which differ in mean and scale; the output's gradient."""
    torch.manual_seed(0)
    norm = BatchNorm(6, norm_batch=4, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(5, 4, 3, 6) * torch.rand(4, 1, 6) + 3 * torch.randn(4, 1, 6)  # (T, B, K, C)
    return norm, x, torch.randn(5, 4, 3, 6)


def results(norm: BatchNorm, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(norm.named_buffers())}


def normalise_half(rank: int, affine: bool, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    norm, x, gradient = make_norm_and_batch(affine)
    synchronise(norm, distributed.group.WORLD)
    half = slice(2 * rank, 2 * rank + 2)
    torch.save(results(norm, x[:, half], gradient[:, half]), folder / f"{rank}.pt")


@pytest.mark.parametrize("affine", [True, False])
def test_halves_on_two_processes_are_normalised_as_the_whole_forward_and_backward(affine: bool, tmp_path: Path):
    processes = [CONTEXT.Process(target=normalise_half, args=(rank, affine, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole = results(*make_norm_and_batch(affine))
    for name, expected in whole.items():
        parts = [half[name] for half in halves]
        if name in ("y", "x"):
            given = [torch.cat(parts, dim=1)]
        else:  # parameters' gradients are of each process's own crops; statistics are of all
            given = [sum(parts)] if name in ("weight", "bias") else parts
        for value in given:
            torch.testing.assert_close(value, expected, atol=2e-6, rtol=1e-5, msg=name)


def test_another_norm_batch_gives_another_result():
    torch.manual_seed(0)
    noisy = torch.randn(4, 4_000)
    outputs = []
    for norm_batch in (2, 4):
        torch.manual_seed(0)
        outputs.append(BSRNN(BSRNNConfig(16, 2, norm_batch=norm_batch))(noisy).waveform)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-6)


def test_a_micro_batch_that_the_norm_batch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="micro-batch of 3 crops is not a multiple of norm_batch = 2"):
        BatchNorm(6, norm_batch=2)(torch.randn(5, 3, 6))
