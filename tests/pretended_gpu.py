"""A GPU where there is none: every tensor is on the CPU, some are said to be on `cuda:0`, and mixing them is an error.

What torch refuses on a real GPU is refused here: an operation over tensors of both devices, a generator of the other
one, NumPy. It says nothing of kernels, memory or speed.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
COPIES = ("copy_", "_to_copy", "_foreach_copy_", "set_", "_local_scalar_dense")  # cross devices
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index")  # of these the indices may be on the CPU
_there = {}  # storages that are said to be on the GPU


def device_of(x):
    if _device(x).type != "cpu":
        return _device(x)
    return GPU if x.untyped_storage()._cdata in _there else CPU


_device = torch.Tensor.device.__get__


def put(x, device):
    """The tensor `x` is said to be on `device` from now on."""
    storage = x.untyped_storage()
    if device.type != "cuda":
        _there.pop(storage._cdata, None)
    elif storage._cdata not in _there:
        _there[storage._cdata] = True
        weakref.finalize(storage, _there.pop, storage._cdata, None).atexit = False
    return x


def _asked(value):
    return isinstance(value, torch.device | str) and torch.device(value).type in ("cuda", "cpu")


class _Devices(TorchFunctionMode):
    """What is asked for on the GPU is made on the CPU and said to be there; tensors say where they are said to be."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == _device:
            return device_of(args[0])
        if function == torch.Tensor.is_cuda.__get__:
            return device_of(args[0]).type == "cuda"
        if function is torch.Tensor.numpy and device_of(args[0]) == GPU:
            raise TypeError("a tensor on the GPU has no NumPy array")
        if function is torch.Tensor.backward:
            return self._backward(args[0], bool(kwargs.get("retain_graph")))
        if function is torch.Tensor.__deepcopy__:  # copies storages, which no operation sees
            return put(function(*args, **kwargs), device_of(args[0]))
        if function is torch.Tensor.cpu:
            function, args, kwargs = torch.Tensor.to, (args[0], CPU), {}
        if function is torch.Tensor.to:
            return self._to(args, kwargs)
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if generator is not None:
            where = device_of(args[0]) if torch.is_tensor(args[0]) else torch.device(device or CPU)
            if where.type != generator.said.type:
                raise RuntimeError(f"{function.__name__} on {where} was given a generator of {generator.said}")
        if device is None or not _asked(device):
            return function(*args, **kwargs)
        device = torch.device(device)
        out = function(*args, **{**kwargs, "device": "cpu"})
        return put(out, device)

    def _backward(self, loss, retain):
        """Under this mode too, for hooks and for what checkpointing computes anew."""
        with self:
            options = {"allow_unreachable": True, "accumulate_grad": True}
            _engine_run_backward((loss,), (torch.ones_like(loss),), retain, False, (), **options)

    def _to(self, args, kwargs):
        x, *rest = args
        others = [*rest, *kwargs.values()]
        like = next((y for y in others if torch.is_tensor(y)), None)
        device = next((torch.device(y) for y in others if _asked(y)), None if like is None else device_of(like))
        if device is None or _device(x).type != "cpu":
            return torch.Tensor.to(*args, **kwargs)
        dtype = next((y for y in others if isinstance(y, torch.dtype)), x.dtype if like is None else like.dtype)
        copy = kwargs.get("copy", False) or device != device_of(x)
        with _free():
            return put(torch.Tensor.to(x, dtype, copy=copy), device)


class _Mixing(TorchDispatchMode):
    """Raises where an operation is over tensors of both devices."""

    free = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if name in INDEXED:
            tensors = [tensors[0], *(x for x in tensors[1:] if device_of(x) == GPU)]
        wide = [x for x in tensors if x.dim()] or tensors
        devices = {device_of(x) for x in wide}
        if len(devices) > 1 and name not in COPIES and not _Mixing.free:
            raise RuntimeError(f"{name} mixes devices: {[(str(device_of(x)), tuple(x.shape)) for x in tensors]}")
        out = function(*args, **kwargs)
        if GPU in devices and not _Mixing.free:
            for x in tree_leaves(out):
                if torch.is_tensor(x) and _device(x).type == "cpu":
                    put(x, device_of(wide[0]))
        return out


@contextlib.contextmanager
def _free():
    _Mixing.free += 1
    try:
        yield
    finally:
        _Mixing.free -= 1


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.said = torch.device(device)
        return made


@contextlib.contextmanager
def pretended_gpu():
    """Within it torch has one GPU, `cuda:0`."""
    from accelerate import Accelerator

    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: False),
            (torch.cuda, "get_device_name", lambda device=None: "pretended"),
            (torch.cuda.random, "get_rng_state", torch.get_rng_state),
            (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "mem_get_info", lambda device=None: (2**34, 2**34)),
            (torch, "Generator", _Generator),
            (Accelerator, "device", GPU),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(_Mixing())
        stack.enter_context(_Devices())
        yield GPU
