"""In which precision products are computed: native bfloat16 where there is one, never an emulated one."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def fast_bf16(device):
    """Whether bf16 matmuls are native on this device; emulated ones are slower than fp32."""
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(model):
    """For an fp32 model bf16 matmuls where the device has them, for a bf16 model fp32 matmuls where it has not."""
    fast = fast_bf16(model.device)
    if model.dtype == torch.bfloat16 and not fast:
        return _Fp32Products()
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.float32 and fast)


class _Fp32Products(TorchFunctionMode):
    """Products of bf16 tensors summed in fp32 and rounded once, as native bf16 units do it.

    On a processor without them torch's own bf16 matmul is a hundred times slower than its fp32 one.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _PRODUCTS and args[0].dtype == torch.bfloat16:
            if function is F.linear:
                return _Linear.apply(*args, *kwargs.values())
            wide = [x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for x in args]
            return function(*wide, **kwargs).to(torch.bfloat16)
        return function(*args, **kwargs)


_PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.Tensor.matmul}


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias`; what is kept for the backward pass stays bf16."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), bias.float() if ctx.has_bias else None).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        rows = g.flatten(0, -2).float()
        needs_x, needs_weight, needs_bias = (*ctx.needs_input_grad, False)[:3]
        grad_x = (rows @ weight.float()).to(x.dtype).view_as(x) if needs_x else None
        grad_weight = (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0).to(weight.dtype) if needs_bias and ctx.has_bias else None
