"""The optimisers are the published ones, and parameters are grouped by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bsrnn import BSRNN, BSRNNConfig
from scaling.errors import UserError
from scaling.optimiser import (
    OPTIMISERS,
    AdamP,
    OptimiserConfig,
    ParameterGroupConfig,
    build_optimiser,
    learning_rate,
    set_learning_rate,
)


def one_step(weight: list, gradient: list, **settings: float) -> torch.Tensor:
    parameter = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    AdamP([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-15, **settings).step()
    return parameter.detach()


def test_adamp_takes_the_radial_part_from_a_scale_invariant_weight():
    """Worked by hand: the first update is the gradient's signs; orthogonal to the weight, so its radial part goes."""
    # w · g = 0; update (1, -1), unit weight (0.8, 0.6), radial part 0.2: (1, -1) - 0.2 (0.8, 0.6) = (0.84, -1.12)
    given = one_step([[4.0, 3.0]], [[3.0, -4.0]])
    torch.testing.assert_close(given, torch.tensor([[4 - 0.084, 3 + 0.112]], dtype=torch.float64))
    # weight decay is a tenth: w (1 - lr · decay / 10)
    given = one_step([[4.0, 3.0]], [[3.0, -4.0]], weight_decay=0.5)
    torch.testing.assert_close(given, torch.tensor([[4 * 0.995 - 0.084, 3 * 0.995 + 0.112]], dtype=torch.float64))


def test_adamp_leaves_a_weight_that_is_not_scale_invariant_to_adamw():
    # cos(w, g) = 1
    given = one_step([[4.0, 3.0]], [[8.0, 6.0]], weight_decay=0.5)
    torch.testing.assert_close(given, torch.tensor([[4 * 0.95 - 0.1, 3 * 0.95 - 0.1]], dtype=torch.float64))


def test_adamp_leaves_what_has_one_axis_to_adamw():
    """Biases and the scales of norms, as the authors' code does, however their gradients lie."""
    given = one_step([4.0, 3.0], [3.0, -4.0], weight_decay=0.5)
    torch.testing.assert_close(given, torch.tensor([4 * 0.95 - 0.1, 3 * 0.95 + 0.1], dtype=torch.float64))


def test_adamp_tries_rows_first_and_then_the_whole_tensor():
    # each row is orthogonal to its gradient: projected row by row
    rows = one_step([[4.0, 3.0], [1.0, 0.0]], [[3.0, -4.0], [0.0, 2.0]])
    torch.testing.assert_close(rows, torch.tensor([[3.916, 3.112], [1.0, -0.1]], dtype=torch.float64))
    # one row alone is: the tensor is taken as a whole, whose gradient is not orthogonal, so AdamW's step it is
    mixed = one_step([[4.0, 3.0], [1.0, 0.0]], [[3.0, -4.0], [8.0, 0.0]])
    torch.testing.assert_close(mixed, torch.tensor([[3.9, 3.1], [0.9, 0.0]], dtype=torch.float64))
    # no row is, but the sum cancels: unit weight (0.5, ...), update (1, 1, -1, -1), radial part 0
    whole = one_step([[1.0, 1.0], [1.0, 1.0]], [[2.0, 2.0], [-2.0, -2.0]], weight_decay=1.0)
    expected = [[0.99 - 0.1, 0.99 - 0.1], [0.99 + 0.1, 0.99 + 0.1]]
    torch.testing.assert_close(whole, torch.tensor(expected, dtype=torch.float64))


def test_adamp_keeps_the_length_of_a_weight_before_a_normalisation():
    """Where AdamW lets it grow without end (the paper's figure 1)."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(256, 64), torch.randn(256, 8)
    lengths = {}
    for name in ("adamw", "adamp"):
        torch.manual_seed(1)
        layer = nn.Linear(64, 8, bias=False)
        norm = nn.BatchNorm1d(8, affine=False)
        before = layer.weight.norm().item()
        optimiser = OPTIMISERS[name](layer.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(60):
            optimiser.zero_grad()
            (norm(layer(inputs)) - targets).square().mean().backward()
            optimiser.step()
        lengths[name] = layer.weight.norm().item() / before
    assert lengths["adamp"] < 1 + 0.5 * (lengths["adamw"] - 1)


def test_where_nothing_is_projected_adamp_is_adamw():
    """Steps of the real model; delta = 0 keeps out the projections, which are by chance."""
    weights = {}
    for name in ("adamw", "adamp"):
        torch.manual_seed(0)
        model = BSRNN(BSRNNConfig(4, 1))
        optimiser = build_optimiser(OptimiserConfig(name=name, weight_decay=0.1), model)
        if name == "adamp":
            assert isinstance(optimiser, AdamP)
            optimiser.delta = 0.0
        noisy = torch.randn(2, 2_048)
        for _ in range(5):
            optimiser.zero_grad()
            model(noisy).waveform.square().mean().backward()
            optimiser.step()
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(weights["adamp"], weights["adamw"], rtol=0, atol=2e-5)


def test_adamp_goes_on_from_its_state():
    def train(steps: int, optimiser: AdamP, layer: nn.Linear) -> None:
        for step in range(steps):
            layer.weight.grad = torch.sin(torch.arange(6.0).view(2, 3) + step)
            optimiser.step()

    torch.manual_seed(0)
    through = nn.Linear(3, 2, bias=False)
    resumed = nn.Linear(3, 2, bias=False)
    resumed.load_state_dict(through.state_dict())
    train(4, whole := AdamP(through.parameters(), weight_decay=0.1), through)
    train(4, first := AdamP(resumed.parameters(), weight_decay=0.1), resumed)
    second = AdamP(resumed.parameters(), weight_decay=0.1)
    second.load_state_dict(first.state_dict())
    train(3, whole, through)
    train(3, second, resumed)
    assert torch.equal(through.weight, resumed.weight)


def test_the_first_pattern_that_a_name_matches_gives_its_group():
    model = BSRNN(BSRNNConfig(4, 1))
    config = OptimiserConfig(
        learning_rate=1e-2,
        weight_decay=0.3,
        groups=[
            ParameterGroupConfig("*bias*", lr_scale=2.0, weight_decay=0.0),
            ParameterGroupConfig("blocks.*", lr_scale=0.5),
        ],
    )
    optimiser = build_optimiser(config, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rest, biases, blocks = optimiser.param_groups
    assert {names[id(p)] for p in biases["params"]} == {name for name in names.values() if "bias" in name}
    assert {names[id(p)] for p in blocks["params"]} == {
        name for name in names.values() if name.startswith("blocks.") and "bias" not in name
    }
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(names)
    assert [group["weight_decay"] for group in (rest, biases, blocks)] == [0.3, 0.0, 0.3]
    set_learning_rate(optimiser, 1e-3)
    assert [group["lr"] for group in (rest, biases, blocks)] == [1e-3, 2e-3, 5e-4]


def test_a_pattern_without_parameters_is_refused():
    config = OptimiserConfig(groups=[ParameterGroupConfig("*"), ParameterGroupConfig("*.bias")])
    with pytest.raises(UserError, match=r"pattern '\*\.bias' is the first match of no parameter"):
        build_optimiser(config, BSRNN(BSRNNConfig(4, 1)))


def test_the_step_schedule_falls_by_its_factor_at_its_interval():
    config = OptimiserConfig(
        learning_rate=1.0, min_learning_rate=0.0, warmup_steps=0, schedule="step", step_interval=3, step_factor=0.5
    )
    assert [learning_rate(config, step, 9) for step in range(9)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_adam_couples_its_weight_decay_and_adamw_does_not():
    for name, expected in (("adam", 1 - 0.1), ("adamw", 1 - 0.1 * 0.5)):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        layer.weight.grad = torch.zeros(1, 1)
        build_optimiser(OptimiserConfig(name=name, learning_rate=0.1, weight_decay=0.5), layer).step()
        assert math.isclose(layer.weight.item(), expected, rel_tol=1e-5)


def test_the_learning_rate_warms_up_then_falls_to_its_minimum():
    config = OptimiserConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55)
    assert rates[24] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
