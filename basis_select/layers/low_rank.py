"""A linear layer written as rank-one bases, as it is deployed: `y = u(v(x)) + b`, u: (out, r), v: (r, in).

`v` and `u` are plain nn.Linear children, so PEFT, torchao, FSDP and exporters need no special case. Layers that read
the same tensor (q/k/v, gate/up) can share one `v`: the first of them, the leader, owns it, the others hold only their
`u`, and the product `v x` is computed once per input (sharing.py).
"""

from typing import Any

import torch
from torch import nn

from .sharing import latent


class LowRankLinear(nn.Module):
    """`in_features -> rank -> out_features`; drop-in for nn.Linear. `leader` is the layer whose `v` this one shares."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        leader: "LowRankLinear | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if leader is None:
            self.v = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.u = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        # In a tuple, so that nn.Module does not register it; never self, so that a dropped layer is freed at once.
        self._leader = (leader,)
        self.readers = 1  # how many layers read the product of this leader
        if leader is not None:
            leader.readers += 1

    leader = property(lambda self: self._leader[0] or self)
    rank = property(lambda self: self.u.in_features)

    def __getattr__(self, name: str) -> Any:
        # Tools that edit layers in place reach for it, such as resize_token_embeddings.
        if name == "weight":
            raise AttributeError(
                "a layer written as bases has no weight: change the model before it is decomposed or after dequantize()"
            )
        return super().__getattr__(name)

    @classmethod
    def like(cls, linear: nn.Linear, rank: int, **kwargs: Any) -> "LowRankLinear":
        """A layer of the shape, bias, device and dtype of an nn.Linear, weights uninitialised."""
        more = {"device": linear.weight.device, "dtype": linear.weight.dtype, **kwargs}
        return cls(linear.in_features, linear.out_features, rank, linear.bias is not None, **more)

    @classmethod
    def made_of(cls, v: nn.Module, u: nn.Module) -> "LowRankLinear":
        """A layer of these factors."""
        made = cls(v.in_features, u.out_features, u.in_features, False, device="meta")
        made.v, made.u = v, u
        return made.eval()

    @classmethod
    def of(cls, other: "LowRankLinear", leader: "LowRankLinear | None" = None) -> "LowRankLinear":
        """A layer that takes over the factors of another one."""
        made = cls(other.in_features, other.out_features, other.rank, other.u.bias is not None, leader, device="meta")
        made.u = other.u
        if leader is None:
            made.v = other.v
        return made.train(other.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        return self._modules["u"](latent(self, x))  # u, but without a search that takes as long as small products

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """`v x`: (..., r), in the leader."""
        # Products of strided inputs are rounded differently where the weights require gradients.
        return self._modules["v"](x.contiguous())

    def sources(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the product depends on, those of adapters and of int8 weights too."""
        v = self._modules["v"]
        return (v._parameters["weight"],) if type(v) is nn.Linear else (*v.parameters(), *v.buffers())

    def extra_repr(self) -> str:
        shared = "" if self.leader is self else ", shared v"
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}{shared}"

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """`u v`: (out, in), computed in `dtype`."""
        return self.u.weight.to(dtype) @ self.leader.v.weight.to(dtype)

    @torch.no_grad()
    def dense_weight(self) -> torch.Tensor:
        """The weight of the equivalent nn.Linear: (out, in), multiplied in fp32 or better."""
        own = self.u.weight.dtype
        return self.product(torch.promote_types(own, torch.float32)).to(own)

    def to_linear(self) -> nn.Linear:
        """The equivalent nn.Linear (no smaller, any tool reads it)."""
        u = self.u
        linear = nn.Linear(self.in_features, self.out_features, u.bias is not None, "meta")
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
        if u.bias is not None:
            linear.bias = nn.Parameter(u.bias.detach().clone(), requires_grad=False)
        return linear


def resize(linear: nn.Linear, weight: torch.Tensor) -> None:
    """Give a layer another weight, in place: the parameter keeps its identity."""
    linear.weight.data = weight.contiguous()
    linear.weight.grad = None
    linear.out_features, linear.in_features = weight.shape
