"""Which layers a model only calls, and which of them read the same tensor, found by watching a forward."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checkpoint.targets import some
from ..data.tasks import Task
from ..layers.group import Group
from ..training.data import Batches

log = logging.getLogger(__name__)

WATCHED = 8  # examples in which layers that read the same tensor are looked for


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
            "left dense, for the model reads their weights, and does not only call them: %s", some(sorted(read))
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


def layer_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The tensor that an nn.Linear is called with."""
    return args[0] if args else kwargs["input"]


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
