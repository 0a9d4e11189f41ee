"""What a process takes of this machine, and what numbers depend on beside the code."""

import contextlib
import ctypes
import gc
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants


def forget_peak_memory() -> None:
    """Give back what is freed and count anew; where the system cannot, the peak is that of the process so far.

    glibc keeps freed tensors of up to 32 MiB for itself: after tuning a model of 0.5 GiB that were 5.5 GiB.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes resident at the worst moment since `forget_peak_memory`."""
    # psutil 7.2 knows the peak on Windows alone; getrusage's, unlike Linux' VmHWM, cannot be counted anew.
    if Path("/proc/self/status").exists():
        return linux_memory("VmHWM")
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource  # only where there is such a thing

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def resident_memory() -> int:
    """Bytes resident now."""
    return psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a device; processes of one machine share that of its CPUs."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch's allocator
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def linux_memory(field: str) -> int:
    """Bytes that Linux gives for a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def cache() -> Path:
    """The folder of what is downloaded or made once for this machine."""
    return Path(os.environ.get("BASIS_SELECT_CACHE", Path(constants.HF_HOME) / "basis_select"))


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls are native on this device; emulated ones are slower than fp32."""
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def command_line() -> str:
    """The command that started this process, as a shell takes it."""
    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "basis-select"), *sys.argv[1:]])


def environment() -> dict:
    """`{versions, python, machine}`: what numbers depend on beside the code."""
    packages = ("basis-select", "torch", "transformers", "accelerate", "datasets", "lm-eval", "reasoning-gym")
    return {
        "versions": {name: version(name) for name in packages if _installed(name)},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    }


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def compile_options(device: torch.device) -> dict[str, bool | int]:
    """Of torch.compile. On a CPU the calls between products are C++: in Python they take as long as the products. And
    what is read more than once is computed once: a query and its angles would be for every key of every head.
    """
    if device.type != "cpu":
        return {}
    return {"cpp_wrapper": True, "cpp_wrapper_build_separate": True, "realize_reads_threshold": 0}
