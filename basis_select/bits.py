"""What every group becomes where a size is bytes on disk: dense or a rank, and how many bits its weights take."""

import dataclasses
import functools
import itertools
import logging
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .data.tasks import Task
from .layers.embedding import TableEmbedding, is_tied, module_name, require_apart, round_table
from .layers.group import Group, table_of
from .layers.rounding import Bits, basis_costs, dense_cost, stored_bytes
from .layers.shape import Shape
from .linalg.budget import best_for, rising, table_rank
from .selection import Chosen, Rule, best_rank, weighted_groups
from .sizes import sizes
from .target import BYTES, Dtype, Target

log = logging.getLogger(__name__)

HEADS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # bases of more bits before those of fewer
WIDTHS = get_args(Bits)
ROUNDING = 0.5  # times what rounding costs: it is overestimated, and mended first, eval/results/NOTES.md
COUNTS = {8: 1, 4: 1, 3: 1, 2: 1.5}  # times that again, by bits: what 2 bits cost is underestimated, in NOTES.md too
TABLE = 8  # bits of the token embedding, and of its bases: few bits hurt it most, eval/results/NOTES.md
ENTRY = 90  # bytes that a safetensors header takes for a tensor, without its name


@dataclass(frozen=True, order=True)
class Form:
    """What a group may become: dense (`rank` None) with so many `bits`, or a rank, of which `head` bases have `more`
    bits than the others.
    """

    rank: int | None
    bits: int = 4
    head: int = 0
    more: int = 8

    def price(self, group: Group) -> int:
        """Bytes on disk, scales and names included."""
        if self.rank is None:
            layers = zip(group.names, group.shape.outputs, strict=True)
            return sum(_tensor(name, out, group.shape.inputs, self.bits) for name, out in layers)
        parts = (self.more, self.head), (self.bits, self.rank - self.head)
        widths = [(bits, bases) for bits, bases in parts if bases]
        part = ".head" if len(widths) > 1 else ""
        return sum(_bases(group.names, group.shape, part, bits, bases) for bits, bases in widths)

    def put(self, group: Group, model: PreTrainedModel) -> None:
        """Let the `group` of weighted bases become it, in place."""
        if self.rank is None:
            group.to_dense(model, self.bits)
        else:
            group.round(model, self.rank, self.head, (self.more, self.bits))


@functools.lru_cache(2**12)  # forms of a group have parts in common
def _bases(names: tuple[str, ...], shape: Shape, part: str, bits: int, bases: int) -> int:
    """Bytes of a part of a group's bases, of so many bits each."""
    layers = zip(names, shape.outputs, strict=True)
    factors = [(f"{names[0]}.v", bases, shape.inputs), *((f"{name}.u", out, bases) for name, out in layers)]
    return sum(_tensor(f"{name}{part}", rows, columns, bits) for name, rows, columns in factors)


def _tensor(name: str, rows: int, columns: int, bits: int) -> int:
    names = [f"{name}.q", f"{name}.scale"][: 2 if bits == 8 else 1]
    return stored_bytes(rows, columns, bits) + sum(ENTRY + len(each) for each in names)


def prune_to_bytes(
    model: PreTrainedModel,
    asked: Target,
    rule: Rule,
    task: Task | None,
    dtype: Dtype,
    keep_embedding: float | None = None,
    rounding: float = ROUNDING,
) -> None:
    """Let the groups of a decomposed `model` become what together avoids most loss within a size on disk, in place.

    The loss is what dropping bases and, times `rounding`, rounding the others costs in the metric. The token embedding,
    whole or as bases, and a head tied to it have 8 bits; what is neither targeted nor embedding keeps its 16. Raises
    ValueError for a target that is not of bytes, for scores and budgets that do not compare losses, and for a size that
    cannot be met.
    """
    found, table = weighted_groups(model), table_of(model)
    require(asked, dataclasses.replace(rule, reserve=rule.reserve + found[0].new_rank), dtype)
    rounds, rank = table is not None or can_round(model), None
    room = room_for(model, found, asked, rule.multiple_of, dtype, rounds, table is not None)
    climbs = [rising(forms(group, rule.multiple_of, rounding)) for group in found]
    if table is not None:
        rank = _rank(model, found, table, climbs, room, task, rule, keep_embedding)
        room -= _form(table, rank).price(table)
    chosen = best_for(climbs, room, "bytes")
    for group, form in zip(found, chosen, strict=True):
        form.put(group, model)
    if table is not None and rank < table.rank:
        _form(table, rank).put(table, model)
    elif rounds:
        if table is not None:
            table.to_dense(model)
        round_table(model, TABLE)


def require(asked: Target, rule: Rule, dtype: Dtype) -> None:
    """Raise ValueError unless a size on disk can be shared so."""
    if asked.name != "size" or asked.unit == "parameters":
        raise ValueError(f"bits=auto shares bytes: give a size such as 45MB or 6x with it, not {asked}")
    if rule.score != "energy" or rule.budget != "global":
        raise ValueError(
            f"bits=auto weighs losses: it goes with score=energy and budget=global, not {rule.score} and {rule.budget}"
        )
    if rule.reserve:
        raise ValueError("bits=auto goes without new bases: leave out learn.new and extend, or choose bits=16")
    if BYTES[dtype] != 2:
        raise ValueError(
            f"bits=auto counts scales and norms as 16 bits each: dtype is bfloat16 or float16, not {dtype}"
        )


def room_for(
    model: PreTrainedModel,
    found: list[Group],
    asked: Target,
    multiple_of: int,
    dtype: Dtype,
    rounds: bool,
    table: bool,
) -> float:
    """Bytes that a size on disk leaves for these groups, dense or as bases, on any device, beside the rest.

    rounds: whether the token embedding gets fewer bits; table: whether it is or will be bases, which then are no part
    of the rest. Raises ValueError if the groups do not fit, each the smallest that it can become.
    """
    rest = _elsewhere(model, [name for group in found for name in group.names], rounds)
    rest += _whole_table(model) if rounds and not table else 0
    least = rest
    for group in found:
        few = [Form(rank, min(WIDTHS)) for rank in (None, multiple_of) if rank is None or rank <= group.shape.full_rank]
        least += min(form.price(group) for form in few)
    if least > (most := allowed(model, asked, dtype)):
        raise ValueError(
            f"{asked} is too small: this model has {least:,} bytes at least, with 2 bits and the fewest bases, and "
            f"{int(most):,} are allowed"
        )
    return most - rest


def allowed(model: PreTrainedModel, asked: Target, dtype: Dtype) -> float:
    """Bytes that the checkpoint may have."""
    return asked.allowed(sizes(model)["parameters_dense"], dtype) * BYTES[dtype]


def largest_share(
    model: PreTrainedModel, layers: dict[str, nn.Module], asked: Target, dtype: Dtype, table: bool = False
) -> float:
    """The largest fraction of the parameters of these dense `layers`, `{name: layer}`, that a size on disk leaves: that
    with the fewest bits for each. Raises ValueError if there is none.

    table: whether the token embedding will be bases, of which the same fraction stays.
    """
    rounds, whole = can_round(model), sum(stored_bytes(*m.weight.shape, min(WIDTHS)) for m in layers.values())
    rest = _elsewhere(model, list(layers), rounds)
    if table:
        whole += _whole_table(model)
    elif rounds:
        rest += _whole_table(model)
    room = allowed(model, asked, dtype) - rest
    if room <= 0:
        raise ValueError(
            f"{asked} leaves nothing for the targeted layers: the rest of the model alone is {rest:,} bytes"
        )
    return min(1.0, room / whole)


def _elsewhere(model: PreTrainedModel, names: list[str], rounds: bool) -> int:
    """Bytes of all but the layers of these names and, if it `rounds` it, the embedding: norms, biases, what is not
    targeted; the file's own too.
    """
    embedding, head, apart = model.get_input_embeddings(), model.get_output_embeddings(), list(names)
    if rounds:
        apart.append(module_name(model, embedding))
        if embedding.tied if isinstance(embedding, TableEmbedding) else is_tied(model):
            apart.append(module_name(model, head))
    apart = tuple(f"{name}." for name in apart)
    state = {n: x.to("meta") for n, x in model.state_dict().items() if not n.startswith(apart) or n.endswith(".bias")}
    total = 4 * ENTRY  # the file's length, format and empty tensors
    for name, tensor in revert_weight_conversion(model, state).items():  # files hold every expert by itself
        width = 2 if tensor.is_floating_point() else tensor.element_size()
        total += width * tensor.numel() + ENTRY + len(name)
    return total


def can_round(model: PreTrainedModel) -> bool:
    """Whether the dense token embedding, on any device, can have fewer bits; a warning says why if not."""
    try:
        require_apart(model)
    except ValueError as error:
        log.warning("the token embedding keeps its 16 bits: %s", error)
        return False
    return True


def _whole_table(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    return _tensor(module_name(model, embedding), *embedding.weight.shape, TABLE)


def _form(table: Group, rank: int) -> Form:
    """Of an embedding of which `rank` bases stay, whole if that is all of them."""
    return Form(None if rank == table.rank else rank, TABLE)


def _rank(
    model: PreTrainedModel,
    found: list[Group],
    table: Group,
    climbs: list,
    room: float,
    task: Task | None,
    rule: Rule,
    keep_embedding: float | None,
) -> int:
    """The rank of an embedding that is written as bases."""
    if keep_embedding is not None:
        return table_rank(keep_embedding, table.shape, rule.multiple_of)
    if task is None:
        raise ValueError("the embedding's part of a size is found on a validation split: pass a task or keep_embedding")

    def choose(rank: int) -> Chosen:
        chosen = best_for(climbs, room - _form(table, rank).price(table), "bytes")
        return [(g, None if f.rank is None else g.best(f.rank)) for g, f in zip(found, chosen, strict=True)]

    return best_rank(model, task, rule.multiple_of, choose)


@torch.no_grad()
def forms(group: Group, multiple_of: int = 16, rounding: float = ROUNDING) -> list[tuple[Form, int, float]]:
    """`[(what a group of weighted bases may become, bytes, the loss in the metric that it avoids), ...]`.

    rounding: how many times the loss that rounding makes counts.
    """
    order = group.best(group.rank)
    s = group.s[order].double().cpu()
    u = group.u[:, order].float()
    v = group.leader.v.weight[order].float()
    outputs, inputs = group.sides()
    energy = _sums(s.square())
    costs = basis_costs(u, s.to(u), v, WIDTHS, outputs, inputs)
    lost = {bits: _sums(COUNTS[bits] * costs[bits]) for bits in WIDTHS}
    found = []
    for rank in range(multiple_of, group.rank + 1, multiple_of):
        found += [(Form(rank, bits), energy[rank] - rounding * lost[bits][rank]) for bits in WIDTHS]
        for more, bits in itertools.combinations(WIDTHS, 2):
            for head in (h for h in HEADS if h < rank):
                rounded = lost[more][head] + lost[bits][rank] - lost[bits][head]
                found.append((Form(rank, bits, head, more), energy[rank] - rounding * rounded))
    weight = (u * s.to(u)) @ v
    for bits in WIDTHS:
        rounded = COUNTS[bits] * dense_cost(weight, bits, outputs, inputs)
        found.append((Form(None, bits), energy[-1] - rounding * rounded))
    return [(form, form.price(group), value) for form, value in found]


def _sums(x: torch.Tensor) -> list[float]:
    """Sums of the first i, i from 0 on."""
    return [0.0, *x.cumsum(0).tolist()]
