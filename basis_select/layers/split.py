"""Factors in two parts: the first bases with more bits than the rest."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .straight_through import RoundingLinear


class _Split(nn.Module):
    """A factor whose first bases, its `head`, have other bits than the rest, its `tail`."""

    dim: int  # of the weight, along which the bases lie

    def __init__(self, head: nn.Module, tail: nn.Module):
        super().__init__()
        self.head, self.tail = head, tail

    weight = property(lambda self: torch.cat([self.head.weight, self.tail.weight], self.dim))
    bias = property(lambda self: self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        if isinstance(self.head, RoundingLinear):  # one product is faster to train, deployed parts have their kernels
            weight = torch.cat([self.head.rounded_weight(), self.tail.rounded_weight()], self.dim)
            return F.linear(x, weight, self.bias)
        return self.by_parts(x)


class SplitRows(_Split):
    """`v` in two parts: (head + tail, in)."""

    dim = 0
    in_features = property(lambda self: self.head.in_features)
    out_features = property(lambda self: self.head.out_features + self.tail.out_features)

    def by_parts(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.head(x), self.tail(x)], dim=-1)


class SplitColumns(_Split):
    """`u` in two parts: (out, head + tail); the head has the bias."""

    dim = 1
    in_features = property(lambda self: self.head.in_features + self.tail.in_features)
    out_features = property(lambda self: self.head.out_features)

    def by_parts(self, z: torch.Tensor) -> torch.Tensor:
        first = self.head.in_features
        return self.head(z[..., :first].contiguous()) + self.tail(z[..., first:].contiguous())


def split(
    linear: nn.Linear, head: int, bits: tuple[int, int], by: Callable[[nn.Linear, int], nn.Module], dim: int
) -> nn.Module:
    """The factor `linear`, u or v, as `by(part, bits)` makes it, of its first `head` bases and of the others.

    dim: of the weight, along which the bases lie: 0 for v, 1 for u.
    """
    bases = linear.weight.shape[dim]
    if head in (0, bases):
        return by(linear, bits[0] if head else bits[1])
    parts = linear.weight.split([head, bases - head], dim)
    made = []
    for weight, bias in zip(parts, (linear.bias, None), strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
        part.weight, part.bias = nn.Parameter(weight.contiguous(), requires_grad=False), bias
        made.append(part)
    kind = SplitColumns if dim else SplitRows
    return kind(by(made[0], bits[0]), by(made[1], bits[1]))
