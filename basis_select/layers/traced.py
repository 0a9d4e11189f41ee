"""Rounded layers as graphs of other runtimes hold them: the same whole numbers and scales, never rounded again.

Neither holds 3 or 2 bits as we do: they are whole numbers of 4 bits there.
ONNX Runtime has an exact product with weights of 4 bits, MatMulNBits. Its products with weights of 8 bits round what is
multiplied as well or take ten times as long, so those stay 8 bits in the file and are multiplied out when it is loaded.
OpenVINO keeps both in memory as they are, wherever a constant is cast, multiplied by its scale and then used.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .rounded import RoundedLinear, quantized
from .rounding import GROUP


class OnnxLinear(RoundedLinear):
    """A RoundedLinear that becomes one MatMulNBits if it has 4 bits; q is uint8 (out, groups, GROUP / 2) then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return super().forward(x)
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.q, self.scale),
            {"K": self.in_features, "N": self.out_features, "bits": 4, "block_size": GROUP},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class OpenVinoLinear(RoundedLinear):
    """A RoundedLinear whose weight is a cast constant times its scale; of 4 bits, q is int8 (out, groups, GROUP)."""

    @property
    def weight(self) -> torch.Tensor:
        return self._filled()[:, : self.in_features]

    def _filled(self) -> torch.Tensor:
        return (self.q.to(self.scale.dtype) * self.scale[..., None]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._filled()
        return F.linear(F.pad(x, (0, weight.shape[1] - self.in_features)), weight, self.bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return super().rows(ids) if self.bits == 8 else F.embedding(ids, self.weight)


def for_graph(model: nn.Module, runtime: Literal["onnx", "openvino"]) -> nn.Module:
    """What to trace for `model`: if it has rounded layers, a copy in which they compute in the terms of a runtime."""
    if not quantized(model):
        return model
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, RoundedLinear):
            layer.widen()
            layer.__class__ = {"onnx": OnnxLinear, "openvino": OpenVinoLinear}[runtime]
            if layer.bits == 4:
                q, scale = layer.numbers()
                q = F.pad(q, (0, -layer.in_features % GROUP))
                if runtime == "onnx":
                    q = (q[:, ::2] + 8 | q[:, 1::2] + 8 << 4).to(torch.uint8)
                layer.q = nn.Parameter(q.unflatten(1, (scale.shape[1], -1)), requires_grad=False)
                layer.register_buffer("scale", scale)
    return model
