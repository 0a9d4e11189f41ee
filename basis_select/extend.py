"""Add new bases: directions the pretrained weights do not have, for healing to fill."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from .data.tasks import Task
from .layers.group import groups
from .layers.rounded import require_wide
from .options import Count, Natural, checked
from .training.data import Batches, require_fit
from .training.loss import activation_gradients, task_loss

Init = Literal["random", "residual", "gradient"]


@checked
def extend(
    model: PreTrainedModel,
    task: Task | None = None,
    parent: PreTrainedModel | None = None,
    seed: int = 0,
    *,
    rank: Annotated[
        Natural, Field(description="New bases per layer after pruning, paid for within the size; 0: none.")
    ] = 16,
    init: Annotated[
        Init,
        Field(
            description="Directions of the new bases: random (Basel), residual (what the layer lost) or gradient (of "
            "the task's loss)."
        ),
    ] = "random",
    examples: Annotated[Count, Field(description="Training examples that the gradient is summed over.")] = 64,
) -> PreTrainedModel:
    """Append `rank` new bases to every factored layer, in place; returns the model.

    `u~ = 0`, so the function does not change; the rows of `v~` have the mean norm of the kept `v`, so that the first
    gradient reaches u~ at the scale of the others. Their directions: "random" (Basel), "residual" (the leading right
    singular vectors of what `parent` had and the layer lost), or "gradient" (those of the task loss's gradient with
    respect to the layer's product, summed over `examples` training examples of `task`). Layers that share a `v` share
    the new rows too. The bases count against the size: `prune(reserve=rank)` leaves room for them. Raises ValueError
    for a model without bases, with bases that are still weighted, or with rounded weights, and without the parent or
    the task that `init` needs.

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> model = bs.prune(model, keep=0.5, reserve=4)
        >>> model = bs.extend(model, task, rank=4, init="gradient", examples=16)
    """
    found = groups(model)
    if rank and not found:
        raise ValueError("there are no factored layers to extend: call decompose and prune first")
    if rank and found[0].weighted:
        raise ValueError("these bases are still weighted: call prune before extend")
    if (init == "residual" and parent is None) or (init == "gradient" and task is None):
        raise ValueError(f"init={init!r} needs {'the dense parent' if init == 'residual' else 'a task'}")
    require_wide(model, "extend")
    generator = torch.Generator().manual_seed(seed)
    gradients = _gradients(model, task, examples, seed) if rank and init == "gradient" else None
    for i, group in enumerate(found if rank else []):
        v = group.leader.v
        if init == "random":
            new = torch.randn(rank, v.in_features, generator=generator).to(v.weight) / v.in_features**0.5
        elif init == "residual":
            lost = [parent.get_submodule(name).weight - layer.dense_weight() for name, layer in group.items()]
            new = _leading(torch.cat(lost), rank)
        else:
            new = _leading(gradients[i], rank)
        new = new * v.weight.detach().float().norm(dim=1).mean()
        group.append(new.to(v.weight))
    return model


@torch.no_grad()
def _leading(m: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` leading right singular vectors of m, as rows; random ones where m has fewer."""
    m = m.double()
    vectors = torch.linalg.eigh(m.T @ m).eigenvectors
    return vectors[:, -rank:].T


def _gradients(model: PreTrainedModel, task: Task, examples: int, seed: int) -> list[torch.Tensor]:
    """dL/dW of every group's stacked product W, (sum out, in) in fp32."""
    require_fit(model, task)
    found = groups(model)
    total = [torch.zeros(sum(g.shape.outputs), g.shape.inputs) for g in found]
    handles = []

    def watch(into: torch.Tensor) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach()

            @torch.autocast(x.device.type, enabled=False)
            def add(g: torch.Tensor) -> None:
                into.add_((g.flatten(0, -2).float().T @ x.flatten(0, -2).float()).cpu())

            output.register_hook(add)

        return hook

    for group, whole in zip(found, total, strict=True):
        parts = zip(group.layers, whole.split(group.shape.outputs), strict=True)
        handles += [layer.register_forward_hook(watch(part)) for layer, part in parts]
    try:
        size = 8
        with activation_gradients(model):
            for batch in Batches(task.train, size, -(-examples // size), seed, task.pad_id):
                task_loss(model, batch)[0].backward()
    finally:
        for handle in handles:
            handle.remove()
    return total
