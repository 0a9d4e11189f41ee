"""Linear layers whose weights are int8, one scale a row: half the bytes of bfloat16, for deployed checkpoints only."""

import torch
import torch.nn.functional as F
from torch import nn

FEW = 4  # tokens up to which the CPU's int8 kernel beats a product with weights that are cast first


def nearest(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q: (out, in) int8, scale: (out,))` nearest to a weight: `scale = max |row| / 127`, itself in `dtype` first."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).to(dtype)
    scale = torch.where(scale > 0, scale, 1)
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """Drop-in for nn.Linear: `y = (x q^T) * scale + b`, q: (out, in) int8, scale: (out,)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        whole = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.q = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", torch.empty(out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty_like(self.scale), requires_grad=False) if bias else None

    weight = property(lambda self: self.q.to(self.scale.dtype) * self.scale[:, None], doc="(out, in), made on demand.")

    @classmethod
    def like(cls, linear: nn.Linear) -> "Int8Linear":
        """A layer of the shape, bias, device and dtype of an nn.Linear, weights uninitialised."""
        weight, bias = linear.weight, linear.bias is not None
        return cls(linear.in_features, linear.out_features, bias, weight.device, weight.dtype)

    @classmethod
    @torch.no_grad()
    def rounded(cls, linear: nn.Linear) -> "Int8Linear":
        """The nearest to an nn.Linear, scales in the dtype of the layer."""
        made = cls.like(linear)
        for mine, value in zip((made.q, made.scale), nearest(linear.weight, made.scale.dtype), strict=True):
            mine.copy_(value)
        if made.bias is not None:
            made.bias.copy_(linear.bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: (..., in)
        if torch.compiler.is_compiling() or not self._has_kernel(x):
            y = F.linear(x, self.q.to(x.dtype)) * self.scale
        else:
            y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.q, self.scale)
            y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _has_kernel(self, x: torch.Tensor) -> bool:
        # The kernel reads 16 aligned weights at once and crashes, instead of raising, where there are none.
        few = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() <= FEW * self.in_features
        return few and self.in_features % 16 == 0 and self.q.data_ptr() % 16 == 0

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, for a table of embeddings: ids (...) -> (..., in)."""
        return F.embedding(ids, self.q).to(self.scale.dtype) * F.embedding(ids, self.scale[:, None])

    def to_linear(self) -> nn.Linear:
        """The equivalent nn.Linear."""
        bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, self.q.device, self.scale.dtype)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, int8"


def quantized(model: nn.Module) -> list[str]:
    """Names of the int8 layers, in model order."""
    return [name for name, m in model.named_modules() if isinstance(m, Int8Linear)]
