"""Match every decoder block to its dense original, block by block, before the model is healed end to end."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from .data.tasks import Task
from .layers.group import groups
from .layers.low_rank import LowRankLinear
from .layers.rounded import RoundedLinear
from .layers.straight_through import training
from .options import BatchSize, Natural, Positive, checked
from .system.progress import progress
from .training.data import Batches, require_fit
from .training.precision import CastOnce, autocast


@checked
def refine(
    model: PreTrainedModel,
    task: Task,
    parent: PreTrainedModel,
    seed: int = 0,
    *,
    steps: Annotated[
        Natural, Field(description="Batches on which each block is first matched to its dense original; 0: none.")
    ] = 0,
    batch_size: BatchSize = 16,
    lr: Annotated[Positive, Field(description="Highest learning rate.")] = 1e-4,
) -> PreTrainedModel:
    """Train each block on `steps` batches of `task` to give the parent's hidden states, in place; returns the model.

    Block by block from the first: its inputs are what the compressed blocks before it, already refined, make of the
    batch; its target is what the parent's block puts out in the parent. Masks, rotary embeddings and whatever else a
    block gets are those that its model gives it. Loss: mean squared error over tokens that are not padding, relative to
    the target's mean square; AdamW, cosine schedule; factors, norms and biases train. Costs about `steps` training
    steps and as many forward passes of both models, without heads, and holds the hidden states of all batches of both.
    Source: AA-SVD (arXiv 2604.02119). Raises ValueError where the decoder has no list of blocks, or one that does not
    simply pass hidden states on from block to block.

        >>> model = bs.prune(bs.decompose(copy.deepcopy(parent), task, examples=16), keep=0.5)
        >>> model = bs.refine(model, task, parent, steps=2, batch_size=4)
    """
    if not steps:
        return model
    if any(group.weighted for group in groups(model)):
        raise ValueError("these bases are still weighted: call prune before refine")
    require_fit(model, task)
    batches = list(Batches(task.train, batch_size, steps, seed, task.pad_id))
    found, dense = list(blocks(model)), list(blocks(parent))
    model.requires_grad_(False)
    seen = {}
    with CastOnce(model):
        inputs, given = zip(*[_calls(model, found, batch, seen) for batch in batches], strict=True)
    with CastOnce(parent):
        targets, given_there = zip(*[_calls(parent, dense, batch, seen) for batch in batches], strict=True)
    for i, (block, original) in enumerate(progress(list(zip(found, dense, strict=True)), "refine", "block")):
        more, more_there = [calls[i] for calls in given], [calls[i] for calls in given_there]
        with torch.no_grad(), CastOnce(original), autocast(model):
            targets = [_run(original, x, call) for x, call in zip(targets, more_there, strict=True)]
        with training(block):
            _fit(model, block, inputs, more, targets, [b["real"].to(model.device) for b in batches], lr)
        with torch.no_grad(), CastOnce(block), autocast(model):
            inputs = [_run(block, x, call) for x, call in zip(inputs, more, strict=True)]
    return model


def _fit(
    model: PreTrainedModel,
    block: nn.Module,
    inputs: Sequence[torch.Tensor],
    more: Sequence[tuple],
    targets: Sequence[torch.Tensor],
    real: Sequence[torch.Tensor],
    lr: float,
) -> None:
    parameters = [p.requires_grad_(True) for p in block.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / len(inputs))) / 2)
    for x, call, target, mask in zip(inputs, more, targets, real, strict=True):
        with autocast(model):
            y = _run(block, x, call)
        target = target[mask].float()
        loss = (y[mask].float() - target).square().mean() / target.square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of a block became {loss.item()}; a learning rate below {lr:g} may help")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    block.requires_grad_(False)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the longest ModuleList whose members hold linear layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    lists = [m for m in lists if any(isinstance(x, nn.Linear | RoundedLinear | LowRankLinear) for x in m.modules())]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=len)


class _Reached(Exception):
    pass


@torch.no_grad()
def _calls(model: PreTrainedModel, found: list[nn.Module], batch: dict, seen: dict) -> tuple[torch.Tensor, list[tuple]]:
    """What a model gives its blocks for a batch: hidden states (B, L, d), and `[(args, kwargs), ...]` beside them.

    seen: tensors among the arguments of earlier batches, by content; equal ones are held once. Raises ValueError where
    the blocks are not called once each, in order, every one with the hidden states that the one before it has made.
    """
    first, given, made = [], [], []

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        name = f"{type(block).__name__} {found.index(block)} of {type(model).__name__}"
        if not args:
            raise ValueError(f"{name} gets its hidden states by name: they must be its first argument to be refined")
        if found.count(block) > 1 or len(given) >= len(found) or block is not found[len(given)]:
            raise ValueError(f"{name} is not called once and in its turn: its blocks cannot be refined one by one")
        x, *rest = args
        if made and not (x is made[-1] or x.equal(made[-1])):
            raise ValueError(f"{name} does not read what the block before it writes: it cannot be refined alone")
        if not first:
            first.append(x)
        given.append(pytree.tree_map_only(torch.Tensor, lambda t: _once(t, seen), (rest, kwargs)))

    def after(block: nn.Module, args: tuple, output: Any) -> None:
        made[:] = [_hidden(output)]

    def stop(head: nn.Module, args: tuple) -> None:
        raise _Reached

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in set(found)]
    handles += [block.register_forward_hook(after) for block in set(found)]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(stop))
    try:
        with autocast(model):
            model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(given) < len(found):
        raise ValueError(f"{type(model).__name__} calls {len(given)} of its {len(found)} blocks: refine needs all")
    return first[0], given


def _once(tensor: torch.Tensor, seen: dict) -> torch.Tensor:
    """The first of all tensors of this content: masks and rotary embeddings are alike in blocks and batches."""
    alike = seen.setdefault((tensor.shape, tensor.dtype, tensor.device, tensor.double().sum().item()), [])
    found = next((t for t in alike if t is tensor or t.equal(tensor)), None)
    if found is None:
        alike.append(tensor)
        return tensor
    return found


def _run(block: nn.Module, x: torch.Tensor, call: tuple) -> torch.Tensor:
    rest, kwargs = call
    return _hidden(block(x, *rest, **kwargs))


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
