"""Batch normalisation whose statistics cover a stated number of crops.

In a scaling study the batch behind a normalisation statistic is a setting of the science:
if it followed the micro-batch or the number of processes, a large model that accumulates
gradients over small micro-batches would be normalised over fewer crops than a small one that
does not, and the sizes would differ in more than size. `norm_batch` fixes it:

- a micro-batch of several times `norm_batch` crops is normalised in groups of `norm_batch`,
  each as if it came alone;
- a micro-batch that is a part of `norm_batch` is normalised together with the micro-batches of
  the processes beside it (`synchronise`), on CPU as on GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, after Ioffe & Szegedy 2015 (arXiv 1502.03167).

    Momentum 0.1 and epsilon 1e-5 as in torch.nn.BatchNorm1d, whose results this equals where
    `norm_batch` is None (the whole batch).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, norm_batch: int | None = None, affine: bool = True) -> None:
        super().__init__()
        self.num_features = num_features
        self.norm_batch = norm_batch
        self.momentum = 0.1
        self.epsilon = 1e-5
        self.group: distributed.ProcessGroup | None = None  # whose micro-batches are one norm batch
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Float[Tensor, "frame batch *rest"]) -> Float[Tensor, "frame batch *rest"]:
        """Normalise; ValueError if training on a batch that `norm_batch` does not divide."""
        batch = x.shape[1]
        if not self.training or self.norm_batch is None or self.norm_batch == batch:
            return self._normalise(x)
        if self.group is not None and batch * self.group.size() == self.norm_batch:
            return self._normalise_together(x, self.group)
        if batch % self.norm_batch:
            raise ValueError(f"a micro-batch of {batch} crops is not a multiple of norm_batch = {self.norm_batch}")
        return torch.cat([self._normalise(group) for group in x.split(self.norm_batch, dim=1)], dim=1)

    def _normalise(self, x: Tensor) -> Tensor:
        normalised = F.batch_norm(
            x.reshape(-1, self.num_features),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.epsilon,
        )
        return normalised.view(x.shape)

    def _normalise_together(self, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        """By the mean and variance of all the group's micro-batches, which are of one shape."""
        rows = x.reshape(-1, self.num_features).float()
        num_rows = rows.shape[0] * group.size()
        with torch.no_grad():
            mean, variance = _statistics_of_all(rows, group)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (num_rows / (num_rows - 1)), self.momentum)
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        normalised = _NormalisedTogether.apply(rows, weight, bias, mean, variance, self.epsilon, group)
        return normalised.to(x.dtype).view(x.shape)

    def inference_affine(self) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
        """The (scale, shift) this layer applies in evaluation mode: y = x · scale + shift."""
        scale = (self.running_var + self.epsilon).rsqrt()
        shift = -self.running_mean * scale
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return scale, shift


def _statistics_of_all(
    rows: Float[Tensor, "row feature"], group: distributed.ProcessGroup
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """The mean and the variance over the rows of all processes of a group, which have as many each."""
    own = rows.new_zeros(2, rows.shape[1])
    # At a momentum of 1 what it keeps are the batch's: several times as fast on a CPU as torch.var_mean.
    F.batch_norm(rows, own[0], own[1], training=True, momentum=1.0)
    of_all = own.new_empty(group.size(), *own.shape)
    distributed.all_gather(list(of_all), own, group=group)
    means, variances = of_all.unbind(1)
    within = variances.mean(0) * ((len(rows) - 1) / len(rows))  # batch_norm keeps unbiased ones
    return means.mean(0), within + means.var(0, correction=0)


class _NormalisedTogether(torch.autograd.Function):
    """Rows less `mean`, over √(variance + epsilon), times `weight`, plus `bias`.

    The mean and the variance are of the rows of all processes of a group, and so is the gradient that goes through
    them: with x̂ the normalised rows and g the output's gradient, that of the rows is
    weight / √(variance + epsilon) · (g − mean(g) − x̂ · mean(g · x̂)), these means being over all rows too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "row feature"],
        weight: Float[Tensor, " feature"],
        bias: Float[Tensor, " feature"],
        mean: Float[Tensor, " feature"],
        variance: Float[Tensor, " feature"],
        epsilon: float,
        group: distributed.ProcessGroup,
    ) -> Float[Tensor, "row feature"]:
        ctx.save_for_backward(rows, weight, mean, variance)
        ctx.epsilon, ctx.group = epsilon, group
        return F.batch_norm(rows, mean, variance, weight, bias, False, 0.0, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, variance = ctx.saved_tensors
        # As of constant statistics: weight / √(variance + epsilon) · g, Σ g · x̂ and Σ g.
        to_rows, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(), rows, weight, mean, variance, None, None, False, ctx.epsilon, [True, True, True]
        )
        sums = torch.stack((to_weight, to_bias))
        distributed.all_reduce(sums, group=ctx.group)
        mean_with_normalised, mean_gradient = sums / (len(rows) * ctx.group.size())
        scale = (variance + ctx.epsilon).rsqrt()
        slope = -weight * scale.square() * mean_with_normalised
        to_rows.addcmul_(rows, slope).sub_(slope * mean + weight * scale * mean_gradient)
        return to_rows, to_weight, to_bias, None, None, None, None


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def synchronise(model: nn.Module, group: distributed.ProcessGroup) -> None:
    """Let every BatchNorm of the model take the micro-batches of the group's processes as one norm batch."""
    for norm in batch_norms(model):
        norm.group = group


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of every BatchNorm, the tensors themselves."""
    return [statistic for norm in batch_norms(model) for statistic in (norm.running_mean, norm.running_var)]
