"""Fewer and larger products, for a model that only answers: layers that read the same tensor become one product.

Where they share a `v`, their `u` are stacked; where each has its own, the `v` are; and the weights of dense ones that
are rounded. What each of them gives is its part of that product, which is computed once per input (sharing.py).
"""

from collections.abc import Iterable

import torch
from torch import nn

from .kernels import in_one, pack
from .low_rank import LowRankLinear
from .rounded import RoundedLinear, replace, tables
from .sharing import latent, read_together
from .split import SplitColumns, SplitRows


class Part(nn.Module):
    """One of several layers that read the same tensor: `after(whole(x)[..., begin:end])`.

    leader: the one of them that owns `whole`, None in itself; after: None for what has nothing left to do.
    """

    def __init__(self, whole: nn.Module | None, leader: "Part | None", place: slice, after: nn.Module | None):
        super().__init__()
        self.whole, self.after, self.place = whole, after, place
        self._leader = (leader,)  # in a tuple: not registered
        self.readers = 1
        if leader is not None:
            leader.readers += 1

    leader = property(lambda self: self._leader[0] or self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        y = latent(self, x)[..., self.place]
        return y if self.after is None else self.after(y)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """What all of them need, in the leader."""
        return self.whole(x)

    def sources(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the product depends on."""
        return (*self.whole.parameters(), *self.whole.buffers())


class FixedLinear(RoundedLinear):
    """A RoundedLinear whose weights no longer change, by a kernel that reads them in its own order (kernels.py)."""

    @classmethod
    def of(cls, layer: RoundedLinear) -> "FixedLinear":
        """What computes in place of `layer`, which may be one already; their tensors are the same."""
        if isinstance(layer, cls):
            return layer
        packed, layout = pack([layer])
        made = cls(layer.in_features, layer.out_features, False, layer.bits, "meta")
        made.register_buffer("packed", packed, persistent=False)
        made.layout = layout
        made.bias = layer.bias
        if layer.bits == 8:
            made.q, made.scale = layer.q, layer.scale
        else:  # all is in `packed`
            made.q, made.empty = nn.Parameter(layer.q.new_empty(0), requires_grad=False), layer.empty
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        return torch.ops.basis_select.product(x, self.packed, self.layout, self.bias)


class FixedProduct(nn.Module):
    """`u(v(x))` of rounded factors that no longer change, head and tail each, in one call of that kernel."""

    def __init__(self, v: nn.Module, u: nn.Module):
        super().__init__()
        self.in_features, self.out_features, self.bias = v.in_features, u.out_features, u.bias
        pairs = zip(_pieces(v), _pieces(u), strict=True)
        packed, self.layout = pack([factor for pair in pairs for factor in pair])
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        return torch.ops.basis_select.product(x, self.packed, self.layout, self.bias)


def _pieces(factor: nn.Module) -> list[nn.Module]:
    return [factor] if isinstance(factor, RoundedLinear) else [factor.head, factor.tail]


def _is_rounded(factor: nn.Module) -> bool:
    return isinstance(factor, RoundedLinear | SplitRows | SplitColumns)


@torch.no_grad()
def stack(model: nn.Module) -> None:
    """Stack, in place, the layers of a deployed model that read the same tensor, and fix what is rounded.

    Its outputs are the same but for how sums are rounded. It can then neither be saved nor trained. On a CPU
    `kernels.load` comes before it, where something is rounded.
    """
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    inside = {child for m in model.modules() if isinstance(m, LowRankLinear) for child in m.modules() if child is not m}
    inside |= {child for end in ends for child in end.modules()}  # a table is read by rows too
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, RoundedLinear | LowRankLinear) and m not in inside
    }
    for names in read_together(model, layers, [torch.zeros(1, 8, dtype=torch.long, device=model.device)]):
        alike = {}
        for name in names:
            layer = layers[name]
            shares = isinstance(layer, LowRankLinear) and layer.leader.readers > 1
            alike.setdefault(layer.leader if shares else type(layer), []).append(name)
        for some in alike.values():
            for name, part in zip(some, _parts([layers[name] for name in some]), strict=True):
                model.set_submodule(name, part)
    if model.device.type == "cpu":
        replace(model, LowRankLinear, lambda layer: layer if layer in inside or layer in ends else _fixed(layer))
        by_rows = {table for table in tables(model) if table.bits < 8}  # the kernel's order has no rows
        replace(model, RoundedLinear, lambda layer: layer if layer in by_rows else FixedLinear.of(layer))
        in_one([m for m in model.modules() if isinstance(m, FixedLinear | FixedProduct)])
    model.requires_grad_(False)


def is_stacked(model: nn.Module) -> bool:
    """Whether `stack` changed the model."""
    return any(isinstance(m, Part | FixedLinear | FixedProduct) for m in model.modules())


def _parts(layers: list[nn.Module]) -> list[nn.Module]:
    """What computes in place of alike layers that read the same tensor: themselves where they cannot be one product."""
    first = layers[0]
    if len(layers) == 1:
        return layers
    if not isinstance(first, LowRankLinear):
        whole, afters = joined(layers), [None] * len(layers)
    elif first.leader.readers > 1:
        u, afters = joined([layer.u for layer in layers]), [None] * len(layers)
        whole = u and LowRankLinear.made_of(first.leader.v, u)
    else:
        whole, afters = joined([layer.v for layer in layers]), [layer.u for layer in layers]
    if whole is None:
        return layers
    return _of_whole(
        whole, [m.rank if after else m.out_features for m, after in zip(layers, afters, strict=True)], afters
    )


def _fixed(layer: LowRankLinear) -> nn.Module:
    alone = layer.leader is layer and layer.readers == 1
    return FixedProduct(layer.v, layer.u) if alone and _is_rounded(layer.v) and _is_rounded(layer.u) else layer


def _of_whole(whole: nn.Module, widths: Iterable[int], afters: Iterable[nn.Module | None]) -> list[Part]:
    made, begin = [], 0
    for width, after in zip(widths, afters, strict=True):
        place = slice(begin, begin + width)
        made.append(Part(None if made else whole, made[0] if made else None, place, after))
        begin += width
    return made


def joined(factors: list[nn.Module]) -> nn.Module | None:
    """One layer that gives the outputs of all, one after the other; None for those that no such layer is made of."""
    first = factors[0]
    kinds = {type(factor) for factor in factors}
    if len(kinds) > 1 or type(first) not in (nn.Linear, RoundedLinear, SplitColumns):
        return None
    if isinstance(first, SplitColumns):
        head, tail = joined([f.head for f in factors]), joined([f.tail for f in factors])
        return SplitColumns(head, tail) if head and tail else None
    tensors = [f._parameters["weight"] if type(first) is nn.Linear else f.q for f in factors]
    if len({(t.shape[1], t.dtype, f.bias is None) for t, f in zip(tensors, factors, strict=True)}) > 1:
        return None
    rows, bias = sum(f.out_features for f in factors), first.bias is not None
    if type(first) is nn.Linear:
        made = nn.Linear(first.in_features, rows, bias, "meta")
        made.weight = nn.Parameter(torch.cat(tensors), requires_grad=False)
    else:
        made = RoundedLinear(first.in_features, rows, bias, first.bits, "meta")
        made.q = nn.Parameter(torch.cat(tensors), requires_grad=False)
        if first.bits == 8:
            made.scale = nn.Parameter(torch.cat([f.scale for f in factors]), requires_grad=False)
        else:
            made.empty = first.empty
    if bias:
        made.bias = nn.Parameter(torch.cat([f.bias for f in factors]), requires_grad=False)
    return made
