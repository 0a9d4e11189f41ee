"""Which layers a model only calls, and which of them read the same tensor, found by watching a forward."""

import logging
from typing import Any

import torch
from torch import nn

from ..checkpoint.targets import some
from ..data.tasks import Task
from ..layers.group import Group
from ..layers.sharing import read_together
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
    their weights where the mode changes. And without a cache, as models train: some then read weights for a kernel.
    Raises ValueError, naming the class, for what is no decoder.
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
                if not ids.is_meta:  # on which transformers looks at values of a mask
                    model(input_ids=ids, use_cache=False)
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
        log.warning("left dense, because the model reads their weights directly: %s", some(sorted(read)))
    return {name: layer for name, layer in layers.items() if name not in read}


def _watched_ids(task: Task | None, i: int) -> torch.Tensor:
    """Token ids (1, L) of an example, of any tokens if there is no task."""
    return next(iter(Batches(task.train[i : i + 1], 1, 1, seed=0)))["input_ids"] if task else torch.zeros(1, 8).long()


def same_input(model: nn.Module, layers: dict[str, nn.Module], task: Task | None) -> list[list[str]]:
    """`read_together` in examples of `task`, or for any tokens if it is None."""
    examples = range(min(WATCHED, len(task.train)) if task else 1)
    return read_together(model, layers, (_watched_ids(task, i).to(model.device) for i in examples))


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
