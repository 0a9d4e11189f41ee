"""Layers of few bits while they train: they compute with what will be deployed, and gradients pass straight through."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from . import kernels
from .rounded import RoundedLinear, replace, tables
from .rounding import RANGE, by_group, rows_at_once, storable

SMALL = 2**20  # numbers of a weight up to which a GPU rounds it with others while it trains: calls take longest there


class _Rounding(torch.autograd.Function):
    """A weight (out, in) rounded to whole numbers of so many bits times `storable` scales, returned in `dtype`.

    Gradients pass through the rounding as if it were none (straight-through, arXiv 1308.3432), and what is outside of
    the range of the whole numbers gets none; those of the scales are LSQ's (arXiv 1902.08153). One function, since the
    operations it is made of, each with a pass over the weights, would take most of a step; on a CPU some rows at a
    time, so that what one operation leaves is still in the cache for the next, or in one pass by cpp/training.h where
    that compiles.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.bits, ctx.shape, by_row = bits, scale.shape, _by_row(scale)
        ctx.save_for_backward(weight, by_row)
        if _has_kernel(weight, dtype):
            scales = by_row.squeeze(-1)
            return torch.ops.basis_select.rounded_weight(weight, scales, *RANGE[bits], dtype == torch.bfloat16)
        made = torch.empty_like(weight, dtype=dtype)
        for rows in _pieces(weight):
            x = by_group(weight[rows], bits) / by_row[rows]
            made[rows] = _whole_(x, bits).mul_(by_row[rows]).flatten(1)[:, : weight.shape[1]]
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weight, by_row = ctx.saved_tensors
        if _has_kernel(weight, grad.dtype):
            options = by_row.squeeze(-1), grad.contiguous(), *RANGE[ctx.bits]
            of_weight, of_scale = torch.ops.basis_select.rounded_weight_backward(weight, *options)
            return of_weight, of_scale.view(ctx.shape), None, None
        of_weight, of_scale = torch.empty_like(weight), torch.empty_like(by_row)
        for rows in _pieces(weight):
            x, g = by_group(weight[rows], ctx.bits) / by_row[rows], by_group(grad[rows].to(weight.dtype), ctx.bits)
            lowest, highest = RANGE[ctx.bits]
            inside = (x >= lowest) & (x <= highest)
            of_scale[rows] = _whole_(x.clone(), ctx.bits).sub_(x.mul_(inside)).mul_(g).sum(-1, keepdim=True)
            of_weight[rows] = torch.mul(g, inside, out=x).flatten(1)[:, : weight.shape[1]]
        return of_weight, of_scale.view(ctx.shape), None, None


def _has_kernel(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether cpp/training.h rounds such a weight to such a dtype."""
    known = weight.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16)
    here = weight.device.type == "cpu" and weight.is_contiguous()
    return known and here and kernels.try_load("without them weights of few bits train more slowly on a CPU")


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight (out, in), those that are rounded at once; of one without values, in a plan, the
    first alone: each takes as much memory, and none has products."""
    rows = rows_at_once(weight)
    end = rows if isinstance(weight, FakeTensor) else len(weight)
    return (slice(start, start + rows) for start in range(0, end, rows))


def _by_row(scale: torch.Tensor) -> torch.Tensor:
    """(out, groups, 1), as `by_group` has weights: scales as they are stored."""
    return storable(scale).view(len(scale), -1, 1)


def _whole_(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The whole numbers that stand for x, in its place."""
    return x.round_().clamp_(*RANGE[bits])


class RoundingLinear(nn.Linear):
    """An nn.Linear that computes with its weight rounded, while weight and `scale` train."""

    _made: tuple = None, None  # of which version, and what `_round_together` has made of it

    @classmethod
    @torch.no_grad()
    def training(cls, layer: RoundedLinear) -> "RoundingLinear":
        """What trains in place of a deployed layer, and computes the same."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        made.bits, made.weight = layer.bits, nn.Parameter(layer.weight.contiguous())
        made.scale, made.bias = nn.Parameter(layer.numbers()[1].clone()), layer.bias
        return made

    def with_values(self, values: dict[str, torch.Tensor]) -> "RoundingLinear":
        """Another such layer that has these values of its parameters."""
        made = RoundingLinear(self.in_features, self.out_features, self.bias is not None, "meta")
        made.bits, made.scale = self.bits, None
        for name, value in values.items():
            setattr(made, name, nn.Parameter(value))
        return made

    @torch.no_grad()
    def deployed(self) -> RoundedLinear:
        scale = storable(self.scale)
        q = _whole_(by_group(self.weight, self.bits) / scale.view(len(scale), -1, 1), self.bits)
        return RoundedLinear.of(self, q.flatten(1)[:, : self.in_features].to(torch.int8), scale, self.bits)

    def rounded_weight(self) -> torch.Tensor:
        """(out, in), what the deployed layer's weight will be, in the dtype of products."""
        dtype, (version, made) = _products_dtype(self.weight), self._made
        if version == self._version() and made.dtype == dtype:
            return made
        return _Rounding.apply(self.weight, self.scale, self.bits, dtype)

    def _version(self) -> tuple[int, int]:
        return self.weight._version, self.scale._version

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.rounded_weight(), self.bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, _Rounding.apply(self.weight, self.scale, self.bits, self.weight.dtype))


def _products_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _round_together(layers: Iterable[RoundingLinear]) -> None:
    """Make what `rounded_weight` of each gives, all weights that have bits and scales alike by the same operations."""
    alike = {}
    for m in layers:
        alike.setdefault((m.bits, m.in_features), []).append(m)
    for (bits, _), some in alike.items():
        weights, scales = (torch.cat([getattr(m, name) for m in some]) for name in ("weight", "scale"))
        made = _Rounding.apply(weights, scales, bits, _products_dtype(scales))
        for m, part in zip(some, made.split([m.out_features for m in some]), strict=True):
            m._made = m._version(), part


def in_training(model: nn.Module) -> nn.Module:
    """The model, in place, with rounded layers that train, but a token embedding's that is no bases."""
    apart = tables(model)
    replace(model, RoundedLinear, lambda layer: layer if layer in apart else RoundingLinear.training(layer))
    return model


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, `model` is `in_training`; after it, its rounded layers are again what is deployed."""
    trained = [m for m in in_training(model).modules() if isinstance(m, RoundingLinear)]
    small = [m for m in trained if m.weight.device.type == "cuda" and m.weight.numel() <= SMALL]
    hook = model.register_forward_pre_hook(lambda *_: _round_together(small))
    try:
        yield model
    finally:
        hook.remove()
        replace(model, RoundingLinear, RoundingLinear.deployed)
