"""Several processes of torchrun: who decides, who writes, and how gradients and parameters are put together.

The first process runs the recipe; the others wait for what it hands them. Every function here does nothing, or just
calls, in a single process. The run's folder must be on a disk that all processes see.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(days=7)  # the first process evaluates alone, and decomposes alone what is sharded
TOGETHER = 2**24  # elements of gradients that are averaged at once


def index() -> int:
    """Which of the processes this is; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone() -> dist.ProcessGroup | None:
    """The group of all processes; None if there is one."""
    return dist.group.WORLD if count() > 1 else None


def started() -> bool:
    """Whether torchrun has started this process, if only one."""
    return "LOCAL_RANK" in os.environ


def join() -> None:
    """Meet the other processes if torchrun has started this process and they have not met yet."""
    if started() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def device() -> torch.device:
    """Where this process computes: on a GPU if there is one, under torchrun on its own, else on the first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def lead(work: Callable[[], object]) -> None:
    """`work()` in the first process; the others take part in what it passes to `everywhere` until it returns.

    If it raises, that process ends with the error and torchrun ends the others.
    """
    join()
    if index() == 0:
        work()
        _told(None)
    else:
        # Where the first process is sure to fail too, the others go quietly: its sentence and its status are the run's.
        with contextlib.suppress(FloatingPointError):
            while job := _next_job():
                function, arguments = job
                function(*arguments)
                barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def _next_job() -> tuple[Callable, tuple] | None:
    try:
        return _told(None)
    except RuntimeError:  # the first process is gone
        return None


def everywhere(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in all processes, called by the first; both are pickled.

    Returns the first one's result when all are done: only then may it move the files that they read.
    """
    _told((function, arguments))
    result = function(*arguments)
    barrier()
    return result


def agreed(decide: Callable[[], Any]) -> Any:
    """What `decide()` returns in the first process, in every process."""
    return _told(decide() if index() == 0 else None)


def gathered(value: Any) -> list:
    """What every process gives, in their order, in every process."""
    if count() == 1:
        return [value]
    found = [None] * count()
    dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    total(torch.zeros(1))


def _told(value: Any) -> Any:
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def layout() -> Any:
    """How `load(..., sharded=True)` spreads a model: over the processes of a node, with a replica on every node."""
    from transformers.distributed import DistributedConfig

    node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if node == 1:
        node = count()
    try:
        return DistributedConfig(fsdp_size=node, dp_replicate_size=count() // node)
    except TypeError:
        raise ValueError("to spread a model over processes takes transformers 5.24 or newer: install that") from None


def spread(model: Any) -> None:
    """Spread the parameters of a model of transformers that is on the meta device, in place (`layout`)."""
    if count() > 1:
        config, _, mesh = model.prepare_distribute_model(layout())
        model.maybe_distribute_model(model, config, mesh)


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_no_more(model: torch.nn.Module) -> None:
    """Leave parameters sharded that a forward pass gathered and no backward pass let go: only those can be trained."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(x: Any) -> Any:
    """A tensor as it is, a sharded one gathered by all: in the memory of the first process, None in others."""
    if not isinstance(x, DTensor):
        return x
    full = x.full_tensor()
    return full.cpu() if index() == 0 else None


def in_full(x: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, a sharded one gathered by all, in every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def local(x: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, of a sharded one this process's part."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(p: torch.Tensor, x: Any) -> Any:
    """`x`, which every process has, spread as the parameter `p` is if it is a tensor of that shape."""
    if not isinstance(p, DTensor) or not torch.is_tensor(x) or x.shape != p.shape:
        return x
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over processes, in place."""
    if count() > 1:
        dist.all_reduce(x)
    return x


def unify(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The first process's values for what is not sharded, in all processes."""
    for p in _replicated(parameters):
        dist.broadcast(p.data, src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Make gradients of what is not sharded (FSDP does the rest) the mean over processes, summed in fp32.

    A parameter that the loss of this process does not depend on has a gradient of zeros.
    """
    bucket, size = [], 0
    for p in _replicated(parameters):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        bucket.append(p.grad)
        size += p.grad.numel()
        if size >= TOGETHER:
            _average(bucket)
            bucket, size = [], 0
    if bucket:
        _average(bucket)


def _average(tensors: list[torch.Tensor]) -> None:
    mean = total(torch.cat([t.flatten().float() for t in tensors])) / count()
    for t, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def _replicated(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)] if count() > 1 else []
