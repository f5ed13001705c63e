"""Batch normalisation whose statistics cover a stated number of crops.

In a scaling study the batch behind a normalisation statistic is a setting of the science:
if it followed the micro-batch, a large model that accumulates gradients over small
micro-batches would be normalised over fewer crops than a small one that does not, and the
sizes would differ in more than size. `norm_batch` fixes it. A micro-batch of several times
`norm_batch` crops is normalised in groups of `norm_batch`, each as if it came alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
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
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Float[Tensor, "frame batch *rest"]) -> Float[Tensor, "frame batch *rest"]:
        """Normalise; ValueError if training on a batch that `norm_batch` does not divide."""
        batch = x.shape[1]
        if not self.training or self.norm_batch is None or self.norm_batch == batch:
            return self._normalise(x)
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

    def inference_affine(self) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
        """The (scale, shift) this layer applies in evaluation mode: y = x · scale + shift."""
        scale = (self.running_var + self.epsilon).rsqrt()
        shift = -self.running_mean * scale
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return scale, shift
