"""Every targeted nn.Linear becomes a LowRankLinear with all its bases: the function does not change yet."""

import logging
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from .checkpoint.format import register, require_loadable
from .checkpoint.targets import targets
from .data.tasks import Task
from .layers.embedding import head_bias, install, is_tied, lookup_scale, module_name, require_apart, settle_ties
from .layers.group import Group
from .layers.learning import LearningLinear
from .layers.low_rank import LowRankLinear
from .layers.shape import Shape
from .linalg import metrics
from .linalg.metrics import METRICS, MetricName
from .options import Count, checked
from .statistics.moments import TABLE, Moments, moment_bytes, moment_room, passes, second_moments
from .statistics.readers import dense_groups, only_called
from .statistics.sums import token_counts, trace
from .system.progress import progress
from .training.data import require_fit

log = logging.getLogger(__name__)

SHIFT = 1e-2  # of their mean, added to the weights of rows and columns of an embedding: eval/results/NOTES.md


Metric = Annotated[
    MetricName,
    Field(
        description="What an error of a weight costs: kronecker (K-FAC) estimates the loss, whitened (SVD-LLM) the "
        "error of the output, fisher (FWSVD) weights inputs, plain weights nothing."
    ),
]
Sharing = Annotated[
    bool,
    Field(
        description="Layers that read the same tensor (q, k and v; gate and up) get one input basis, which is stored "
        "and computed once."
    ),
]
Examples = Annotated[Count, Field(description="Training examples that the metric is estimated on.")]


@checked
@torch.no_grad()
def decompose(
    model: PreTrainedModel,
    task: Task | None = None,
    moments: Moments | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    metric: Metric = "kronecker",
    share: Sharing = True,
    examples: Examples = 256,
    embedding: Annotated[
        bool, Field(description="The token embedding, and the head if it is tied to it, become bases too.")
    ] = False,
) -> PreTrainedModel:
    """Write every targeted layer of `model` as a weighted sum of all its bases, in place; returns the model.

    `metric` is one of METRICS. `share`: layers that read the same tensor get one input basis. The second moments of
    metrics that use them come from `examples` training examples of `task`, drawn at random, whose tokens all count
    except padding, in as many passes over the examples as memory asks for; `moments` are those of an earlier
    `second_moments`. `group`: a torch.distributed group, every process of which calls this with the same model:
    examples and layers are dealt over them, and all end with the same bits, those of one process but for the rounding
    of the moments' sums. `embedding`: the token embedding, and the head if tied to it, become bases too, which the
    kronecker metric weighs like those of any layer. Raises ValueError for an unknown metric, a missing task, a model
    that is already decomposed, and, with the layer's name, for non-finite weights or moments. The Fisher information as
    a product of A and G is K-FAC's (arXiv 1503.05671); the formulas stand in linalg/metrics.py.

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> bs.sizes(model)["bases"]
        576
    """
    if any(isinstance(m, LowRankLinear) for m in model.modules()):
        raise ValueError("this model is decomposed already")
    require_loadable(model)
    uses, table = METRICS[metric], None
    measured = moments is None and bool(uses.inputs or uses.outputs)
    if task is None and (measured or embedding):
        raise ValueError(f"metric {metric!r} with embedding={embedding} looks at task data: pass a task")
    require_range(model.dtype)
    if task is not None:
        require_fit(model, task)
    if embedding:
        _require_table(model, task)
    found = dense_groups(model, targets(model), task, share)
    owners = deal([g.shape for g in found], dist.get_world_size(group) if group else 1)
    rank, parts, made = dist.get_rank(group) if group else 0, [range(len(found))], {}
    if measured:
        parts = passes(parts[0], [moment_bytes(g.shape, uses) for g in found], _room(model, found, group))
    for part in parts:
        if measured:
            names, first = [found[i].names for i in part], part is parts[0]
            moments = second_moments(model, names, task, examples, uses, embedding and first, group)
        if embedding and uses.inputs and uses.outputs and table is None:
            table = _of_table(moments)
        for i in progress([i for i in part if owners[i] == rank], "decompose", "group", quiet=rank > 0):
            if reached(found[i], moments, uses):
                made[i] = factored(found[i], moments, uses)
            if part is parts[-1] and not group:  # until then every pass must see the dense model
                while made:
                    _install(model, found, *made.popitem())
        if measured:
            del moments  # before the next pass makes its own
    if group:
        for i, owner in enumerate(owners):
            layers = _from_owner(model, found[i], made.pop(i, None), dist.get_global_rank(group, owner), group)
            if layers:
                _install(model, found, i, layers)
    register(model)
    return decompose_embedding(model, task, table) if embedding else model


def _require_table(model: PreTrainedModel, task: Task) -> None:
    """Raise ValueError unless the token embedding, and a head tied to it, can be written as bases."""
    require_apart(model)
    head = model.get_output_embeddings()
    if is_tied(model) and not only_called(model, {module_name(model, head): head}, task):
        raise ValueError("the model reads the weight of its head, which bases do not have: leave out embedding")


def require_range(dtype: torch.dtype) -> None:
    """Raise ValueError for float16: bases in a metric are larger than it can hold."""
    if dtype == torch.float16:
        raise ValueError("bases have numbers that float16 cannot hold: load the model in float32 or bfloat16")


def _room(model: PreTrainedModel, found: Sequence[Group], group: dist.ProcessGroup | None) -> int:
    """Bytes for moments beside all factors of `found`, the same in every process: all make the same passes."""
    room = moment_room(model.device, sum(g.shape.full_cost for g in found) * model.dtype.itemsize)
    if group:
        least = torch.tensor(room, device=model.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group)
        room = int(least)
    return room


def _of_table(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    if TABLE not in moments[0]:
        raise ValueError("these moments lack the embedding's: collect them with second_moments(..., embedding=True)")
    return moments[0][TABLE], moments[1][TABLE][0]


def _install(model: nn.Module, found: Sequence[Group], i: int, layers: Sequence[nn.Module]) -> None:
    for name, layer in zip(found[i].names, layers, strict=True):
        model.set_submodule(name, layer)


def deal(shapes: list[Shape], ranks: int) -> list[int]:
    """Which of `ranks` processes decomposes each group: the costliest first, always to the one with least to do."""

    def cost(shape: Shape) -> int:
        return 3 * shape.dense_cost * shape.full_rank + 10 * shape.full_rank**3  # products, eigenvectors

    load, owners = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -cost(shapes[i])):
        owners[i] = load.index(min(load))
        load[owners[i]] += cost(shapes[i])
    return owners


def _from_owner(
    model: PreTrainedModel, dense: Group, layers: list[LearningLinear] | None, source: int, group: dist.ProcessGroup
) -> list[LearningLinear] | None:
    """The layers of a `dense` Group in every process, sent by `source`, which has made them; None if it did not."""
    sent = torch.tensor(layers[0].rank if layers else 0, device=model.device)
    dist.broadcast(sent, source, group)
    rank = int(sent)
    if not rank:
        return None
    if layers is None:
        like, shape = dense.layers[0].weight, dense.shape
        u, v = like.new_empty(sum(shape.outputs), rank), like.new_empty(rank, shape.inputs)
        layers = fill(dense.layers, u, like.new_empty(rank), v)
    for layer in layers:
        for tensor in layer.state_dict().values():
            dist.broadcast(tensor.view(torch.uint8), source, group)
    return layers


def reached(group: Group, moments: Moments | None, uses: metrics.Metric) -> bool:
    """Whether there are moments of this Group that are not zero, where the metric uses any; a warning if not."""
    for side, used in zip(moments or (), (uses.inputs, uses.outputs), strict=False):
        if not used:
            continue
        names = ", ".join(group.names)
        if group.name not in side:
            log.warning("%s is never reached by the task's data: left dense", names)
            return False
        found = side[group.name]
        if not all(float(trace(moment)) for moment in (found if isinstance(found, list) else [found])):
            log.warning("%s has no effect on the task's loss: left dense", names)
            return False
    return True


def factored(
    dense: Group, moments: Moments | None, uses: metrics.Metric, rank: int | None = None
) -> list[LearningLinear]:
    """A LearningLinear for every layer of a `dense` Group, leader first: all bases or only the best `rank`.

    moments: `(inputs, outputs, samples)` as from `second_moments`, read only where the metric uses them. At most one
    group's float64 work exists at a time. Raises ValueError with the names for non-finite weights or moments.
    """
    try:
        outputs = [uses.outputs(m, moments[2][dense.name]) for m in moments[1][dense.name]] if uses.outputs else None
        inputs = uses.inputs(moments[0][dense.name], moments[2][dense.name]) if uses.inputs else None
        u, s, v = metrics.decompose([linear.weight for linear in dense.layers], outputs, inputs)
    except ValueError as error:
        raise ValueError(f"{dense}: {error}") from error
    made = fill(dense.layers, u[:, :rank], s[:rank], v[:rank])
    if inputs is not None:
        made[0].input_cost.copy_(metrics.diagonal(inputs))
    if outputs is not None:
        sides = zip(outputs, dense.shape.output_sides, strict=True)
        costs = torch.cat([metrics.diagonal(moment).expand(side) for moment, side in sides])
        for layer, cost in zip(made, costs.split(dense.shape.outputs), strict=True):
            layer.output_cost.copy_(cost)
    return made


def fill(linears: Sequence[nn.Linear], u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> list[LearningLinear]:
    """The layers that `u: (sum out, r)`, `s: (r,)`, `v: (r, in)` make of nn.Linear that share one `v`."""
    made = []
    for linear, block in zip(linears, u.split([m.out_features for m in linears]), strict=True):
        layer = LearningLinear.like(linear, len(s), leader=made[0] if made else None)
        layer.u.weight.copy_(block)
        if linear.bias is not None:
            layer.u.bias.copy_(linear.bias)
        made.append(layer.requires_grad_(False))
    made[0].v.weight.copy_(v)
    made[0].s.scale.copy_(s)
    return made


@torch.no_grad()
def decompose_embedding(
    model: PreTrainedModel, task: Task, moments: tuple[torch.Tensor, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Write the embedding of `model`, and its head if tied, as weighted bases, in place.

    moments: `(columns, rows)`, in which the weights of these bases compare with those of linear layers decomposed in
    the kronecker metric. Without them the metric weighs every row by how often the training split of `task` has the
    token. In both, rows are shrunk towards all alike: tokens that the task does not use stay roughly what they were.
    """
    embedding = model.get_input_embeddings()
    scale = lookup_scale(embedding)
    columns, rows = moments or (None, token_counts(task, embedding.num_embeddings))
    weight = embedding.weight.detach()
    rows = [metrics.shifted(rows.to(weight.device), SHIFT)]
    u, s, v = metrics.decompose([weight], rows, None if columns is None else metrics.shifted(columns, SHIFT))
    settle_ties(model)
    bias = head_bias(model, is_tied(model))
    table = install(model, module_name(model, embedding), len(s), is_tied(model), scale, weighted=True)
    table.u.weight.copy_(u)
    if bias is not None:
        table.u.bias.copy_(bias)
    table.v.weight.copy_(v)
    table.s.scale.copy_(s)
    table.requires_grad_(False)
    return model
