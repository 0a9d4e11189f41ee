"""Every targeted nn.Linear becomes a LowRankLinear with all its bases: the function does not change yet."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .checkpoint.format import register, require_loadable, unstorable
from .data.tasks import Task
from .layers.embedding import install, is_tied, lookup_scale, module_name, settle_ties
from .layers.group import Group
from .layers.learning import LearningLinear
from .layers.low_rank import LowRankLinear
from .layers.rounded import Int8Linear
from .layers.shape import Shape
from .linalg import metrics
from .linalg.metrics import METRICS, MetricName
from .options import Count, checked
from .statistics.moments import (
    TABLE,
    Moments,
    layer_input,
    moment_bytes,
    moment_room,
    passes,
    second_moments,
    token_counts,
    trace,
)
from .training.data import Batches, require_fit

log = logging.getLogger(__name__)

WATCHED = 8  # examples in which layers that read the same tensor are looked for
SHIFT = 1e-2  # of their mean, added to the weights of rows and columns of an embedding: eval/results/NOTES.md


def targets(model: nn.Module, required: bool = True) -> dict[str, nn.Module]:
    """`{name: nn.Linear}` that can be decomposed, in model order.

    The output head counts unless it is tied to the embedding. Layers that compute something else than nn.Linear does,
    such as Conv1D and 3-D expert parameters, do not, nor do those of which a parameter has more than one name, because
    layers share it or one layer is used in two places, nor those of which checkpoints cannot hold factors: if
    `required`, they are named in a warning, and finding nothing raises ValueError. If not, layers that were rounded to
    int8 count as well.
    """
    head = model.get_output_embeddings() if is_tied(model) else None
    factors = {child for m in model.modules() if isinstance(m, LowRankLinear) for child in m.children()}
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    found, skipped, shared = {}, [], {}
    for name, module in model.named_modules():
        if module in factors or module is head:
            continue
        own = list(module.parameters(recurse=False))
        if is_plain(module) or (not required and isinstance(module, Int8Linear)):
            several = {" and ".join(owners[p]): None for p in own if len(owners[p]) > 1}
            shared |= several
            if not several:
                found[name] = module
        elif isinstance(module, nn.Linear | Conv1D) or any(p.dim() == 3 for p in own):
            skipped.append(f"{name} ({type(module).__name__})")
    lost = unstorable(model, found)
    found = {name: module for name, module in found.items() if name not in lost}
    if not required:
        return found
    if skipped:
        log.warning("left as they are, for they do not compute what nn.Linear does: %s", _some(skipped))
    if shared:
        log.warning("left dense, for they are one parameter under several names: %s", _some(list(shared)))
    if lost:
        log.warning("left dense, for checkpoints of this architecture have no place for their factors: %s", _some(lost))
    if not found:
        raise ValueError(
            f"nothing to decompose in {type(model).__name__}: it has no nn.Linear layer besides the tied head"
            + (f"; {_some(others)} cannot be decomposed" if (others := [*skipped, *shared, *lost]) else "")
        )
    return found


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes what nn.Linear does, and is called to do so.

    The output projection of nn.MultiheadAttention is not called: its weights are read. Of a subclass with a forward of
    its own, a small layer is tried on random numbers.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    own = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if type(module).forward is nn.Linear.forward:
        return True
    return own <= {"weight", "bias"} and _computes_a_product(module)


@torch.no_grad()
def _computes_a_product(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 3, 5), (7, 5), (7,)))
    bias = None if module.bias is None else bias
    for training in (False, True):
        small = copy.copy(module)
        small.__dict__ = {
            **module.__dict__,
            "_parameters": {"weight": nn.Parameter(weight), "bias": bias if bias is None else nn.Parameter(bias)},
            "in_features": 5,
            "out_features": 7,
            "training": training,
        }
        for scale in (1e-3, 1, 1e3):
            expected = F.linear(scale * x, weight, bias)
            try:
                found = small.forward(scale * x)
            except Exception:  # another signature or another shape is another function
                return False
            if not torch.is_tensor(found) or found.shape != expected.shape:
                return False
            if not torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * scale):
                return False
    return True


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
    moments: tuple | None = None,
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
    if task is not None:
        require_fit(model, task)
    found = dense_groups(model, targets(model), task, share)
    owners = deal([g.shape for g in found], dist.get_world_size(group) if group else 1)
    rank, parts, made = dist.get_rank(group) if group else 0, [range(len(found))], {}
    if measured:
        factors = sum(g.shape.full_cost for g in found)
        room = moment_room(model.device, factors * model.dtype.itemsize)
        if group:  # all make the same passes
            least = torch.tensor(room, device=model.device)
            dist.all_reduce(least, dist.ReduceOp.MIN, group)
            room = int(least)
        parts = passes(parts[0], [moment_bytes(g.shape, uses) for g in found], room)
    for part in parts:
        if measured:
            names, first = [found[i].names for i in part], part is parts[0]
            moments = second_moments(model, names, task, examples, uses, embedding and first, group)
        if embedding and uses.inputs and uses.outputs and table is None:
            table = _of_table(moments)
        for i in tqdm([i for i in part if owners[i] == rank], desc="decompose", unit="layer", disable=rank > 0):
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
        u, s, v = metrics.decompose(
            [linear.weight for linear in dense.layers],
            [uses.outputs(m, moments[2][dense.name]) for m in moments[1][dense.name]] if uses.outputs else None,
            uses.inputs(moments[0][dense.name], moments[2][dense.name]) if uses.inputs else None,
        )
    except ValueError as error:
        raise ValueError(f"{dense}: {error}") from error
    return fill(dense.layers, u[:, :rank], s[:rank], v[:rank])


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
    table = install(model, module_name(model, embedding), len(s), is_tied(model), scale, weighted=True)
    table.u.weight.copy_(u)
    table.v.weight.copy_(v)
    table.s.scale.copy_(s)
    table.requires_grad_(False)
    return model


class _Called(nn.Module):
    """Stands for a layer in a forward, and notes whether anything but calling it is done: reading its weights."""

    def __init__(self, name: str, layer: nn.Module, read: set[str]):
        super().__init__()
        self._held = name, layer, read  # in a tuple: not registered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._held[1](*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        name, layer, read = self.__dict__["_held"]
        if attribute in ("weight", "bias"):
            read.add(name)
        return getattr(layer, attribute)


def dense_groups(model: nn.Module, layers: dict[str, nn.Module], task: Task | None, share: bool = True) -> list[Group]:
    """The `layers`, `{name: nn.Linear}`, that are only called, as Groups of those that read one tensor, if they `share`
    an input basis, and one by one if not.
    """
    layers = only_called(model, layers, task)
    members = same_input(model, layers, task) if share else [[name] for name in layers]
    return [Group(tuple(names), tuple(layers[name] for name in names)) for names in members]


@torch.no_grad()
def only_called(model: nn.Module, layers: dict[str, nn.Module], task: Task | None) -> dict[str, nn.Module]:
    """Those of `layers` whose weights the model does not read by itself, as it could no longer; a warning of others.

    A forward of one example of `task` shows it, or of any tokens if it is None, in both modes: some models rescale
    their weights where the mode changes. Raises ValueError, naming the class, for what is no decoder.
    """
    read, shapes, training = set(), [], model.training
    ids = _watched_ids(task, 0).to(model.device)
    for name, layer in layers.items():
        model.set_submodule(name, _Called(name, layer, read))
    head = model.get_output_embeddings()
    watch = head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape)) if head else None
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            for mode in (not training, training):
                made = model.train(mode)(input_ids=ids)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} does not run on token ids alone: {why}") from error
    finally:
        model.train(training)
        if watch:
            watch.remove()
        for name, layer in layers.items():
            model.set_submodule(name, layer)
    if getattr(made, "logits", None) is None:
        raise ValueError(f"{type(model).__name__} gives no logits for token ids: it is no causal language model")
    if shapes and shapes[-1][:-1].numel() != ids.numel():
        raise ValueError(
            f"{type(model).__name__} cannot be decomposed: its head reads {list(shapes[-1])} for {ids.numel()} tokens, "
            "not one vector a token"
        )
    if read:
        log.warning(
            "left dense, for the model reads their weights, and does not only call them: %s", _some(sorted(read))
        )
    return {name: layer for name, layer in layers.items() if name not in read}


def _watched_ids(task: Task | None, i: int) -> torch.Tensor:
    """Token ids (1, L) of an example, of any tokens if there is no task."""
    return next(iter(Batches(task.train[i : i + 1], 1, 1, seed=0)))["input_ids"] if task else torch.zeros(1, 8).long()


@torch.no_grad()
def same_input(model: nn.Module, layers: dict[str, nn.Module], task: Task | None) -> list[list[str]]:
    """Names of layers that read the very same tensors, found by watching a forward: `[[q, k, v], [o], ...]`.

    One of an example of `task`, or of any tokens if it is None; of some more if there are layers that it does not call,
    such as experts. One that is called in none stands alone. One that is called several times reads a list of tensors.
    """
    reads = {}

    def watch(name: str, held: dict[int, tuple]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = layer_input(args, kwargs)
            # Held, so that no second tensor can get its id; what was overwritten in between is another input.
            number, _ = held.setdefault(id(x), (len(held), x))
            version = None if x.is_inference() else x._version
            reads.setdefault(name, []).append((number, version, module.in_features))

        return hook

    for i in range(min(WATCHED, len(task.train)) if task else 1):
        held = {}
        handles = [m.register_forward_pre_hook(watch(name, held), with_kwargs=True) for name, m in layers.items()]
        try:
            model(input_ids=_watched_ids(task, i).to(model.device))
        finally:
            for handle in handles:
                handle.remove()
        for read in reads.values():
            read.append(i)  # tensors of another forward get the same numbers
        if len(reads) == len(layers):
            break
    found = {}
    for name in layers:
        found.setdefault(tuple(reads.get(name, [name])), []).append(name)
    return list(found.values())
