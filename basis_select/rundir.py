"""A run's folder on disk: files replaced in one step, one run at a time, room and memory watched."""

import contextlib
import ctypes
import errno
import gc
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock, Timeout


def fingerprint(source):
    """What tells one state of a local file or folder from another; empty for what is not on disk."""
    path = Path(source)
    found = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in found]


def publish(final, target):
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(final / "model", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def require_disk(folder, upstream):
    """Stop before a stage whose checkpoint and training state would not fit."""
    weights = [p.stat().st_size for u in upstream for p in u.glob("model/*.safetensors")]
    need, free = 4 * max(weights, default=0), shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"the next stage may write {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            str(folder),
        )


def forget_peak_memory():
    """Give back what is freed and count anew; where the system cannot, the peak is that of the process so far.

    glibc keeps freed tensors of up to 32 MiB for itself: after tuning a model of 0.5 GiB that were 5.5 GiB.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """Bytes resident at the worst moment since `forget_peak_memory`."""
    return process_memory("VmHWM")


def resident_memory():
    """Bytes resident now."""
    return process_memory("VmRSS")


def process_memory(field):
    """Bytes that Linux gives for a field of /proc/self/status; elsewhere the peak of the process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if field in line)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


@contextlib.contextmanager
def alone(folder):
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another run is using {folder}: wait for it or name another folder") from None


def environment():
    """`{versions, python, machine}`: what numbers depend on beside the code."""
    packages = ("basis-select", "torch", "transformers", "accelerate", "datasets", "lm-eval", "reasoning-gym")
    return {
        "versions": {name: version(name) for name in packages if _installed(name)},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    }


def _installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def replace_text(path, text):
    """Replace a file in one step: readers see the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
