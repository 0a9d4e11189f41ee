"""In which precision products are computed: native bfloat16 where there is one, never an emulated one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..system.machine import fast_bf16


@contextmanager
def autocast(model: PreTrainedModel) -> Iterator[None]:
    """For an fp32 model bf16 matmuls where the device has them, for a bf16 model fp32 matmuls where it has not."""
    mixed = model.dtype == torch.float32 and fast_bf16(model.device)
    with products(model), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        yield


@contextmanager
def short_factors(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """`x` in fp32, and within it a CPU's fp32 products round what they multiply to bfloat16, if x has that dtype.

    So a sum of products of such numbers loses nothing, and takes a third of the time.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    if x.dtype == torch.bfloat16 and fast_bf16(x.device):
        setting.fp32_precision = "bf16"
    try:
        yield x.float()
    finally:
        setting.fp32_precision = before


class CastOnce(TorchFunctionMode):
    """Within it, or within several such blocks of one, weights of a model that are frozen are cast for products once.

    `torch.autocast` keeps the casts of weights that need a gradient, for one of its own blocks, and makes all others
    anew at every use. These go with this object.
    """

    def __init__(self, model: object):
        super().__init__()
        parameters = model.parameters() if isinstance(model, nn.Module) else ()  # other teachers have none
        self.weights = {p for p in parameters if p.dtype == torch.float32}
        self.casts = {}  # and which version of the weight each is of

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear and len(args) > 1 and args[1] in self.weights:
            args = (args[0], self._cast(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))

    def _cast(self, weight: nn.Parameter) -> torch.Tensor:
        device = weight.device.type
        if not torch.is_autocast_enabled(device) or (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        version, cast = self.casts.get(weight, (None, None))
        if version != weight._version:
            cast = weight.detach().to(torch.get_autocast_dtype(device))
            self.casts[weight] = weight._version, cast
        return cast


def products(model: PreTrainedModel) -> AbstractContextManager:
    """The part of `autocast` that torch does not restore by itself where a backward pass computes a layer anew."""
    if fast_bf16(model.device):
        return _ShortAttention() if model.device.type == "cpu" else nullcontext()
    return _Fp32Products() if model.dtype == torch.bfloat16 else nullcontext()


class _ShortAttention(TorchFunctionMode):
    """Causal attention of at most LONGEST tokens, trained on a CPU in bf16, gets a backward pass of its own.

    That of torch's fused kernel for CPUs takes 5 times as long for 48 tokens, twice for 176, as long for 384.
    """

    LONGEST = 256

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            bf16 = q.dtype == torch.bfloat16 or (q.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))
            plain = kwargs.get("is_causal") and kwargs.get("attn_mask") is None and not kwargs.get("dropout_p")
            alike = q.shape[-2] == k.shape[-2] <= self.LONGEST and q.shape[-1] == v.shape[-1] and q.dim() == 4
            if bf16 and plain and alike and torch.is_grad_enabled():
                scale = kwargs.get("scale") or q.shape[-1] ** -0.5
                return _CausalAttention.apply(*(x.bfloat16() for x in (q, k, v)), scale)
        return function(*args, **kwargs)


class _CausalAttention(torch.autograd.Function):
    """`softmax(scale * q k^T) v`; q: (rows, heads, tokens, d), k and v: (rows, heads that some share, tokens, d).

    Forward by torch's kernel, which leaves log-sum-exps of the scores: (rows, heads, tokens). Backward by products, of
    ROWS queries and the keys up to them at a time, so that what lies between products is still in the cache; queries
    that share a head of keys are one matrix. Scores are summed and kept in fp32: rounded to bfloat16, a score of 30 is
    wrong by a tenth, and so is its weight.
    """

    ROWS = 64

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        every = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, *every, is_causal=True, scale=scale)
        ctx.save_for_backward(q, k, v, y, log_sum)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (q, k, v, y, log_sum), scale = ctx.saved_tensors, ctx.scale
        tokens, size = q.shape[-2:]
        shared = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1], tokens  # heads of keys, queries of each, tokens
        mean = torch.linalg.vecdot(y.float(), g.float()).reshape(*shared, 1)  # of gradients of the weights
        log_sum = log_sum.reshape(*shared, 1)
        of_q, of_k, of_v = q.new_empty(*shared, size), *(x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
        q, g = (x.reshape(*shared, size) for x in (q, g))
        k, v, of_k_flat, of_v_flat = (x.reshape(shared[0], tokens, size) for x in (k, v, of_k, of_v))
        wide_k = k.float()
        for start in range(0, tokens, _CausalAttention.ROWS):
            end = min(tokens, start + _CausalAttention.ROWS)
            block = (*shared[:2], end - start, end)
            q_here, g_here = (x[:, :, start:end].reshape(shared[0], -1, size) for x in (q, g))
            p = (q_here.float() @ wide_k[:, :end].mT).view(block).mul_(scale).sub_(log_sum[:, :, start:end]).exp_()
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=p.device).triu_(1)
            p[..., start:].masked_fill_(later, 0)
            of_v_flat[:, :end] += p.to(g.dtype).view(shared[0], -1, end).mT @ g_here
            of_p = (g_here @ v[:, :end].mT).view(block).float()
            of_scores = of_p.sub_(mean[:, :, start:end]).mul_(p).mul_(scale).to(q.dtype).view(shared[0], -1, end)
            of_q[:, :, start:end] = (of_scores @ k[:, :end]).view(*block[:3], size)
            of_k_flat[:, :end] += of_scores.mT @ q_here
        return of_q.view_as(y), of_k.to(q.dtype), of_v.to(q.dtype), None


class _Fp32Products(TorchFunctionMode):
    """Products of bf16 tensors summed in fp32 and rounded once, as native bf16 units do it.

    On a processor without them torch's own bf16 matmul is a hundred times slower than its fp32 one.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS and args[0].dtype == torch.bfloat16:
            if function is F.linear:
                return _Linear.apply(*args, *kwargs.values())
            wide = [_fp32(x) if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for x in args]
            return function(*wide, **kwargs).to(torch.bfloat16)
        return function(*args, **kwargs)


_PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.Tensor.matmul}


def _fp32(x: torch.Tensor) -> torch.Tensor:
    """A tensor in fp32. torchao's rounded weights are multiplied out: their own `float` changes the label alone."""
    rounded = type(x).dequantize is not torch.Tensor.dequantize
    return (x.dequantize() if rounded else x).float()


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias`; what is kept for the backward pass stays bf16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), _fp32(weight), bias.float() if ctx.has_bias else None).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = g.flatten(0, -2).float()
        needs_x, needs_weight, needs_bias = (*ctx.needs_input_grad, False)[:3]
        grad_x = (rows @ _fp32(weight)).to(x.dtype).view_as(x) if needs_x else None
        grad_weight = (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0).to(weight.dtype) if needs_bias and ctx.has_bias else None
