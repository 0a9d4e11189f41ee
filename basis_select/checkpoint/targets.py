"""Which layers of a model can be written as bases, and stored so."""

import copy
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..layers.embedding import TableEmbedding, is_tied
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear
from .format import unstorable

log = logging.getLogger(__name__)


def targets(model: nn.Module, required: bool = True) -> dict[str, nn.Module]:
    """`{name: nn.Linear}` that can be decomposed, in model order.

    The output head counts unless it is tied to the embedding. Layers that compute something else than nn.Linear does,
    such as Conv1D and 3-D expert parameters, do not, nor do those of which a parameter has more than one name, because
    layers share it or one layer is used in two places, nor those of which checkpoints cannot hold factors: if
    `required`, they are named in a warning, and finding nothing raises ValueError. If not, layers that were rounded to
    fewer bits count as well.
    """
    head = model.get_output_embeddings() if is_tied(model) else None
    factors = {part for m in model.modules() if isinstance(m, LowRankLinear | TableEmbedding) for part in m.modules()}
    if isinstance(model.get_input_embeddings(), TableEmbedding):
        factors.add(model.get_input_embeddings().bases)
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    found, skipped, shared = {}, [], {}
    for name, module in model.named_modules():
        if module in factors or module is head:
            continue
        own = list(module.parameters(recurse=False))
        if is_plain(module) or (not required and isinstance(module, RoundedLinear)):
            several = {" and ".join(owners[p]): None for p in own if len(owners[p]) > 1}
            shared |= several
            if not several:
                found[name] = module
        elif isinstance(module, nn.Linear | Conv1D) or any(p.dim() == 3 for p in own):
            skipped.append(f"{name} ({type(module).__name__})")
    lost = unstorable(model, found)
    found = {name: module for name, module in found.items() if name not in lost}
    if not required:
        return found
    if skipped:
        log.warning("left as they are, because they do not compute what nn.Linear does: %s", some(skipped))
    if shared:
        log.warning("left dense, for they are one parameter under several names: %s", some(list(shared)))
    if lost:
        log.warning("left dense, for checkpoints of this architecture have no place for their factors: %s", some(lost))
    if not found:
        raise ValueError(
            f"nothing to decompose in {type(model).__name__}: it has no nn.Linear layer besides the tied head"
            + (f"; {some(others)} cannot be decomposed" if (others := [*skipped, *shared, *lost]) else "")
        )
    return found


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes what nn.Linear does, and is called to do so.

    The output projection of nn.MultiheadAttention is not called: its weights are read. Of a subclass with a forward of
    its own, a small layer is tried on random numbers.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    own = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if type(module).forward is nn.Linear.forward:
        return True
    return own <= {"weight", "bias"} and _computes_a_product(module)


@torch.no_grad()
def _computes_a_product(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 3, 5), (7, 5), (7,)))
    bias = None if module.bias is None else bias
    for training in (False, True):
        small = copy.copy(module)
        small.__dict__ = {
            **module.__dict__,
            "_parameters": {"weight": nn.Parameter(weight), "bias": bias if bias is None else nn.Parameter(bias)},
            "in_features": 5,
            "out_features": 7,
            "training": training,
        }
        for scale in (1e-3, 1, 1e3):
            expected = F.linear(scale * x, weight, bias)
            try:
                found = small.forward(scale * x)
            except Exception:  # another signature or another shape is another function
                return False
            if not torch.is_tensor(found) or found.shape != expected.shape:
                return False
            if not torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * scale):
                return False
    return True


def some(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
