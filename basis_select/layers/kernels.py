"""Products with weights of few bits as they are stored, attention, and the rounding of weights while they train
(straight_through.py), by C++ that is compiled once for a machine (cpp/).

3 and 2 bits are held in 4 by products.

PyTorch's own kernels for such weights take bfloat16 and reach half the speed for one token, and each factor would be a
call of its own, with a cost as large as a short product's (eval/results/NOTES.md).
"""

import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..system.machine import cache
from .rounded import RoundedLinear
from .rounding import GROUP

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpp"
ROWS = 8  # of a block of weights of 4 bits
ALIGNED = 64  # bytes of which everything begins at a multiple
LAYOUT = [f"-DBASIS_SELECT_{name}={n}" for name, n in (("GROUP", GROUP), ("ROWS", ROWS), ("ALIGNED", ALIGNED))]


def load(folder: Path | None = None) -> None:
    """Let PyTorch know the operators of cpp/kernels.cpp, compiled into `folder` where they are not there yet.

    folder: without one, that of what is made once for this machine. Raises RuntimeError with what the compiler said, or
    that there is none, and OSError if `folder` cannot be written.
    """
    if _are_loaded():
        return
    compiler = os.environ.get("CXX", "c++")
    options = ["-std=c++20", "-O3", "-shared", "-fPIC", *LAYOUT, *_of_processor()]
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(repr((sources, compiler, options, torch.__version__)).encode()).hexdigest()[:16]
    library = (folder or cache() / "kernels") / f"kernels-{key}.so"
    if not library.exists():
        _compile([compiler, *options], library)
    torch.ops.load_library(library)
    of = {"product": _product, "attention": _attention, "rounded_weight": _rounded}
    for name, made in (of | {"rounded_weight_backward": _gradients}).items():
        torch.library.register_fake(f"basis_select::{name}", made)


@functools.cache
def try_load(instead: str) -> bool:
    """Whether `load` did it. If not, one warning says why, and `instead`: what happens without the kernels."""
    try:
        load()
    except (OSError, RuntimeError) as error:
        log.warning("%s; %s", error, instead)
        return False
    return True


def _are_loaded() -> bool:
    return hasattr(torch.ops.basis_select, "product")


def _of_processor() -> list[str]:
    if platform.system() == "Darwin":
        return ["-undefined", "dynamic_lookup"]
    # Without the last two GCC multiplies far ahead of its sums, and sums in another order: more then lies on the stack.
    vectors = ["-mavx2", "-mfma", "-fno-tree-ter", "-fno-tree-reassoc"]
    by_capability = {"AVX2": vectors, "AVX512": [*vectors, "-DWIDER_THAN_256"]}
    return ["-fopenmp", *by_capability.get(torch.backends.cpu.get_cpu_capability(), [])]


def _compile(command: list[str], library: Path) -> None:
    at = Path(torch.__file__).parent
    libraries = [f"-L{at / 'lib'}", "-lc10", "-ltorch_cpu"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        made = Path(place) / library.name
        command = [*command, f"-I{at / 'include'}", str(SOURCES / "kernels.cpp"), "-o", str(made), *libraries]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"the kernels of basis_select need a C++ compiler, and there is no {command[0]}: "
                "install g++ or name one in CXX"
            ) from error
        except subprocess.CalledProcessError as error:
            said = "; ".join(error.stderr.strip().splitlines()[:3])
            raise RuntimeError(
                f"{command[0]} could not compile kernels.cpp, the kernels of basis_select: {said}"
            ) from error
        made.replace(library)


# What the operators return, for tensors that have shapes alone.


def _product(x: torch.Tensor, packed: torch.Tensor, layout: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], layout[-2])


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, used: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def _rounded(
    weight: torch.Tensor, scale: torch.Tensor, lowest: float, highest: float, in_bfloat16: bool
) -> torch.Tensor:
    return torch.empty_like(weight, dtype=torch.bfloat16 if in_bfloat16 else torch.float32)


def _gradients(
    weight: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor, lowest: float, highest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(weight), torch.empty_like(scale)


def pack(weights: list[RoundedLinear]) -> tuple[torch.Tensor, list[int]]:
    """`(packed, layout)` of weights as the kernel reads them; whole numbers of 8 bits and their float32 scales then lie
    there alone.
    """
    parts, layout, begins = [], [0], []
    for w in weights:
        w.widen()
        begins.append(sum(len(p) for p in parts))
        scale, q = (w.scale.detach().float(), w.q) if w.bits == 8 else _in_blocks(*w.numbers())
        flat = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (scale, q))
        parts += (F.pad(x, (0, _aligned(len(x)) - len(x))) for x in flat)
        layout += w.bits, w.out_features, w.in_features
    packed = torch.cat(parts)
    for w, begin in zip(weights, begins, strict=True):
        _keep_there(w, packed[begin:])
    return packed, layout


def in_one(layers: Sequence[nn.Module]) -> None:
    """Let all that is `packed` for these layers lie in one tensor: a compiled graph would be given each for every token
    anew.
    """
    if all(m.packed is layers[0].packed for m in layers):  # it does already
        return
    whole = torch.empty(sum(m.packed.numel() for m in layers), dtype=torch.uint8)
    begin = 0
    for m in layers:
        size = m.packed.numel()
        whole[begin : begin + size] = m.packed
        m.packed, m.layout = whole, [begin, *m.layout[1:]]
        if isinstance(m, RoundedLinear):
            _keep_there(m, whole[begin:])
        begin += size


def _keep_there(weight: RoundedLinear, packed: torch.Tensor) -> None:
    """Let whole numbers of 8 bits, and their scales in float32, lie nowhere but in `packed`, which begins with them."""
    if weight.bits < 8:
        return
    q, scale = weight.q, weight.scale
    begin = _aligned(4 * scale.numel())
    q.data = packed[begin : begin + q.numel()].view(q.dtype).view_as(q)
    if scale.dtype == torch.float32:
        scale.data = packed[: 4 * scale.numel()].view(torch.float32).view_as(scale)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _in_blocks(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(scales, whole numbers)` of 4 bits as cpp/stored.h has them: q (rows, inputs), scale (rows, groups)."""
    rows = -len(q) % ROWS
    q, scale = F.pad(q, (0, -q.shape[1] % GROUP, 0, rows)), F.pad(scale, (0, 0, 0, rows))
    eights = (q.int() + 8).unflatten(1, (-1, 4, 2))  # (rows, eights, pairs, even and odd)
    even = 4 * torch.arange(4, device=q.device, dtype=torch.int32)
    words = (eights << torch.stack([even, even + 16], dim=-1)).sum((-1, -2), dtype=torch.int32)
    return tuple(x.unflatten(0, (-1, ROWS)).transpose(1, 2) for x in (scale.bfloat16(), words))
