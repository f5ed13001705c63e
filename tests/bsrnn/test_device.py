"""What a GPU would be first to show, without one: tensors made on the wrong device, and values that it is waited for.

Tensors of torch's meta device have shapes and no values. A sum of one with a tensor of the CPU is refused, and so is
asking for a value, as a CUDA graph refuses it; what a pass makes of them must be on the device again.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.front_end import FRONT_ENDS
from bsrnn.losses import LossConfig, enhancement_loss

CONFIGS = {
    "batch": BSRNNConfig(16, 2, norm_batch=2),
    "group": BSRNNConfig(16, 1, norm="group"),
    "cumulative": BSRNNConfig(16, 1, norm="cumulative"),
    "not causal": BSRNNConfig(16, 1, norm="group", causal=False),
    **{name: BSRNNConfig(16, 1, **vars(front_end), norm="group") for name, front_end in FRONT_ENDS.items()},
}


@pytest.fixture(autouse=True)
def _autocast_of_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta device


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_pass_stays_on_its_device_and_waits_for_no_value(name: str):
    config = CONFIGS[name]
    model = BSRNN(config).to("meta").train()
    noisy, clean = torch.empty(2, 4, config.sample_rate // 2 + 100, device="meta")
    weights = LossConfig(multi_resolution=0.1, pesq=1e-3 if config.sample_rate == 16_000 else 0.0)
    loss = enhancement_loss(model(noisy), clean, model.stft, weights)
    loss.total.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {
        part.device.type
        for part in [loss.total, *loss.terms.values(), *(p.grad for p in parameters)]
        if part is not None
    }
    assert kinds == {"meta"}
    assert all(parameter.grad is not None for parameter in parameters)


def test_a_tensor_of_another_device_and_a_value_asked_for_are_refused():
    """What the tests of this page stand on."""
    with pytest.raises(RuntimeError):
        torch.empty(3, device="meta") + torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.empty((), device="meta").item()
    stft = BSRNN(CONFIGS["batch"]).stft
    with pytest.raises(NotImplementedError):  # torch's own inverse asks whether its envelope is 0 anywhere
        torch.istft(
            torch.empty(1, 257, 9, dtype=torch.complex64, device="meta"), 512, 256, window=stft.window.to("meta")
        )
