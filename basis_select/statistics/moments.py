"""Second moments of what layers read and of the loss's gradients at what they write, over the tokens of a task."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..data.tasks import Example, Task
from ..layers.group import Group
from ..layers.shape import Shape
from ..layers.sharing import layer_input
from ..linalg import metrics
from ..system.machine import free_memory
from ..system.progress import progress
from ..training.data import Batches, drawn
from ..training.loss import activation_gradients, overwritable, pieces, response_logits
from ..training.precision import CastOnce, autocast
from .fisher import squared_gradients
from .sums import Sums, TableSums

EXAMPLES_TOGETHER = 8  # a batch of those that second moments are averaged over
Moments = tuple[dict, dict, dict]  # of inputs, of outputs, and of how many tokens, by name of the leader
TABLE = "token embedding"  # its name among second moments


def second_moments(
    model: nn.Module,
    members: Sequence[Sequence[str]],
    task: Task,
    examples: int,
    uses: metrics.Metric,
    embedding: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> Moments:
    """`A = E[x x^T]` and `G = E[g g^T]`, fp32, and of how many tokens, padding not counted: three dicts by leader name.

    members: names of the layers that read the same tensor, leader first; A is that tensor's, G a list: one moment of
    their stacked outputs, or where that is too long (layers/shape.py) one for each layer. A side still longer has its
    mean eigenvalue instead, shape (). A is the mean over the tokens that a layer sees, in all its calls; G is per token
    of the task. g is the gradient, at the outputs, of the summed negative log-likelihood of a response: half of G is
    that with the task's own labels, which shows what the task asks for, half that with labels
    drawn from the model, which is the Fisher information (the curvature of KL(parent || y) at the parent) and does
    not vanish on a parent that fits its labels. The second is scaled to the trace of the first. `embedding`: where both
    sides are used, the moments of the token embedding (vocabulary, d) are added under TABLE, see `TableSums`.
    `group`: every process of it sees its part of the batches, and all get the moments of all. What no token reaches has
    no moments. A metric that `uses` squared gradients gets those of fisher.py as its inputs.
    """
    if uses.squares:
        squares = squared_gradients(model, members, task, examples, group)
        return squares, {}, dict.fromkeys(squares, min(examples, len(task.train)))
    groups = [Group(tuple(names), tuple(model.get_submodule(n) for n in names)) for names in members]
    rows = drawn(task.train, examples)
    routed = _is_routed(model, rows[0])
    size = 1 if routed else EXAMPLES_TOGETHER
    batches = Batches(rows, batch_size=size, steps=-(-len(rows) // size), seed=0)
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    sums = Sums(model, groups, uses, routed)
    table = TableSums(model, task) if embedding and uses.inputs and uses.outputs else None
    watched = [layer for g in groups for layer in g.layers] if uses.outputs else []
    watched += [table.embedding] if table else []
    try:
        with activation_gradients(model, watched), torch.enable_grad(), CastOnce(model):
            for i in progress(range(rank, len(batches), world), "second moments", "batch", quiet=rank > 0):
                _add_batch(model, _without_padding(batches[i]) if routed else batches[i], i, sums, table)
    finally:
        for handle in [*sums.handles, *(table.handles if table else ())]:
            handle.remove()
    if group:
        for store in (*sums.sums(), *(table.sums() if table else ())):
            _sum(store, model.device, group)
    inputs, outputs = sums.moments()
    if table:
        inputs[TABLE], frequencies = table.moments(sums.count)
        outputs[TABLE] = [frequencies]
    return inputs, outputs, {name: int(n) for name, n in sums.read.items() if n}


def _add_batch(model: nn.Module, batch: dict, seed: int, sums: Sums, table: TableSums | None) -> None:
    """Add what one batch shows: a forward pass and, where outputs count, a backward pass with either kind of labels.

    What is drawn depends on `seed`, not on which process draws it.
    """
    targets = batch["targets"].to(model.device)
    real = targets >= 0
    sums.begin(batch["real"].flatten().to(model.device), real)
    with autocast(model):
        logits = response_logits(model, batch)
    if not sums.uses.outputs:
        return
    # (n, vocabulary) is the largest tensor here: the probabilities p take the place of the logits.
    p, (own, drawn) = _probabilities(logits, targets, torch.Generator(model.device).manual_seed(seed), table)
    for labels, (y, likelihood) in (("own", own), ("drawn", drawn)):
        sums.labels = labels
        at = real.nonzero()[:, 0], y[real]
        p[at] = (likelihood[real] - 1).to(p.dtype)  # the gradient of the summed cross entropy is p - y
        logits.backward(p, retain_graph=labels == "own")
        p[at] = likelihood[real].to(p.dtype)
        sums.complete()
        if table:
            table.add_gradient(labels, sums.real["body"])


@torch.no_grad()
def _probabilities(
    logits: torch.Tensor, targets: torch.Tensor, generator: torch.Generator, table: TableSums | None
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Probabilities (n, vocabulary) in dtype and place of `logits`, zero where there is no target, and of the task's
    labels and of some that are drawn `(labels, their probabilities in fp32)`, (n,) each.
    """
    made, own = overwritable(logits), targets.clamp(min=0)
    found = [(y, torch.zeros_like(y, dtype=torch.float32)) for y in (own, torch.empty_like(own))]
    for rows in pieces(logits):
        p, real = logits[rows].float().softmax(-1), targets[rows] >= 0
        found[1][0][rows] = torch.multinomial(p, 1, generator=generator)[:, 0]
        p.masked_fill_(~real[:, None], 0)
        if table:
            table.add_head(p, own[rows], real, rows)
        made[rows] = p
        for y, likelihood in found:
            likelihood[rows] = p.gather(1, y[rows, None])[:, 0]
    return made, found


@torch.no_grad()
def _is_routed(model: nn.Module, example: Example) -> bool:
    """Whether some linear layers see only some of the tokens, as experts do, in an order of their own.

    Which of them are padding is then not known, so that there must be none.
    """
    batch, head = next(iter(Batches([example], 1, 1, 0))), model.get_output_embeddings()
    tokens, routed = batch["input_ids"].numel(), []

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = layer_input(args, kwargs)
        routed.append(x.numel() != tokens * x.shape[-1])

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        with autocast(model):
            model.base_model(batch["input_ids"].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return any(routed)


def _without_padding(batch: dict) -> dict:
    """A batch of one row, its padding cut off."""
    tokens = int(batch["real"].sum())
    return batch | {key: batch[key][:, :tokens] for key in ("input_ids", "real")}


def _sum(store: dict, device: torch.device, group: dist.ProcessGroup) -> None:
    """Sums over the processes of a group, in place, of what a dict holds: tensors or counts, some may lack some."""
    shapes = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, {key: getattr(x, "shape", ()) for key, x in store.items()}, group)
    for key, shape in {key: shape for part in shapes for key, shape in part.items()}.items():
        total = torch.as_tensor(store.get(key, torch.zeros(shape)), device=device)
        dist.all_reduce(total, group=group)
        store[key] = total


def passes(members: Iterable, sizes: Iterable[int], room: int) -> list[list]:
    """`members` cut, in order, into parts whose `sizes` sum to at most `room`; a larger one is a part of its own."""
    parts, left = [], 0
    for names, size in zip(members, sizes, strict=True):
        if not parts or size > left:
            parts.append([])
            left = room
        parts[-1].append(names)
        left -= size
    return parts


def moment_bytes(shape: Shape, uses: metrics.Metric) -> int:
    """What `second_moments` holds for a group of layers of this shape: outputs for both labels."""
    if uses.squares:
        return 4 * shape.inputs * (sum(shape.outputs) + 1)  # the gradients themselves, for a moment

    return 4 * (bool(uses.inputs) * shape.input_moment + 2 * bool(uses.outputs) * shape.output_moment)


def moment_room(device: torch.device, coming: int) -> int:
    """Bytes that second moments may take: half of the memory free now after the `coming` bytes are held as well.

    The other half is for activations and the float64 work on one layer.
    """
    return (free_memory(device) - coming) // 2
