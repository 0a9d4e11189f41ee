"""What checkpoints of earlier format versions hold.

Version 2 has scales of 16 bits, in a tensor of their own, for 4 and 3 bits too; such weights are held in 16 bits once
they are loaded. Version 1 has a list `int8` in place of `bits`, and weighted bases without `input_cost` and
`output_cost`.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear, replace
from ..layers.rounding import number_bytes, restored, scales_of, unpacked

log = logging.getLogger(__name__)


def forget_costs(layer: LowRankLinear) -> None:
    """Weighted bases of version 1 do not say what errors of their entries cost."""
    for name in ("input_cost", "output_cost"):
        if name in layer._buffers:
            layer._buffers[name] = None


class Version2Linear(RoundedLinear):
    """A layer of 4 or 3 bits while a checkpoint of version 2 is loaded: its scales are a tensor of their own."""

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, *place: Any):
        super().__init__(in_features, out_features, bias, bits, *place)
        whole = self.q.new_empty(out_features, number_bytes(in_features, bits))
        self.q = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", self.empty.new_empty(out_features, scales_of(in_features)))

    @property
    def weight(self) -> torch.Tensor:
        numbers = F.pad(self.q, (0, self.scale.shape[1] + 1))  # scales that are not read
        return restored(unpacked(numbers, self.in_features, self.bits)[0], self.scale)


def hold_in_16_bits(model: nn.Module) -> None:
    """Put nn.Linear in place of the layers of version 2, and say so."""
    if any(isinstance(m, Version2Linear) for m in model.modules()):
        log.warning("a checkpoint of format version 2: its weights of 4 and 3 bits are held in 16 bits")
        replace(model, Version2Linear, RoundedLinear.to_linear)
