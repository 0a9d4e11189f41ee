"""A run's folder on disk: whose it is, whether it is whole, one run at a time."""

import contextlib
import ctypes
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..checkpoint.checks import SIDECAR, check, recorded_files, stored, weight_hash
from ..system.reading import read_json, read_lines, sha256, state
from ..system.writing import settle, sync

NAME = r"\.?[a-z_]+-[0-9a-f]{10}"  # of the folder of a stage; hidden until it is whole
FINALS = ("final", "final-*")
WRITTEN = ("recipe.yaml", "manifest.json", "metrics.jsonl", "results.json", "results.md", "report.html", "curve.*")
STAGE = {"stage": str, "options": dict, "upstream": [str], "seconds": float, "peak_memory_bytes": int}
BOUND = (float, type(None))
INTERVAL = {"value": float, "low": BOUND, "high": BOUND}
SIZES = {"bases": int, "targeted": int, "targeted_dense": int, "parameters": int, "parameters_dense": int, "bytes": int}
FACTS = {  # what stages without a model leave
    "evaluate": ("evaluation.json", {"accuracy": (dict, type(None)), "nll": INTERVAL, "n": int, "items": [dict]}),
    "time": ("speed.json", {str: {"median": float, "low": float, "high": float}}),
}
EXCHANGE = 2  # of Linux' renameat2, both paths relative to the working folder
HERE = -100


def fingerprint(source: str | Path) -> list[list[str]]:
    """`[[name, sha256], ...]` of a local file, or of those in a folder and of the base of an adapter there.

    Empty for what is not on disk.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    found = [[p.name, _digest(p)] for p in files]
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).resolve() != path.resolve():
            found += fingerprint(base)
    return found


def _digest(path: Path) -> str:
    """The sha256 of a file, computed once in a process for a state of it."""
    return _sha256(path.resolve(), state(path.stat()))


@functools.cache
def _sha256(path: Path, found: tuple[int, ...]) -> str:
    return sha256(path)


def require_own(folder: Path, model: str) -> None:
    """Raise ValueError if a run in `folder` would replace anything that no run wrote."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --out names the folder of a run")
    if Path(model).is_dir() and Path(model).resolve() == folder.resolve():
        raise ValueError(f"{folder} is the folder of the model: name another with --out")
    there = sorted(p.name for pattern in (*WRITTEN, *FINALS, "stages") for p in folder.glob(pattern))
    if there and not _is_run(folder / "stages"):
        raise ValueError(f"{folder} holds {there[0]} but no run made it: name another folder with --out, or move that")
    for path in (p for pattern in WRITTEN for p in folder.glob(pattern)):
        if not path.is_file():
            raise ValueError(f"{path} is no file that a run wrote: move it")
    for path in (p for pattern in FINALS for p in folder.glob(pattern)):
        require_saved(path)


def _is_run(stages: Path) -> bool:
    """Whether a run made the folder `stages`: it makes that before all else, and only stages in it."""
    return stages.is_dir() and all(p.name.startswith(".") or re.fullmatch(NAME, p.name) for p in stages.iterdir())


def require_saved(folder: Path) -> None:
    """Raise ValueError unless every file of a published checkpoint is the one that was saved, and nothing is beside."""
    if folder.is_symlink() or not folder.is_dir() or not (folder / SIDECAR).is_file():
        raise ValueError(f"{folder} is no checkpoint that a run wrote: move it")
    known = recorded_files(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in known or path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} was not written by a run, and this run would remove it with {folder}: move it")
    try:
        check(folder)
    except ValueError as error:
        raise ValueError(f"{error}; a run would remove it with {folder}: move that") from None


def check_stages(folder: Path) -> None:
    """Raise ValueError, naming the file, unless every stage in the folder of a run is whole, as far as headers tell.

    The hashes of weights are checked where they are loaded.
    """
    for path in sorted(folder.glob("stages/*")):
        if not re.fullmatch(NAME, path.name):
            continue
        if path.is_symlink() or not path.is_dir():
            raise ValueError(f"{path} is not the folder of a stage: remove it, and the stage is made again")
        if not path.name.startswith("."):
            try:
                _check_stage(path, path.name.rpartition("-")[0])
            except (ValueError, OSError) as error:
                raise ValueError(f"{error}; remove {path}, and the stage is made again") from None


def _check_stage(path: Path, name: str) -> None:
    facts = read_json(path / "stage.json", STAGE)
    if facts["stage"] != name:
        raise ValueError(f"{path / 'stage.json'} is of another stage, {facts['stage']}")
    if name in FACTS:
        read_json(path / FACTS[name][0], FACTS[name][1])
    if (path / "metrics.jsonl").exists():
        read_lines(path / "metrics.jsonl", {"step": int, "loss": float})
    if name == "derivatives":
        stored(path)
    if name in (*FACTS, "derivatives", "soft_labels"):
        return
    facts = read_json(path / "stage.json", {"sizes": SIZES, "weights_sha256": str})
    stored(path / "model")
    if weight_hash(path / "model") != facts["weights_sha256"]:
        raise ValueError(f"{path / 'model'} holds other weights than {path / 'stage.json'} says")


def sweep(folder: Path) -> None:
    """Finish or remove what killed runs left in the folder of a run; whoever calls it holds the lock."""
    for old in folder.glob(".final*.old"):
        target = old.with_name(old.name[1 : -len(".old")])
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for path in (*folder.glob(".final*.new"), *folder.glob("stages/*/.model-*")):
        shutil.rmtree(path)
    for path in (*folder.glob(".*.partial"), *folder.glob("stages/*/.*.partial")):
        path.unlink()


def publish(final: Path, target: Path) -> None:
    """Copy the checkpoint of a stage to `target`, which holds the old one until the new one is whole and on disk."""
    if target.exists():
        require_saved(target)
        if (target / SIDECAR).read_bytes() == (final / "model" / SIDECAR).read_bytes():
            return
    new = target.with_name(f".{target.name}.new")
    shutil.copytree(final / "model", new)
    check(new)
    settle(new)
    old = target.with_name(f".{target.name}.old")
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new)
    else:  # `sweep` puts the old one back if the process dies between these two
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two folders have changed their names in one step, which Linux can on most file systems."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def require_disk(folder: Path, upstream: Iterable[Path]) -> None:
    """Stop before a stage whose checkpoint and training state would not fit."""
    weights = [p.stat().st_size for u in upstream for p in u.glob("model/*.safetensors")]
    need, free = 4 * max(weights, default=0), shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"the next stage may write {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            str(folder),
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises ValueError if another process does."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another run is using {folder}: wait for it or name another folder") from None
