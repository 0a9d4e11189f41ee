"""The empirical Fisher information of weights, as FWSVD takes it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..data.tasks import Task
from ..system.progress import progress
from ..training.data import Batches, drawn
from ..training.loss import by_rows, frozen, response_logits
from ..training.precision import autocast


def squared_gradients(
    model: nn.Module,
    members: Sequence[Sequence[str]],
    task: Task,
    examples: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """`{leader: (in,)}`, fp32: how much each input of a group of layers matters to the task.

    The mean over `examples` training examples of the squared gradient of every weight, summed over the weights that
    read one input: the importance of a row of W in `y = x W`, as FWSVD writes a layer (arXiv 2207.00112). The
    gradient is that of one example's negative log-likelihood with its own labels; the examples are those of
    `second_moments`. A group that no example reaches is left out. `group`: processes that share the examples.
    """
    rows = drawn(task.train, examples)
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    training, weights = model.training, {name: model.get_submodule(name).weight for names in members for name in names}
    found = {n[0]: weights[n[0]].new_zeros(weights[n[0]].shape[1], dtype=torch.float32) for n in members}
    model.eval()
    try:
        with frozen(model, weights.values()):
            for example in progress(rows[rank::world], "squared gradients", "example", quiet=rank > 0):
                batch = next(iter(Batches([example], 1, 1, 0, task.pad_id)))
                gradients = torch.autograd.grad(_loss(model, batch), list(weights.values()), allow_unused=True)
                gradients = dict(zip(weights, gradients, strict=True))
                for names in members:
                    for g in (gradients.pop(name) for name in names):
                        if g is not None:
                            found[names[0]] += g.float().square_().sum(0) / len(rows)
    finally:
        model.train(training)
    if group:
        for total in found.values():
            dist.all_reduce(total, group=group)
    return {name: total for name, total in found.items() if total.any()}


@torch.enable_grad()
def _loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The summed negative log-likelihood of the responses."""
    targets = batch["targets"].to(model.device)
    with autocast(model):
        logits = response_logits(model, batch)
    return by_rows(logits, lambda part, rows: [nn.functional.cross_entropy(part, targets[rows], reduction="sum")])[0]
