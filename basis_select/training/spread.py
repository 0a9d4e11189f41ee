"""A model that is whole in every process of torchrun, trained as a copy that is spread over them (FSDP2).

For weights of few bits: what they train as takes four bytes for each, where the file has half a byte. FSDP cannot
replace layers of what it has spread, so they are replaced before, on tensors without data.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers.straight_through import RoundingLinear, in_training
from ..system import processes


@contextlib.contextmanager
def spread(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within it, a copy of `model` whose parameters are spread; after it, `model` has what has been trained of them.

    Rounded layers train in the copy (straight_through.py). No process holds more than one of them unrounded and whole.
    All processes call this.
    """
    twin = in_training(_without_data(model))
    processes.spread(twin)
    _fill(twin, model)
    yield twin
    _take(model, twin)


def _without_data(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the meta device."""
    copies = {id(b): b.to("meta") for b in model.buffers()}
    copies |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, copies)


@torch.no_grad()
def _fill(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give the copy the values of the model, on its device, each process its part."""
    twin.to_empty(device=model.device)
    for path, module in twin.named_modules():
        own = model.get_submodule(path)
        values = dict(own.named_parameters(recurse=False))
        if isinstance(module, RoundingLinear):
            values |= {"weight": own.weight, "scale": own.numbers()[1]}
        for name, p in module.named_parameters(recurse=False):
            p.copy_(processes.sharded_like(p, values[name]))
        for name, buffer in module.named_buffers(recurse=False):
            buffer.copy_(own.get_buffer(name))


@torch.no_grad()
def _take(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Give the model what has been trained of the copy, one layer at a time, in every process."""
    if hasattr(twin, "tuned_on"):
        model.tuned_on = twin.tuned_on
    for path, module in twin.named_modules():
        trained = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        values = {name: processes.in_full(p) for name, p in trained.items()}
        if isinstance(module, RoundingLinear):
            model.set_submodule(path, module.with_values(values).deployed())
        else:
            own = model.get_submodule(path)
            for name, value in values.items():
                own.get_parameter(name).copy_(value)
