"""Second moments of what layers read and of the loss's gradients at what they write, over the tokens of a task."""

import os
from collections.abc import Callable, Iterable, Sequence

import psutil
import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from ..data.tasks import Example, Task
from ..layers.embedding import lookup_scale
from ..layers.group import Group
from ..layers.shape import Shape, moment_shape
from ..linalg import metrics
from ..training.data import Batches, drawn
from ..training.loss import activation_gradients, response_logits
from ..training.precision import autocast
from .fisher import squared_gradients
from .readers import layer_input

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
    sides are used, the moments of the token embedding (vocabulary, d) are added under TABLE, see `_TableMoments`.
    `group`: every process of it sees its part of the batches, and all get the moments of all. What no token reaches has
    no moments. A metric that `uses` squared gradients gets those of fisher.py as its inputs.
    """
    if uses.squares:
        squares = squared_gradients(model, members, task, examples, group)
        return squares, {}, dict.fromkeys(squares, min(examples, len(task.train)))
    inputs, outputs = {}, {"own": {}, "drawn": {}}
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    mask, count = {}, {"body": 0, "head": 0}  # the head sees response tokens only (response_logits)
    labels, pending = "own", {}
    group_of = {names[0]: names for names in members}
    read, calls = dict.fromkeys(group_of, 0), {}  # tokens read so far; how often a layer was called in this batch

    @torch.no_grad()
    @torch.autocast(model.device.type, enabled=False)  # sums of products are what bf16 must not touch
    def add(store: dict, key: str | tuple[str, int], x: torch.Tensor) -> None:
        if not len(x):
            return
        shape = moment_shape(x.shape[1])
        if not shape:
            store[key] = store.get(key, 0) + x.square().mean(1).sum()
        else:
            if key not in store:
                store[key] = x.new_zeros(shape)
            metrics.add_product(store[key], x, x)

    def seen(name: str, x: torch.Tensor) -> torch.Tensor:
        x, real = x.detach().flatten(0, -2), mask["head" if name == head else "body"]
        return (x[real] if name == head or not routed else x).float()

    def add_outputs(names: Sequence[str], parts: dict[str, torch.Tensor]) -> None:
        some = next(iter(parts.values()))
        shape = shapes[names[0]]
        wide = zip(names, shape.outputs, strict=True)
        wide = [parts[n] if n in parts else some.new_zeros(len(some), width) for n, width in wide]
        if len(shape.output_sides) < len(wide):
            wide = [torch.cat(wide, dim=1)]
        for i, x in enumerate(wide):
            add(outputs[labels], (names[0], i), x)

    def on_gradient(names: Sequence[str], name: str, call: int, g: torch.Tensor) -> None:
        parts = pending.setdefault((names[0], call), {})
        parts[name] = seen(name, g)
        if len(parts) == len(names):
            add_outputs(names, pending.pop((names[0], call)))

    def on_forward(names: Sequence[str], name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            call = calls[name] = calls.get(name, 0) + 1
            if name == names[0] and uses.inputs:
                x = seen(name, layer_input(args, kwargs))
                read[name] += len(x)
                add(inputs, name, x)
            if uses.outputs and output.requires_grad:  # no gradient reaches what is computed without a graph
                output.register_hook(lambda g: on_gradient(names, name, call, g))

        return hook

    shapes = {names[0]: Group(names, [model.get_submodule(n) for n in names]).shape for names in members}
    rows = drawn(task.train, examples)
    routed = _is_routed(model, rows[0])
    handles = [
        model.get_submodule(n).register_forward_hook(on_forward(names, n), with_kwargs=True)
        for names in members
        for n in names
    ]
    generator = torch.Generator(model.device)
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    table = _TableMoments(model, task) if embedding and uses.inputs and uses.outputs else None
    size = 1 if routed else EXAMPLES_TOGETHER
    try:
        batches = Batches(rows, batch_size=size, steps=-(-len(rows) // size), seed=0)
        watched = [model.get_submodule(n) for names in members for n in names] if uses.outputs else []
        watched += [table.embedding] if table else []
        with activation_gradients(model, watched), torch.enable_grad():
            for i in tqdm(range(rank, len(batches), world), desc="second moments", unit="batch", disable=rank > 0):
                batch = _without_padding(batches[i]) if routed else batches[i]
                calls.clear()
                generator.manual_seed(i)  # what is drawn does not depend on who draws it
                mask["body"] = batch["real"].flatten().to(model.device)
                targets = batch["targets"].to(model.device)
                mask["head"] = targets >= 0
                count = {which: count[which] + int(mask[which].sum()) for which in count}
                with autocast(model):
                    logits = response_logits(model, batch).float()
                if not uses.outputs:
                    continue
                p = logits.detach().softmax(-1)
                other = torch.multinomial(p, 1, generator=generator)[:, 0]
                if table:
                    table.add_head(p, targets, mask["head"])
                for labels, y in (("own", targets), ("drawn", other.masked_fill(targets < 0, -100))):
                    nn.functional.cross_entropy(logits, y, reduction="sum").backward(retain_graph=labels == "own")
                    if table:
                        table.add_gradient(labels, mask["body"])
                    while pending:  # a layer whose output led nowhere has no gradient
                        (leader, _), parts = pending.popitem()
                        add_outputs(group_of[leader], parts)
    finally:
        for handle in [*handles, *(table.handles if table else ())]:
            handle.remove()
    if group:
        for store in (count, read, inputs, *outputs.values(), *(table.sums() if table else ())):
            _sum(store, model.device, group)
    # The loss is a sum over the tokens a layer sees: A is their mean, G is per token of the body for every
    # layer alike, so that A and G of all layers give comparable estimates.
    for name, moment in inputs.items():
        _complete(moment.div_(read[name]))
    found = {}
    for (name, i), own in outputs["own"].items():
        both = _both(own, outputs["drawn"].pop((name, i)))
        found.setdefault(name, []).append(_complete(both.div_(count["body"])))
    if table:
        inputs[TABLE], frequencies = table.moments(count)
        found[TABLE] = [frequencies]
    return inputs, found, {name: int(n) for name, n in read.items() if n}


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
            response_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return any(routed)


def _without_padding(batch: dict) -> dict:
    """A batch of one row, its padding cut off."""
    tokens = int(batch["real"].sum())
    return batch | {key: batch[key][:, :tokens] for key in ("input_ids", "real")}


class _TableMoments:
    """The moments of a token embedding E: (vocabulary, d), summed over batches: one of its columns, one of its rows.

    Row t is read where token t stands, with gradient g: `F = diag(frequency) (x) E[g g^T]`. A tied head multiplies
    hidden states h by E: `F = diag(E[(p - y)^2]) (x) E[h h^T]`, over response tokens, rows taken as independent. The
    sum of the two is replaced by the one Kronecker product of the same trace and the same proportions.
    """

    def __init__(self, model: nn.Module, task: Task):
        self.embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        vocabulary, d = self.embedding.weight.shape
        self.gradient, like = None, self.embedding.weight.detach()
        self.frequency, self.scale = token_counts(task, vocabulary), lookup_scale(self.embedding)
        self.columns = {labels: like.new_zeros(d, d, dtype=torch.float32) for labels in ("own", "drawn")}
        self.handles = [self.embedding.register_forward_hook(self._on_embedding)]
        self.tied = getattr(head, "weight", None) is self.embedding.weight
        if self.tied:
            self.hidden = like.new_zeros(d, d, dtype=torch.float32)
            self.rows = {labels: like.new_zeros(vocabulary, dtype=torch.float32) for labels in ("own", "drawn")}
            self.handles.append(head.register_forward_hook(self._on_head))

    def _on_embedding(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.register_hook(self._on_gradient)

    def _on_gradient(self, g: torch.Tensor) -> None:
        self.gradient = g

    def _on_head(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.states = args[0].detach().flatten(0, -2)

    def add_gradient(self, labels: str, real: torch.Tensor) -> None:
        g, self.gradient = self.gradient.flatten(0, -2)[real].float() * self.scale, None
        self.columns[labels].addmm_(g.T, g)

    def add_head(self, p: torch.Tensor, y: torch.Tensor, real: torch.Tensor) -> None:
        """p: (n, vocabulary) probabilities and y: (n,) labels at the hidden states that the head has just read."""
        if not self.tied:
            return
        h, p, y = self.states[real].float(), p[real], y[real]
        self.hidden.addmm_(h.T, h)
        square = p.square().sum(0)
        self.rows["drawn"] += p.sum(0) - square
        self.rows["own"] += square.index_add_(0, y, 1 - 2 * p.gather(1, y[:, None])[:, 0])

    def sums(self) -> list[dict[str, torch.Tensor]]:
        """What is summed over tokens: dicts of tensors."""
        return [self.columns, self.rows, {"hidden": self.hidden}] if self.tied else [self.columns]

    def moments(self, count: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`(columns: (d, d), rows: (vocabulary,))`."""
        parts = [(_both(*self.columns.values()) / count["body"], self.frequency / self.frequency.sum())]
        if self.tied:
            parts.append((self.hidden / count["head"], _both(*self.rows.values()) / count["body"]))
        parts = [(c.double(), r.to(c.device).double()) for c, r in parts]
        columns = sum(c * r.sum() for c, r in parts)
        rows = sum(r * trace(c) for c, r in parts)
        return columns / trace(columns), rows


def _both(own: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Half of the moment with each kind of labels, the second scaled to the trace of the first; in place of `own`.

    Where one of them is zero, the other.
    """
    first, second = float(trace(own)), float(trace(drawn))
    if first == 0 or second == 0:
        return own.add_(drawn)
    return own.add_(drawn, alpha=first / second).div_(2)


def _sum(store: dict, device: torch.device, group: dist.ProcessGroup) -> None:
    """Sums over the processes of a group, in place, of what a dict holds: tensors or counts, some may lack some."""
    shapes = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, {key: getattr(x, "shape", ()) for key, x in store.items()}, group)
    for key, shape in {key: shape for part in shapes for key, shape in part.items()}.items():
        total = torch.as_tensor(store.get(key, torch.zeros(shape)), device=device)
        dist.all_reduce(total, group=group)
        store[key] = total


def token_counts(task: Task, vocabulary: int) -> torch.Tensor:
    """How often the training split of `task` has each token: (vocabulary,), float64."""
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for example in task.train:
        counts += torch.bincount(torch.tensor(example.input_ids), minlength=vocabulary)
    return counts


def trace(moment: torch.Tensor) -> torch.Tensor:
    """Of (n, n), of its diagonal (n,), or of its mean eigenvalue ()."""
    return (moment.diagonal() if moment.dim() == 2 else moment).sum()


def _complete(moment: torch.Tensor) -> torch.Tensor:
    """The lower triangle mirrored, in place."""
    return moment.copy_(moment.tril() + moment.tril(-1).T) if moment.dim() else moment


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

    The other half is for activations and the float64 work on one layer. Processes of one machine share its memory.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return (free - coming) // 2
