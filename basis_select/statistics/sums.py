"""Sums over the tokens of batches, which hooks take while a model runs: what second moments are made of."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..data.tasks import Task
from ..layers.embedding import lookup_scale
from ..layers.group import Group
from ..layers.shape import moment_shape
from ..layers.sharing import layer_input
from ..linalg import metrics
from ..training.loss import pieces
from ..training.precision import short_factors

BLOCK = 256  # rows and columns of a moment that are mirrored at once
ROWS = 16  # of (tokens, vocabulary) that are squared at once


@torch.no_grad()
def _add(store: dict, key: str | tuple[str, int], x: torch.Tensor) -> None:
    """Add `x^T x` of `x: (n, width)` to what `store` has under `key`, or its mean over a side that is too long."""
    if not len(x):
        return
    # Sums of products are what bf16 must not touch.
    with torch.autocast(x.device.type, enabled=False), short_factors(x) as x:
        shape = moment_shape(x.shape[1])
        if not shape:
            store[key] = store.get(key, 0) + torch.linalg.vector_norm(x).square() / x.shape[1]
            return
        if key not in store:
            store[key] = x.new_zeros(shape)
        metrics.add_product(store[key], x, x)


def _both(own: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Half of the moment with each kind of labels, the second scaled to the trace of the first; in place of `own`.

    Where one of them is zero, the other.
    """
    first, second = float(trace(own)), float(trace(drawn))
    if first == 0 or second == 0:
        return own.add_(drawn)
    return own.add_(drawn, alpha=first / second).div_(2)


def _complete(moment: torch.Tensor) -> torch.Tensor:
    """The lower triangle mirrored, in place and block by block, since a moment may be as large as all else."""
    for at in range(0, len(moment) if moment.dim() else 0, BLOCK):
        rows = slice(at, at + BLOCK)
        moment[rows, at + BLOCK :] = moment[at + BLOCK :, rows].T
        corner = moment[rows, rows]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return moment


def trace(moment: torch.Tensor) -> torch.Tensor:
    """Of (n, n), of its diagonal (n,), or of its mean eigenvalue ()."""
    return (moment.diagonal() if moment.dim() == 2 else moment).sum()


def token_counts(task: Task, vocabulary: int) -> torch.Tensor:
    """How often the training split of `task` has each token: (vocabulary,), float64."""
    tokens = torch.tensor([token for example in task.train for token in example.input_ids])
    return torch.bincount(tokens, minlength=vocabulary).double()


class Sums:
    """Sums over tokens of products of what layers read and of the gradients at what they write, added by hooks.

    inputs: `{leader: (in, in)}`; outputs: for either kind of labels `{(leader, i): (out, out)}`, one for the stacked
    outputs of a group or one for each layer; read: tokens by leader; count: tokens of the batches. The head sees
    response tokens only (response_logits). `routed`: layers may see only some of the tokens, in an order of their own.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], uses: metrics.Metric, routed: bool):
        self.uses, self.routed, self.head = uses, routed, model.get_output_embeddings()
        self.groups = {group.name: group for group in groups}
        self.inputs, self.outputs = {}, {"own": {}, "drawn": {}}
        self.read, self.count = dict.fromkeys(self.groups, 0), {"body": 0, "head": 0}
        self.labels, self.real = "own", {}
        self._calls = {}  # how often a layer was called in this batch
        self._pending = {}  # gradients of the layers of a group, by its leader and call, until all are there
        self.handles = [
            layer.register_forward_hook(partial(self._on_forward, group, name), with_kwargs=True)
            for group in groups
            for name, layer in group.items()
        ]

    def begin(self, body: torch.Tensor, head: torch.Tensor) -> None:
        """The next batch, of which `body` tokens are no padding and `head` tokens those of responses: bool masks."""
        self._calls.clear()
        self.real = {"body": body, "head": head}
        self.count = {which: n + int(self.real[which].sum()) for which, n in self.count.items()}

    def _seen(self, module: nn.Module, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        x, of_head = x.detach().flatten(0, -2)[rows], module is self.head
        return x[self.real["head" if of_head else "body"][rows]] if of_head or not self.routed else x

    def _on_forward(
        self, group: Group, name: str, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor
    ) -> None:
        call = self._calls[name] = self._calls.get(name, 0) + 1
        if name == group.name and self.uses.inputs:
            x = self._seen(module, layer_input(args, kwargs))
            self.read[name] += len(x)
            _add(self.inputs, name, x)
        if self.uses.outputs and output.requires_grad:  # no gradient reaches what is computed without a graph
            output.register_hook(partial(self._on_gradient, group, name, module, call))

    def _on_gradient(self, group: Group, name: str, module: nn.Module, call: int, g: torch.Tensor) -> None:
        if len(group.names) == 1 and not moment_shape(g.shape[-1]):  # a head's is as large as the logits: never copied
            for rows in pieces(g.flatten(0, -2)):
                self._add_outputs(group, {name: self._seen(module, g, rows)})
            return
        parts = self._pending.setdefault((group.name, call), {})
        parts[name] = self._seen(module, g)
        if len(parts) == len(group.names):
            self._add_outputs(group, self._pending.pop((group.name, call)))

    def complete(self) -> None:
        """Add what a backward pass has left: a layer whose output led nowhere has no gradient."""
        while self._pending:
            (leader, _), parts = self._pending.popitem()
            self._add_outputs(self.groups[leader], parts)

    def _add_outputs(self, group: Group, parts: dict[str, torch.Tensor]) -> None:
        some, shape = next(iter(parts.values())), group.shape
        wide = zip(group.names, shape.outputs, strict=True)
        wide = [parts[n] if n in parts else some.new_zeros(len(some), width) for n, width in wide]
        if len(shape.output_sides) < len(wide):
            wide = [torch.cat(wide, dim=1)]
        for i, x in enumerate(wide):
            _add(self.outputs[self.labels], (group.name, i), x)

    def sums(self) -> list[dict]:
        """What is summed over tokens: dicts of counts and tensors."""
        return [self.count, self.read, self.inputs, *self.outputs.values()]

    def moments(self) -> tuple[dict, dict]:
        """`({leader: A}, {leader: [G, ...]})`, in place of the sums.

        The loss is a sum over the tokens a layer sees: A is their mean, G is per token of the body for every layer
        alike, so that A and G of all layers give comparable estimates.
        """
        for name, moment in self.inputs.items():
            _complete(moment.div_(self.read[name]))
        found = {}
        for (name, i), own in self.outputs["own"].items():
            both = _both(own, self.outputs["drawn"].pop((name, i)))
            found.setdefault(name, []).append(_complete(both.div_(self.count["body"])))
        return self.inputs, found


class TableSums:
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

    def add_head(self, p: torch.Tensor, y: torch.Tensor, real: torch.Tensor, rows: slice) -> None:
        """p: (n, vocabulary) probabilities and y: (n,) labels at n `rows` of the hidden states that the head just read.

        Both count where `real: (n,)`; elsewhere p is zero.
        """
        if not self.tied:
            return
        h = self.states[rows][real].float()
        self.hidden.addmm_(h.T, h)
        square = sum(part.square().sum(0) for part in p.split(ROWS))
        self.rows["drawn"] += p.sum(0) - square
        self.rows["own"] += square.index_add_(0, y[real], 1 - 2 * p[real.nonzero()[:, 0], y[real]])

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
