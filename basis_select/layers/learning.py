"""A low-rank layer while its bases are learned and chosen from: `y = u((v x) * s) + b`, s: (r,) the weights of bases.

`fold` of a Group merges `s` and new bases into the factors: what is left is a LowRankLinear.
"""

import torch
from torch import nn

from .low_rank import LowRankLinear


class Weights(nn.Module):
    """`s = scale * learned^power`, one number a basis: (r,).

    With power 1 `scale` is the decomposed singular value (frozen, it carries the metric) and `learned` starts at 1;
    with power 2 (Basel) `scale` is 1 and `learned` the root of the singular value. `survived` says how many prunings of
    `learn` each basis survived: the order in which `prune` removes them.
    """

    def __init__(self, rank: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.register_buffer("scale", torch.ones(rank, device=device, dtype=dtype))
        self.learned = nn.Parameter(torch.ones(rank, device=device, dtype=dtype))
        self.power = 1
        self.register_buffer("survived", torch.zeros(rank, dtype=torch.int16, device=device))

    def forward(self) -> torch.Tensor:
        return self.scale * self.learned**self.power

    def square(self) -> None:
        """Learn roots from now on, of weights that are what they were."""
        if self.power == 1:
            self.learned.data, self.power = self().detach().sqrt(), 2
            self.scale = torch.ones_like(self.scale)

    def take(self, index: torch.Tensor) -> None:
        """Keep only the weights `index`; `learned` keeps its identity."""
        self.put(self.scale[index], self.learned.data[index], self.survived[index])

    def put(self, scale: torch.Tensor, learned: torch.Tensor, survived: torch.Tensor) -> None:
        """Hold these in place of its own; `learned` keeps its identity."""
        self.scale, self.learned.data, self.survived = scale, learned, survived


class LearningLinear(LowRankLinear):
    """A LowRankLinear with weights `s`, which its leader owns like `v`.

    `new`, if there, is a second layer of new bases that train beside them. `output_cost`: (out,) and, in the leader,
    `input_cost`: (in,) say what a squared error of the entries of `u` and `v` costs: the diagonals of G and A. None, in
    checkpoints of version 1, is 1 everywhere.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        leader: "LearningLinear | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, rank, bias, leader, device, dtype)
        if leader is None:
            self.s = Weights(rank, device, dtype)
            self.register_buffer("input_cost", torch.ones(in_features, device=device, dtype=dtype))
        self.register_buffer("output_cost", torch.ones(out_features, device=device, dtype=dtype))
        self.new = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.new is None else y + self.new(x)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """`(v x) * s`: (..., r), in the leader."""
        z = super().project(x)
        return z * self.s().to(z.dtype)

    def sources(self) -> tuple[torch.Tensor, ...]:
        return (*super().sources(), self.s.scale, self.s.learned)

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """`u diag(s) v`: (out, in), new bases included, computed in `dtype`."""
        weight = (self.u.weight.to(dtype) * self.leader.s().to(dtype)) @ self.leader.v.weight.to(dtype)
        if self.new is not None:
            weight += self.new.dense_weight().to(dtype)
        return weight
