"""Layers that read the same tensor: they share one `v` and one `s`, and are decomposed, priced and cut together."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import rounding
from .embedding import LowRankEmbedding, module_name, set_table, table_to_dense
from .learning import LearningLinear
from .low_rank import LowRankLinear, resize
from .rounded import RoundedLinear
from .rounding import Side, fed_back
from .shape import Shape
from .split import split


def groups(model: nn.Module) -> list["Group"]:
    """Every group of layers written as bases, in model order.

    Neither the new bases that `learn` trains nor the token embedding's are among them.
    """
    found, apart = {}, {m.bases for m in model.modules() if isinstance(m, LowRankEmbedding)}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) and module not in apart:
            apart.add(getattr(module, "new", None))
            found.setdefault(module.leader, []).append((name, module))
    # A leader is not always first in model order.
    found = [sorted(members, key=lambda nm: nm[1] is not leader) for leader, members in found.items()]
    return [Group(*zip(*members, strict=True)) for members in found]


def table_of(model: nn.Module) -> "Group | None":
    """The token embedding, and the head if tied to it, as a group of one layer; None if it is dense."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, LowRankEmbedding):
        return None
    return Group((module_name(model, embedding.bases),), (embedding.bases,))


@contextlib.contextmanager
def only(chosen: Iterable[tuple["Group", torch.Tensor | None]]) -> Iterator[None]:
    """Within it, each group of weighted bases has only those of its `index`, all where that is None.

    What is left is copied, the rest only set aside.
    """
    cut = [(group, index) for group, index in chosen if index is not None]
    aside = [(group, group.factors()) for group, _ in cut]
    for group, index in cut:
        group.take(index)
    try:
        yield
    finally:
        for group, factors in aside:
            group.put(factors)


def balanced(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the product of `u: (m, r)` and `v: (r, n)`, in float64: `U sqrt(S)` and `sqrt(S) V` of its SVD.

    They have `u^T u = v v^T`, which suits one learning rate and survives bf16 best. Cost: two QRs and an (r, r) SVD.
    """
    # Columns are normalised before the QR: an unbalanced metric can spread their norms over many decades.
    norm = v.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    q_u, r_u = torch.linalg.qr(u * norm)
    q_v, r_v = torch.linalg.qr((v / norm[:, None]).T)
    a, s, b = torch.linalg.svd(r_u @ r_v.T, full_matrices=False)
    root = s.sqrt()
    return q_u @ (a * root), root[:, None] * (b @ q_v.T)


def _parted(q: torch.Tensor, scale: torch.Tensor, shape: Shape) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Whole numbers and scales of stacked layers as those of each."""
    return list(zip(q.split(shape.outputs), scale.split(shape.outputs), strict=True))


def _as_made(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable:
    """What `split` makes of parts whose whole numbers and scales are these, in order."""
    left = iter(parts)
    return lambda part, bits: RoundedLinear.of(part, *next(left), bits)


@dataclass(frozen=True, eq=False)
class Group:
    """`layers` that read the same tensor, and their `names` in the model, the owner of `v` first.

    They are all dense, or all written as bases; what is said of bases below needs the latter.
    """

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]

    name = property(lambda self: self.names[0])
    leader = property(lambda self: self.layers[0].leader)
    rank = property(lambda self: self.layers[0].rank)
    weighted = property(lambda self: isinstance(self.layers[0], LearningLinear))
    s = property(lambda self: self.leader.s(), doc="The weights of its bases: (r,).")

    @property
    def u(self) -> torch.Tensor:
        """Of all its layers: (outputs of all, r); that of one layer is not copied."""
        us = [layer.u.weight for layer in self.layers]
        return us[0] if len(us) == 1 else torch.cat(us)

    def __str__(self) -> str:
        return " + ".join(self.names)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        return zip(self.names, self.layers, strict=True)

    @property
    def shape(self) -> Shape:
        first = self.layers[0]
        if isinstance(first, nn.Embedding):
            return Shape(first.embedding_dim, (first.num_embeddings,))
        return Shape(first.in_features, tuple(layer.out_features for layer in self.layers))

    @property
    def new_rank(self) -> int:
        """How many new bases each layer has beside those that can be pruned."""
        new = getattr(self.leader, "new", None)
        return new.rank if new else 0

    @property
    def parameters(self) -> int:
        """Numbers in the factors, those of new bases too, and without the weights `s`."""
        return (self.rank + self.new_rank) * self.shape.basis_cost

    def best(self, rank: int) -> torch.Tensor:
        """Indices of the `rank` bases of largest `s`, largest first."""
        return self.s.detach().abs().argsort(descending=True, stable=True)[:rank]

    @torch.no_grad()
    def take(self, index: torch.Tensor) -> None:
        """Keep only the bases `index` (1-D, long), in place; parameters keep their identity."""
        leader = self.leader
        index = index.to(leader.v.weight.device)
        for layer in self.layers:
            resize(layer.u, layer.u.weight[:, index])
        resize(leader.v, leader.v.weight[index])
        if self.weighted:
            leader.s.take(index)

    def factors(self) -> tuple:
        """The bases of a weighted group, not copied, for `put`."""
        v, s = self.leader.v, self.leader.s
        return [layer.u.weight.data for layer in self.layers], v.weight.data, (s.scale, s.learned.data, s.survived)

    def put(self, factors: tuple) -> None:
        """Give the group these bases in place of its own."""
        us, v, s = factors
        self.leader.s.put(*s)
        resize(self.leader.v, v)
        for layer, u in zip(self.layers, us, strict=True):
            resize(layer.u, u)

    @torch.no_grad()
    def append(self, v: torch.Tensor) -> None:
        """Add bases that write nothing yet: their rows `v`: (r, in), their columns of `u` zero."""
        own = self.leader.v
        resize(own, torch.cat([own.weight, v]))
        for layer in self.layers:
            u = layer.u.weight
            resize(layer.u, torch.cat([u, u.new_zeros(len(u), len(v))], dim=1))

    def add_new(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Give every layer of a weighted group `rank` new trainable bases: `u~ = 0`, `v~` random (Basel)."""
        leader = self.leader
        for layer in self.layers:
            more = {"device": layer.u.weight.device, "dtype": layer.u.weight.dtype}
            shares = None if layer is leader else leader.new
            layer.new = LowRankLinear(layer.in_features, layer.out_features, rank, bias=False, leader=shares, **more)
            nn.init.zeros_(layer.new.u.weight)
        v = leader.new.v.weight
        v.data.copy_(torch.randn(v.shape, generator=generator) / rank**0.5)

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Replace these layers of `model` by deployed ones: `s` and new bases merged into `balanced` factors."""
        leader = self.leader
        u = self.u.double()
        if self.weighted:
            u = u * self.s.double()
        v = leader.v.weight.double()  # (r, in)
        if self.new_rank:
            u = torch.cat([u, torch.cat([layer.new.u.weight for layer in self.layers]).double()], dim=1)
            v = torch.cat([v, leader.new.v.weight.double()])
        u, v = (x.to(leader.v.weight.dtype) for x in balanced(u, v))
        resize(leader.v, v)
        deployed = []
        for layer, block in zip(self.layers, u.split(self.shape.outputs), strict=True):
            resize(layer.u, block)
            deployed.append(LowRankLinear.of(layer, deployed[0] if deployed else None))
        self._deploy(model, deployed)

    @torch.no_grad()
    def sides(self) -> tuple[Side, Side]:
        """`(outputs, inputs)`: what errors cost there, as weighted bases say; all of them know it best."""
        leader, v = self.leader, self.leader.v.weight
        costs = [layer.output_cost for layer in self.layers]
        costs = [v.new_ones(m.out_features) if c is None else c for m, c in zip(self.layers, costs, strict=True)]
        own = v.new_ones(leader.in_features) if leader.input_cost is None else leader.input_cost
        return Side.of(torch.cat(costs), self.u.T), Side.of(own, v)

    @torch.no_grad()
    def round(self, model: nn.Module, rank: int, head: int, bits: tuple[int, int]) -> None:
        """Replace these layers of `model` by deployed ones with the `rank` bases of largest `s`, of which the `head`
        largest have the first of these `bits`, the others the second.

        `s` is merged as `rounding.factors` says; there must be no new bases.
        """
        leader, order, (outputs, inputs) = self.leader, self.best(rank), self.sides()
        u = self.u[:, order].float()
        u, v = rounding.factors(u, self.s[order].float(), leader.v.weight[order].float())
        bases = Side(u.new_ones(rank))  # errors of any of them cost alike: they are orthonormal in the metric
        made = {"u": [], "v": []}
        for part, width in ((slice(head), bits[0]), (slice(head, None), bits[1])):
            if u[:, part].numel():
                made["u"].append(_parted(*fed_back(u[:, part], width, Side(bases.alone[part]), outputs), self.shape))
                made["v"].append(fed_back(v[part], width, inputs, bases))
        resize(leader.v, v.to(leader.v.weight.dtype))
        deployed = []
        for i, (layer, block) in enumerate(zip(self.layers, u.split(self.shape.outputs), strict=True)):
            resize(layer.u, block.to(leader.v.weight.dtype))
            deployed.append(LowRankLinear.of(layer, deployed[0] if deployed else None))
            deployed[-1].u = split(layer.u, head, bits, _as_made([parts[i] for parts in made["u"]]), 1)
        deployed[0].v = split(leader.v, head, bits, _as_made(made["v"]), 0)
        self._deploy(model, deployed)

    @torch.no_grad()
    def to_dense(self, model: nn.Module, bits: int = 16) -> None:
        """Replace these layers of `model` by the equivalent nn.Linear, the token embedding's by an nn.Embedding.

        bits: 16, or fewer to round layers of weighted bases that are not the token embedding's.
        """
        if self._is_table(model):
            table_to_dense(model)
            return
        dense = [layer.to_linear() for layer in self.layers]
        if bits < 16:
            outputs, inputs = self.sides()
            made = fed_back(torch.cat([m.weight for m in dense]), bits, inputs, outputs)
            parts = zip(dense, _parted(*made, self.shape), strict=True)
            dense = [RoundedLinear.of(layer, *part, bits) for layer, part in parts]
        self._replace(model, dense)

    def _is_table(self, model: nn.Module) -> bool:
        return any(isinstance(m, LowRankEmbedding) and m.bases is self.leader for m in model.modules())

    def _deploy(self, model: nn.Module, layers: list[LowRankLinear]) -> None:
        if self._is_table(model):
            set_table(model, layers[0])
        else:
            self._replace(model, layers)

    def _replace(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        for name, layer in zip(self.names, layers, strict=True):
            model.set_submodule(name, layer)
