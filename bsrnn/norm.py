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

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
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
            raise ValueError(f"a micro-batch of {batch} crops is no multiple of norm_batch = {self.norm_batch}")
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
        own = torch.stack((rows.mean(0), rows.var(0, correction=0)))
        means, variances = _Gathered.apply(own, group).unbind(1)  # each (processes, features)
        mean = means.mean(0)
        variance = variances.mean(0) + means.var(0, correction=0)  # within the processes, and between them
        with torch.no_grad():
            num_rows = rows.shape[0] * group.size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (num_rows / (num_rows - 1)), self.momentum)
        normalised = (rows - mean) * (variance + self.epsilon).rsqrt()
        if self.weight is not None and self.bias is not None:
            normalised = normalised * self.weight + self.bias
        return normalised.to(x.dtype).view(x.shape)

    def inference_affine(self) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
        """The (scale, shift) this layer applies in evaluation mode: y = x · scale + shift."""
        scale = (self.running_var + self.epsilon).rsqrt()
        shift = -self.running_mean * scale
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return scale, shift


class _Gathered(torch.autograd.Function):
    """The tensors of all processes of a group, stacked; each one's gradient goes back to its process, summed."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        parts = [torch.empty_like(x) for _ in range(group.size())]
        distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        group: distributed.ProcessGroup = ctx.group  # type: ignore[attr-defined]
        gradient = gradients[0].contiguous().clone()
        distributed.all_reduce(gradient, group=group)
        return gradient[group.rank()], None


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def synchronise(model: nn.Module, group: distributed.ProcessGroup) -> None:
    """Let every BatchNorm of the model take the micro-batches of the group's processes as one norm batch."""
    for norm in batch_norms(model):
        norm.group = group


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of every BatchNorm, the tensors themselves."""
    return [statistic for norm in batch_norms(model) for statistic in (norm.running_mean, norm.running_var)]
