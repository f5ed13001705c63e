"""The batch behind a normalisation statistic is a setting, not a consequence of the hardware."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.norm import BatchNorm


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


def test_another_norm_batch_gives_another_result():
    torch.manual_seed(0)
    noisy = torch.randn(4, 4_000)
    outputs = []
    for norm_batch in (2, 4):
        torch.manual_seed(0)
        outputs.append(BSRNN(BSRNNConfig(16, 2, norm_batch=norm_batch))(noisy).waveform)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-6)


def test_a_micro_batch_that_the_norm_batch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="micro-batch of 3 crops is no multiple of norm_batch = 2"):
        BatchNorm(6, norm_batch=2)(torch.randn(5, 3, 6))
