"""Linear layers whose weights take 8, 4, 3 or 2 bits, as they are deployed.

What the bits stand for says layers/rounding.py; how such layers train, layers/straight_through.py.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .rounding import (
    GROUP,
    nearest,
    packed,
    restored,
    restored_from_bytes,
    row_bytes,
    unpacked,
)

FEW = 4  # tokens up to which the CPU's int8 kernel beats a product with weights that are cast first
FEW_OF_4_BITS = 128  # and its int4 kernel one with weights that are multiplied out first
FEW_ON_CUDA = 64  # and a GPU's int4 kernel; its int8 kernel never does, see eval/results/NOTES.md


def _arranged_for_cpu(whole: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)


def in_order(
    bytes_: torch.Tensor, inputs: int, bits: int, arrange: Callable = _arranged_for_cpu
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q, scales)` of fewer than 8 bits as a device's kernel for 4 reads them, inputs filled up to whole groups."""
    q, scale = unpacked(bytes_, inputs, bits, torch.bfloat16)
    whole, scales = F.pad(q, (0, -inputs % GROUP)).int() + 8, scale.T
    return arrange(whole), torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()


def _arranged_for_cuda(whole: torch.Tensor) -> torch.Tensor:
    pairs = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
    tiles = next(tiles for tiles in (8, 4, 2) if whole.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)


class RoundedLinear(nn.Module):
    """Drop-in for nn.Linear: `y = x W^T + b`, W: (out, in) of whole numbers times scales.

    bits: 8, whole numbers q: int8 (out, in) and scale: (out,); or fewer, both `packed` in q: uint8 (out, bytes).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bits: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        shape, stored = (in_features, torch.int8) if bits == 8 else (row_bytes(in_features, bits), torch.uint8)
        whole = torch.empty(out_features, shape, dtype=stored, device=device)
        self.q = nn.Parameter(whole, requires_grad=False)
        where = {"device": device, "dtype": dtype}
        if bits == 8:
            # A parameter, since transformers takes a model's dtype from the first that is no whole number.
            self.scale = nn.Parameter(torch.empty(out_features, **where), requires_grad=False)
        else:
            self.register_buffer("empty", torch.empty(0, **where), persistent=False)  # has the dtype of the weight
        self.bias = nn.Parameter(torch.empty(out_features, **where), requires_grad=False) if bias else None
        self._arranged = None  # of fewer than 8 bits, as the device's kernel reads them: (of what, q, scales)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.scale.dtype if self.bits == 8 else self.empty.dtype

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), made on demand."""
        if self.bits == 8:
            return restored(self.q, self.scale)
        return restored_from_bytes(self.q, self.in_features, self.bits, self.dtype)

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(q, scale)`: the whole numbers, int8 (out, in), and their scales, (out,) or (out, in / GROUP)."""
        return (self.q, self.scale) if self.bits == 8 else unpacked(self.q, self.in_features, self.bits, self.dtype)

    @classmethod
    def like(cls, linear: nn.Linear, bits: int) -> "RoundedLinear":
        """A layer of the shape, bias, device and dtype of an nn.Linear, weights uninitialised."""
        weight, bias = linear.weight, linear.bias is not None
        return cls(linear.in_features, linear.out_features, bias, bits, weight.device, weight.dtype)

    @classmethod
    @torch.no_grad()
    def rounded(cls, linear: nn.Linear, bits: int) -> "RoundedLinear":
        """The nearest to an nn.Linear."""
        return cls.of(linear, *nearest(linear.weight, bits), bits)

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, q: torch.Tensor, scale: torch.Tensor, bits: int) -> "RoundedLinear":
        """The whole numbers q: int8 (out, in) and scales in place of the weight of an nn.Linear, its bias kept."""
        made = cls.like(linear, bits)
        made.q.copy_(q if bits == 8 else packed(q, scale, bits))
        if bits == 8:
            made.scale.copy_(scale)
        if made.bias is not None:
            made.bias.copy_(linear.bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        y = self._by_kernel(x)
        if y is None and self.bits == 8:
            y = F.linear(x, self.q.to(x.dtype)) * self.scale
        elif y is None:
            y = F.linear(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias

    def _by_kernel(self, x: torch.Tensor) -> torch.Tensor | None:
        """`x W^T` by a kernel of the device, None where there is none: they are for bfloat16, not to train with."""
        if x.dtype != torch.bfloat16 or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return None
        kernel = {("cpu", True): self._of_8_bits, ("cpu", False): self._of_few_bits}
        kernel |= {("cuda", False): self._of_few_bits_on_cuda}
        kernel = kernel.get((x.device.type, self.bits == 8))
        y = kernel(x.reshape(-1, self.in_features)) if kernel else None
        return y if y is None else y.view(*x.shape[:-1], self.out_features)

    def _of_8_bits(self, x: torch.Tensor) -> torch.Tensor | None:
        # It reads 16 aligned weights at once and crashes, instead of raising, where there are none.
        if len(x) > FEW or self.in_features % 16 or self.q.data_ptr() % 16:
            return None
        return torch._weight_int8pack_mm(x.contiguous(), self.q, self.scale.to(x.dtype))

    def _of_few_bits(self, x: torch.Tensor) -> torch.Tensor | None:
        if len(x) > FEW_OF_4_BITS or self.out_features % 16 or (held := self._in_order(_arranged_for_cpu)) is None:
            return None
        x = F.pad(x, (0, -self.in_features % GROUP)).contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, held[0], GROUP, held[1])

    def _of_few_bits_on_cuda(self, x: torch.Tensor) -> torch.Tensor | None:
        if len(x) > FEW_ON_CUDA or self.out_features % 8 or torch.cuda.get_device_capability(x.device) < (8, 0):
            return None
        if (held := self._in_order(_arranged_for_cuda)) is None:
            return None
        x = F.pad(x, (0, -self.in_features % GROUP)).contiguous()
        return torch.ops.aten._weight_int4pack_mm(x, held[0], GROUP, held[1])

    def _in_order(self, arrange: Callable) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(q, scales)` of fewer than 8 bits as a kernel reads them, made once for a state of the weights, None where
        that is not known.
        """
        try:
            made_of = (self.q.data_ptr(), self.q._version)
        except RuntimeError:  # torch does not count how often tensors of inference mode are overwritten
            return None
        if self._arranged is None or self._arranged[0] != made_of:
            self._arranged = made_of, *in_order(self.q, self.in_features, self.bits, arrange)
        return self._arranged[1:]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, for a table of embeddings: ids (...) -> (..., in)."""
        q = F.embedding(ids, self.q)
        if self.bits == 8:
            return q.to(self.dtype) * F.embedding(ids, self.scale[:, None])
        flat = restored_from_bytes(q.flatten(0, -2), self.in_features, self.bits, self.dtype)
        return flat.view(*ids.shape, self.in_features)

    def widen(self) -> None:
        """Hold whole numbers of 3 or 2 bits in 4, in place: what kernels and other runtimes have products for."""
        if self.bits < 4:
            self.q, self.bits = nn.Parameter(packed(*self.numbers(), 4), requires_grad=False), 4

    def to_linear(self) -> nn.Linear:
        """The equivalent nn.Linear."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.bits} bits"


def quantized(model: nn.Module) -> dict[str, int]:
    """`{name: bits}` of the rounded layers, in model order."""
    return {name: m.bits for name, m in model.named_modules() if isinstance(m, RoundedLinear)}


def require_wide(model: nn.Module, verb: str) -> None:
    """Raise ValueError for a model with rounded layers, which `verb` cannot change."""
    if names := list(quantized(model)):
        raise ValueError(f"{verb} needs weights of 16 bits or more, but {names[0]} is rounded: pass an unrounded model")


@contextlib.contextmanager
def multiplied_out(model: nn.Module) -> Iterator[None]:
    """Within it, layers of few bits are the nn.Linear that they stand for, for what computes many tokens.

    In bfloat16 they have the very weights, since whole numbers and scales of few bits have products of few bits.
    """
    layers, apart = model.named_modules(), tables(model)
    few = {name: m for name, m in layers if isinstance(m, RoundedLinear) and m.bits < 8 and m not in apart}
    for name, layer in few.items():
        model.set_submodule(name, layer.to_linear())
    try:
        yield
    finally:
        for name, layer in few.items():
            model.set_submodule(name, layer)


def tables(model: nn.Module) -> set[RoundedLinear]:
    """A token embedding's that is no bases, whose rows are read as well."""
    return {m.bases for m in model.modules() if isinstance(getattr(m, "bases", None), RoundedLinear)}


def replace(model: nn.Module, kind: type, by: Callable[[nn.Module], nn.Module]) -> None:
    """Put `by(layer)` in the place of every layer of a kind."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            model.set_submodule(name, by(module))
