"""What ranks cost on this device: measured times of factored linear layers against the dense ones.

A table made by `profile` holds, for every distinct shape of a model's layers, one by one and in the groups that read
the same tensor, the seconds of the dense product and of the factored one at each rank of a grid. `prices` turns it into
what `prune(latency=, costs=)` chooses by.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.targets import targets
from ..layers.group import Group
from ..layers.low_rank import LowRankLinear
from ..layers.shape import Shape
from ..statistics.readers import same_input
from ..system.progress import progress
from .speed import Generation, take_turns, timed_on

COPIES = 4  # layers of a shape timed together, each with weights of its own: what was just read is still in a cache
POOL = 2**28  # bytes of weights that are walked through, more than caches hold
GRID = 32  # ranks of a shape at most, from one step to break-even


def profile(
    model: PreTrainedModel, *, tokens: Sequence[int] = (1, 128), rounds: int = 15, multiple_of: int = 16
) -> dict:
    """Time every layer shape of a dense `model`, and the model itself, on its device and in its dtype; eager, batch 1.

    tokens: how many are computed at once, 1 being a decoded token. Ranks are multiples of `multiple_of`. Returns
    `{"layers": [{"in", "out": [...], "dense": {tokens: s}, "ranks": {rank: {tokens: s}}}], "model": {tokens: s}}` and
    what the times depend on, each the least of `rounds`: whatever else the device does only adds to it. Raises
    ValueError for a model that is already factored.

        >>> costs = bs.profile(parent, tokens=(1, 16), rounds=1)
        >>> list(costs["model"])
        ['1', '16']
    """
    if any(isinstance(m, LowRankLinear) for m in model.modules()):
        raise ValueError("this model is factored already: profile the dense one")
    if min(tokens) < 1:
        raise ValueError(f"{min(tokens)} tokens cannot be timed, it should be at least 1")
    found = targets(model)
    together = [*same_input(model, found, None), *([name] for name in found)]
    shapes = dict.fromkeys(Group(names, [found[name] for name in names]).shape for names in together)
    weight = next(iter(found.values())).weight
    head = Shape(model.get_input_embeddings().embedding_dim, (model.get_output_embeddings().out_features,))
    shapes[head] = None
    largest = max(shape.inputs * max(shape.outputs) for shape in shapes)
    pool = torch.randn(max(POOL // weight.element_size(), largest), device=weight.device, dtype=weight.dtype)
    layers = [
        _timed(shape, tokens, shape == head, rounds, multiple_of, _Weights(pool))
        for shape in progress(shapes, "profile", "shape")
    ]
    runs = {n: Generation(model, n, 1).to_prefill for n in tokens if n > 1}
    if 1 in tokens:
        runs[1] = Generation(model, 16, 1).to_decode
    seconds = take_turns(runs, rounds, device=model.device)
    times = {str(n): min(seconds[n]) for n in tokens}
    return {**timed_on(weight.device, weight.dtype), "layers": layers, "model": times}


class _Weights:
    """Hands out pieces of one pool of numbers in turn: the next ones are always those read longest ago."""

    def __init__(self, pool: torch.Tensor):
        self.pool, self.at = pool, 0

    def take(self, *shape: int) -> nn.Parameter:
        size = math.prod(shape)
        if self.at + size > len(self.pool):
            self.at = 0
        piece = self.pool[self.at : self.at + size].view(shape)
        self.at += -(-size // 32) * 32  # starts are aligned as allocations are
        return nn.Parameter(piece, requires_grad=False)


def _timed(
    shape: Shape, tokens: Sequence[int], is_head: bool, rounds: int, multiple_of: int, weights: _Weights
) -> dict:
    """The times of one Shape, dense and at each rank of the grid; a head only ever computes the last token."""
    largest = shape.largest_rank
    step = multiple_of * max(1, -(-largest // (multiple_of * GRID)))
    device, dtype = weights.pool.device, weights.pool.dtype
    calls = {1: COPIES} if is_head else {n: COPIES if n == 1 else 1 for n in tokens}
    runs = {}
    for rank in (None, *range(step, largest + 1, step)):
        for n, copies in calls.items():
            x = torch.randn(1, n, shape.inputs, device=device, dtype=dtype)
            runs[rank, n] = _prepare(x, [_layers(shape, rank, weights) for _ in range(copies)])
    seconds = {key: min(found) for key, found in take_turns(runs, rounds, device=device).items()}
    times = {}
    for rank, _ in runs:
        times[rank] = {str(n): seconds[rank, 1 if is_head else n] / calls[1 if is_head else n] for n in tokens}
    dense, ranks = times.pop(None), {str(rank): found for rank, found in times.items()}
    return {"in": shape.inputs, "out": list(shape.outputs), "dense": dense, "ranks": ranks}


def _layers(shape: Shape, rank: int | None, weights: _Weights) -> list[nn.Module]:
    """Layers that read the same tensor, with weights from the pool: dense, or of one rank with a shared `v`."""
    made, reads = [], shape.inputs
    for out in shape.outputs:
        if rank is None:
            layer = nn.Linear(reads, out, bias=False, device="meta")
            layer.weight = weights.take(out, reads)
        else:
            layer = LowRankLinear(reads, out, rank, bias=False, leader=made[0] if made else None, device="meta")
            layer.u.weight = weights.take(out, rank)
            if not made:
                layer.v.weight = weights.take(rank, reads)
        made.append(layer)
    return made


def _prepare(x: torch.Tensor, copies: Sequence[Sequence[nn.Module]]) -> Callable[[], Callable]:
    @torch.no_grad()
    def run() -> None:
        for layers in copies:
            for layer in layers:
                layer(x)

    return lambda: run
