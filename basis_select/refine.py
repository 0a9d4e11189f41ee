"""Match every decoder block to its dense original, block by block, before the model is healed end to end."""

import math

import torch
from torch import nn
from tqdm.auto import tqdm

from .bases import LowRankLinear, groups
from .training.data import Batches
from .training.precision import autocast


def refine(model, task, parent, seed=0, *, steps: int = 0, batch_size: int = 16, lr: float = 1e-4):
    """Train each block on `steps` batches of `task` to give the parent's hidden states, in place; returns the model.

    Block by block from the first: its inputs are what the compressed blocks before it, already refined, make of the
    batch; its target is what the parent's block puts out in the parent. Loss: mean squared error over tokens that are
    not padding, relative to the target's mean square; AdamW, cosine schedule; factors, norms and biases train. Costs
    about `steps` training steps without head and teacher, and holds the hidden states of all batches of both models.
    Source: AA-SVD (arXiv 2604.02119). Raises ValueError where the decoder has no list of blocks.
    """
    if not steps:
        return model
    if any(members[0][1].weighted for members in groups(model)):
        raise ValueError("these bases are still weighted: call prune before refine")
    batches = list(Batches(task.train, batch_size, steps, seed, task.pad_id))
    found, dense = blocks(model), blocks(parent)
    model.requires_grad_(False)
    inputs = [_first_input(model, found[0], batch) for batch in batches]
    targets = [_first_input(parent, dense[0], batch)[0] for batch in batches]
    for block, original in tqdm(list(zip(found, dense, strict=True)), desc="refine", unit="block"):
        with torch.no_grad(), autocast(model):
            targets = [_run(original, t, kwargs) for t, (_, kwargs) in zip(targets, inputs, strict=True)]
        _fit(model, block, inputs, targets, [batch["real"].to(model.device) for batch in batches], lr)
        with torch.no_grad(), autocast(model):
            inputs = [(_run(block, x, kwargs), kwargs) for x, kwargs in inputs]
    return model


def _fit(model, block, inputs, targets, real, lr):
    parameters = [p.requires_grad_(True) for p in block.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / len(inputs))) / 2)
    for (x, kwargs), target, mask in zip(inputs, targets, real, strict=True):
        with autocast(model):
            y = _run(block, x, kwargs)
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


def blocks(model):
    """The decoder's blocks: the longest ModuleList whose members hold linear layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    lists = [m for m in lists if any(isinstance(x, nn.Linear | LowRankLinear) for x in m.modules())]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=len)


class _Reached(Exception):
    pass


@torch.no_grad()
def _first_input(model, block, batch):
    """What a model gives its first block for a batch: hidden states (B, L, d) and the other arguments by name."""
    caught = []

    def catch(module, args, kwargs):
        caught.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with autocast(model):
            model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    (x, *rest), kwargs = caught[0]
    if rest:
        raise ValueError(f"{type(block).__name__} takes more than one positional argument: it cannot be refined alone")
    return x, kwargs


def _run(block, x, kwargs):
    y = block(x, **kwargs)
    return y[0] if isinstance(y, tuple) else y
