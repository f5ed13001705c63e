"""Norms whose statistics are of one recording: over all of it, or over what has been heard of it.

Both have one signature, norm(x, carried) -> (y, carried): what a norm must carry from one
stretch of frames to the next is a tuple of tensors, empty at the start of a recording and for a
norm that carries nothing. `normalise` gives every norm of the model that signature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bsrnn.bands import BandGroup, bands_holding

Carried = tuple[Tensor, ...]


class GroupNorm(nn.Module):
    """Group normalisation after Wu & He 2018 (arXiv 1803.08494), over whole recordings.

    The last axis is split into `num_groups` runs of neighbouring features; mean and variance of
    each recording and each run are over its features and all axes between batch and features,
    and over all frames. Equal to torch.nn.GroupNorm, with the frame axis first.
    """

    def __init__(self, num_groups: int, num_features: int, epsilon: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.group_size = num_features // num_groups
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x: Float[Tensor, "frame batch *rest"], carried: Carried = ()) -> tuple[Tensor, Carried]:
        """The last axis may hold the first few of the groups alone."""
        grouped = x.float().unflatten(-1, (-1, self.group_size))  # (T, B, ..., group, feature)
        mean, variance, carried = self._statistics(grouped, carried)
        y = ((grouped - mean) * (variance + self.epsilon).rsqrt()).flatten(-2)
        if self.weight is not None and self.bias is not None:
            num_features = y.shape[-1]
            y = torch.addcmul(self.bias[:num_features], y, self.weight[:num_features])
        return y.to(x.dtype), carried

    def _statistics(self, x: Tensor, carried: Carried) -> tuple[Tensor, Tensor, Carried]:
        if carried:
            raise ValueError("group normalisation is over a whole recording and carries nothing from part to part")
        variance, mean = torch.var_mean(x, (0, *_pooled_axes(x)), correction=0, keepdim=True)
        return mean, variance, ()


class CumulativeNorm(GroupNorm):
    """The same over the frames up to each frame: cumulative layer normalisation (Luo & Mesgarani 2019,
    arXiv 1809.07454, eq. 10 to 12), which streams.

    It carries (3, batch, group): the frames so far and the sums over them of the frames' mean and mean
    square, in 64 bits, so that an hour of frames can be summed and the two subtracted.
    """

    def _statistics(self, x: Tensor, carried: Carried) -> tuple[Tensor, Tensor, Carried]:
        variance, mean = torch.var_mean(x, _pooled_axes(x), correction=0, keepdim=True)  # of each frame
        mean, variance = mean.double(), variance.double()
        sums = torch.stack((torch.ones_like(mean), mean, variance + mean.square())).cumsum(
            1
        )  # (3, T, B, ..., group, 1)
        if carried:
            sums = sums + carried[0].reshape(3, 1, *sums.shape[2:])
        count, first, second = sums
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0)
        return mean.to(x.dtype), variance.to(x.dtype), (sums[:, -1].flatten(2),)


class BandwiseNorm(nn.Module):
    """One norm a band over the real and imaginary parts of its bins, for bands of several widths."""

    def __init__(self, groups: Sequence[BandGroup], norm: type[GroupNorm], epsilon: float) -> None:
        super().__init__()
        self.groups = list(groups)
        self.norms = nn.ModuleList(norm(group.num_bands, 2 * group.num_bins, epsilon) for group in self.groups)

    def forward(self, x: Float[Tensor, "frame batch feature"], carried: Carried = ()) -> tuple[Tensor, Carried]:
        """`feature` holds the real and imaginary part of each bin in turn, up to the upper edge of a band."""
        parts, renewed = [], []
        for group, norm in zip(bands_holding(self.groups, x.shape[-1] // 2), self.norms, strict=False):
            own = tuple(sums[..., group.first_band : group.first_band + group.num_bands] for sums in carried)
            part, own = norm(x[..., 2 * group.first_bin : 2 * (group.first_bin + group.num_bins)], own)
            parts.append(part)
            renewed.append(own)
        return torch.cat(parts, dim=-1), tuple(torch.cat(sums, dim=-1) for sums in zip(*renewed, strict=True))


def normalise(norm: nn.Module, x: Tensor, carried: Carried = ()) -> tuple[Tensor, Carried]:
    """Apply any norm of a model; a batch norm, or none where it is folded, carries nothing."""
    if isinstance(norm, GroupNorm | BandwiseNorm):
        y, carried = norm(x, carried)
        return y, carried
    return norm(x), ()


def _pooled_axes(x: Tensor) -> tuple[int, ...]:
    """The axes between batch and group, and the features: of (T, B, ..., group, feature)."""
    return (*range(2, x.ndim - 2), x.ndim - 1)
