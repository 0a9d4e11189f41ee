"""Layers made from the tensors of a checkpoint alone: several of them as one, whole or the part of one device.

Servers fuse layers that read the same tensor (q, k and v; gate and up) and deal the rows and columns of layers to
devices. Here a fused layer is `y = [u_1(v x), u_2(v x), W_3 x, ...]`: `v x` is computed once for all that share it, and
neighbours that read the same are one product.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from ..checkpoint.format import BasisSelectConfig, factored_weights
from ..layers.embedding import LowRankEmbedding, RoundedEmbedding, TableEmbedding
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear
from ..layers.rounding import GROUP, number_bytes, row_bytes, scales_of
from ..layers.split import SplitColumns, SplitRows

FACTOR = re.compile(r"\.[uv](\.head|\.tail)?$")  # what the name of a factor ends in
Tensors = Mapping[str, torch.Tensor]


class Stored(NamedTuple):
    """A tensor of a checkpoint: the weight of a linear layer or, if that is rounded, its whole numbers or scales; of
    fewer than 8 bits both are in `q`.

    rows: how many outputs the weight has, None for those of the layer that it belongs to; inputs likewise.
    """

    kind: Literal["weight", "q", "scale"]
    bits: int | None
    rows: int | None
    inputs: int | None

    def columns(self, inputs: int) -> int | None:
        """How many columns so many inputs of the weight have, None if there are no columns."""
        if self.kind == "scale":
            return None
        return inputs if self.bits in (None, 8) else row_bytes(inputs, self.bits)

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """What it holds: that of whole numbers, or else the model's."""
        if self.kind != "q":
            return of_model
        return torch.int8 if self.bits == 8 else torch.uint8

    def shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """That of a tensor of a layer of so many outputs and inputs."""
        rows, inputs = self.rows or rows, self.inputs or inputs
        columns = self.columns(inputs)
        return (rows,) if columns is None else (rows, columns)

    def part(self, tensor: torch.Tensor, rows: torch.Tensor, columns: range) -> torch.Tensor:
        """A copy of what these `rows` of the weight and, where its inputs are the layer's, these `columns` are of.

        Raises ValueError where they have a scale in common with columns that are not among them.
        """
        tensor = tensor[rows]
        if self.inputs or tensor.dim() == 1:
            return tensor
        if self.bits in (None, 8):
            return tensor[:, columns.start : columns.stop].contiguous()
        groups = -(-(tensor.shape[1] - 1) // (row_bytes(GROUP, self.bits) - 1))
        numbers, scales, power = tensor.split([tensor.shape[1] - 1 - groups, groups, 1], dim=1)
        first, last = (number_bytes(n, self.bits) for n in (columns.start, columns.stop))
        if columns.start % GROUP or (columns.stop % GROUP and last < numbers.shape[1]):
            raise ValueError(
                f"of {self.bits} bits, {GROUP} inputs share a scale: they cannot be parted at {columns.start} and "
                f"{columns.stop} over devices; use fewer of them, or a checkpoint of 8 or 16 bits"
            )
        own = scales[:, columns.start // GROUP : scales_of(columns.stop)]
        return torch.cat([numbers[:, first:last], own, power], dim=1)


class Names:
    """What config.json describes, by names of layers.

    rename: what a server calls a layer, or the factor of one, that the checkpoint calls so.
    """

    def __init__(self, config: BasisSelectConfig, rename: Callable[[str], str] = str):
        if config.format_version == 2 and any(bits < 8 for bits in config.rounded.values()):
            raise ValueError(
                "weights of 4 or 3 bits of format version 2: make the checkpoint anew, or load and save it"
            )
        self.ranks = {rename(name): rank for name, rank in config.ranks.items()}
        self.bits = {rename(name): bits for name, bits in config.rounded.items()}
        self.heads = {rename(name): head for name, head in getattr(config, "heads", {}).items()}
        self.leaders = {rename(name): rename(group[0]) for group in config.groups for name in group}
        table = config.embedding or getattr(config, "table", None)
        self.table = {**table, "name": rename(table["name"])} if table else None
        self.guards = {rename(weight.removesuffix(".weight")) for weight in factored_weights(config)}
        factored = {*self.ranks, *(FACTOR.sub("", name) for name in self.bits if config.embedding)}
        factors = {name for name in self.bits if FACTOR.search(name) and FACTOR.sub("", name) in factored}
        self.layers = {*self.ranks, *(self.bits.keys() - factors)}

    def leader(self, layer: str) -> str | None:
        """The layer that owns the `v` that `layer` reads: itself, another, or None for a dense layer."""
        return self.leaders.get(layer, layer) if layer in self.ranks else None

    def parts(self, layer: str) -> dict[str, int]:
        """`{"": rank}` of a layer of bases or, where they are in two parts, `{".head": bases, ".tail": bases}`."""
        rank, head = self.ranks[layer], self.heads.get(self.leader(layer))
        return {"": rank} if head is None else {".head": head, ".tail": rank - head}

    def of(self, layer: str) -> dict[str, Stored]:
        """`{name below the layer: Stored}` of all that it has in the file but for its bias."""
        if layer not in self.ranks:
            return _stored("", self.bits.get(layer), None, None)
        found = {}
        for part, bases in self.parts(layer).items():
            found |= _stored(f"u{part}.", self.bits.get(f"{layer}.u{part}"), None, bases)
            if self.leader(layer) == layer:
                found |= _stored(f"v{part}.", self.bits.get(f"{layer}.v{part}"), bases, None)
        return found

    def of_table(self, layer: str) -> dict[str, Stored]:
        """The same of `layer`, the token embedding's table."""
        if "bits" in self.table:
            return _stored("", self.table["bits"], None, None)
        rank = self.table["rank"]
        u, v = self.bits.get(f"{layer}.u"), self.bits.get(f"{layer}.v")
        return _stored("u.", u, None, rank) | _stored("v.", v, rank, None)


def _stored(name: str, bits: int | None, rows: int | None, inputs: int | None) -> dict[str, Stored]:
    kinds = ("weight",) if bits is None else ("q", "scale") if bits == 8 else ("q",)
    return {f"{name}{kind}": Stored(kind, bits, rows, inputs) for kind in kinds}


class Fused(nn.Module):
    """Layers that read one tensor as one: each of `us` reads one of the products of `vs`, or the tensor itself."""

    def __init__(self, us: Sequence[nn.Module], vs: Sequence[nn.Module], reads: Sequence[int | None]):
        super().__init__()
        self.us, self.vs, self.reads = nn.ModuleList(us), nn.ModuleList(vs), tuple(reads)

    def latents(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [v(x) for v in self.vs]

    def outputs(self, x: torch.Tensor, z: Sequence[torch.Tensor]) -> torch.Tensor:
        y = [u(x if i is None else z[i]) for u, i in zip(self.us, self.reads, strict=True)]
        return y[0] if len(y) == 1 else torch.cat(y, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs(x, self.latents(x))


def fuse(
    names: Names, layers: Sequence[str], tensors: Mapping[str, Tensors], vs: Mapping[str, nn.Module], inputs: int
) -> Fused:
    """The `layers`, of so many `inputs`, as one.

    tensors: `{layer: its tensors, by names as of Names.of}`; vs: `{leader: its v}`, each as of `latent`.
    """
    runs = []
    for layer in layers:
        kind = {name: stored for name, stored in names.of(layer).items() if not name.startswith("v")}
        reads = names.leader(layer)
        if not runs or runs[-1][:2] != (reads, kind):
            runs.append((reads, kind, []))
        runs[-1][2].append(layer)
    read = [*dict.fromkeys(reads for reads, _, _ in runs if reads is not None)]
    us = []
    for _, kind, together in runs:
        whole = {name: torch.cat([tensors[layer][name] for layer in together]) for name in kind}
        us.append(_layer(names, together[0], "u", whole, inputs))
    return Fused(us, [vs[name] for name in read], [reads and read.index(reads) for reads, _, _ in runs])


def latent(names: Names, layer: str, tensors: Tensors, inputs: int) -> nn.Module:
    """The `v` that a layer owns which has so many `inputs`."""
    return _layer(names, layer, "v", tensors, inputs)


def table(names: Names, layer: str, tensors: Tensors, inputs: int) -> TableEmbedding:
    """The token embedding, `inputs` numbers a token, whose table is `layer`; a head tied to it is its `bases`."""
    stored = names.of_table(layer)
    if "bits" in names.table:
        return RoundedEmbedding(_linear("", stored, tensors, inputs), tied=False)
    rank = names.table["rank"]
    u, v = _linear("u.", stored, tensors, inputs), _linear("v.", stored, tensors, inputs)
    bases = LowRankLinear(inputs, u.out_features, rank, bias=False, device="meta")
    bases.u, bases.v = u, v
    return LowRankEmbedding(bases, tied=False)


def _layer(names: Names, layer: str, factor: str, tensors: Tensors, inputs: int) -> nn.Module:
    """A layer that is dense, or a `factor` of one, in one part or two."""
    stored = names.of(layer)
    if layer not in names.ranks:
        return _linear("", stored, tensors, inputs)
    made = [_linear(f"{factor}{part}.", stored, tensors, inputs) for part in names.parts(layer)]
    return made[0] if len(made) == 1 else (SplitRows if factor == "v" else SplitColumns)(*made)


def _linear(name: str, stored: Mapping[str, Stored], tensors: Tensors, inputs: int) -> nn.Module:
    """An nn.Linear or a RoundedLinear, without bias, of what is stored under `name`."""
    found = {s.kind: (s, tensors[key]) for key, s in stored.items() if key == f"{name}{s.kind}"}
    about, first = next(iter(found.values()))
    rows, inputs = first.shape[0], about.inputs or inputs
    if about.bits is None:
        made = nn.Linear(inputs, rows, bias=False, device="meta")
        made.weight = nn.Parameter(first, requires_grad=False)
        return made
    made = RoundedLinear(inputs, rows, False, about.bits, device="meta")
    made.q = nn.Parameter(found["q"][1], requires_grad=False)
    if about.bits == 8:
        made.scale = nn.Parameter(found["scale"][1], requires_grad=False)
    else:
        made.empty = first.new_empty(0, dtype=torch.get_default_dtype())
    return made
