"""Read checkpoint folders that may be damaged or forged: only files are opened, only what was recorded is loaded."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import safe_open

from ..system.reading import opened, read_json, regular, state
from .format import HINT, METHOD, BasisSelectConfig, factored_weights
from .schema import require_description

SIDECAR = "basis_select.json"  # sha256 of every file that was saved
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
DTYPES = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
AGAIN = "load it with transformers after `import basis_select` and save it with basis_select.save"
# What may lie in a checkpoint though it was not saved with it, for nothing that loads one reads it.
HARMLESS = (".*", "*.md", "LICENSE*", "NOTICE*", "*.png", "*.svg", "recipe.yaml", "results.json", "manifest.json")


class Place(NamedTuple):
    """Where a tensor is stored, and as what: dtype by safetensors' name."""

    file: Path
    dtype: str
    shape: list


@contextlib.contextmanager
def checked(folder: str | Path, graphs: bool = False) -> Iterator[None]:
    """Check a checkpoint before the block and, after it, that what was hashed is what the block could read.

    Loaders open files by their paths, so no handle can be passed on to them: after the block every file must still be
    the one whose bytes were hashed, by its inode, size and times (a rename changes them, back or forth), or nothing is
    returned. Who writes through a mapping that was open before, and again after the block, is not found.
    graphs: the folder holds an export, whose weights are in graphs. Raises ValueError, naming file and tensor.
    """
    states = check(folder, graphs)
    yield
    require_unchanged(states)


def check(folder: str | Path, graphs: bool = False) -> dict[Path, tuple[int, ...]]:
    """`{file: what identifies it}` of a checkpoint that is whole, and that is what was saved.

    Every file must have its recorded sha256, every tensor be where the index says, and nothing else that a loader reads
    lie there. Raises ValueError, naming the file and the tensor.
    """
    folder = Path(folder)
    config = description(folder)
    recorded = _recorded(folder)
    _require_listed(folder, recorded, graphs)
    if not graphs:
        places = stored(folder)
        if config is not None:
            _check_guards(folder, config, places)
    states = _check_hashes(folder, recorded)
    if not graphs and not (folder / ADAPTER).exists():
        _check_index(folder, {name: place.file.name for name, place in places.items()})
        _check_choice(folder)
    return states


def require_unchanged(states: dict[Path, tuple[int, ...]]) -> None:
    """Raise ValueError unless every file is still the one that `check` hashed."""
    for path, found in states.items():
        if not path.exists() or state(path.stat()) != found:
            raise ValueError(f"{path} was replaced or changed while it was loaded: nothing of it is used")


def is_rounded(folder: str | Path) -> bool:
    """Whether a checkpoint in this folder has weights of 8 bits or fewer."""
    found = description(Path(folder))
    return found is not None and bool(found.rounded)


def is_saved(folder: str | Path) -> bool:
    """Whether `save` wrote this folder, or it says that it is one of ours."""
    return (Path(folder) / SIDECAR).exists() or is_compressed(folder)


def is_compressed(folder: str | Path) -> bool:
    """Whether this folder's config.json says that it is one of ours."""
    return _said(folder) is not None


def _said(folder: str | Path) -> dict | None:
    """What this folder's config.json says of our format, None if nothing."""
    path = Path(folder) / "config.json"
    said = read_json(path).get("quantization_config") if os.path.lexists(path) else None
    return said if isinstance(said, dict) and said.get("quant_method") == METHOD else None


def description(folder: Path) -> BasisSelectConfig | None:
    """The BasisSelectConfig in this folder's config.json, None if it is no checkpoint of ours."""
    said = _said(folder)
    if said is None:
        return None
    try:
        require_description(said)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return BasisSelectConfig(**said)


def _check_guards(folder: Path, config: BasisSelectConfig, places: dict[str, Place]) -> None:
    """What makes transformers refuse such a folder without this package must be what was written for that."""
    for guard in (HINT, *factored_weights(config)):
        for name, place in places.items():
            if not f".{name}".endswith(f".{guard}"):
                continue
            if len(place.shape) != 1 or (guard == HINT and place.shape != [0]):
                raise ValueError(
                    f"{place.file} holds {name} of shape {place.shape}, which should be empty: without basis_select, "
                    "transformers would load it as the layer"
                )


def _require_listed(folder: Path, recorded: dict[str, str], graphs: bool) -> None:
    """Raise ValueError for everything in the folder that was not saved with it, unless no loader reads it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink() and name not in recorded:
            continue
        top = name.partition("/")[0]
        if name == SIDECAR or top.startswith("."):
            continue
        if path.suffix in PICKLES and not graphs:
            raise ValueError(f"{path} may be a pickle, which is never loaded: remove it, safetensors hold the weights")
        if name in recorded:
            continue
        if top != name or not any(fnmatch(name, pattern) for pattern in HARMLESS):
            raise ValueError(f"{path} was not part of this checkpoint when it was saved: remove it")


def _recorded(folder: Path) -> dict[str, str]:
    """`{file name: sha256}` of what was saved, and is there."""
    path = folder / SIDECAR
    if not os.path.lexists(path):
        raise ValueError(f"{folder} has no {SIDECAR}, so its weights cannot be checked: {AGAIN}")
    recorded = read_json(path).get("sha256")
    if not isinstance(recorded, dict) or not recorded:
        raise ValueError(f"{path} lists no hashes")
    for name, digest in recorded.items():
        parts = PurePosixPath(name).parts
        if not name or "\\" in name or "\0" in name or name != "/".join(parts) or not {"..", "/"}.isdisjoint(parts):
            raise ValueError(f"{path} names {name!r}, which is no file of this folder")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"{path} records {digest!r:.80} for {name}, which is no sha256")
        if not os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} is missing")
        _require_own(folder, folder / name)
    return recorded


def _require_own(folder: Path, path: Path) -> None:
    """Raise ValueError for a link that leads out of the folder, unless the hub's cache made it."""
    home = folder.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{path} is a link out of its folder, to {target}: copy the file there")


def _check_hashes(folder: Path, recorded: dict[str, str]) -> dict[Path, tuple[int, ...]]:
    states = {}
    for name, digest in recorded.items():
        path = folder / name
        with opened(path) as file:
            states[path] = state(os.fstat(file.fileno()))
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            meant = "" if path.suffix == ".safetensors" else f"; if the change is meant, {AGAIN}"
            raise ValueError(f"{path} is not the file that was saved: its sha256 differs{meant}")
    return states


def _check_index(folder: Path, places: dict[str, str]) -> None:
    path = folder / INDEX
    if not path.exists():
        if set(places.values()) != {"model.safetensors"}:
            raise ValueError(f"{path} is missing: the weights are in several files")
        return
    content = read_json(path)
    index = content.get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(f"{path} has no weight_map")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{path} has no metadata")
    for name in sorted(index.keys() | places.keys()):
        if index.get(name) != places.get(name):
            said, found = index.get(name, "no file"), places.get(name, "no file")
            raise ValueError(f"{path} says that {name} is in {said}, it is in {found}")


def _check_choice(folder: Path) -> None:
    """The config must leave it to the index which files hold the weights."""
    path = folder / "config.json"
    if (chosen := read_json(path).get("transformers_weights")) is not None:
        raise ValueError(f"{path} names {chosen!r} as its weights (transformers_weights): only {INDEX} may name them")


def stored(folder: str | Path) -> dict[str, Place]:
    """`{name of a tensor: Place}`, from the headers alone. Raises ValueError, naming the file."""
    weights = sorted(path for path in Path(folder).glob("*.safetensors") if not path.name.startswith("."))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors file")
    found = {}
    for path in weights:
        here = _headers(path)
        if twice := sorted(found.keys() & here.keys()):
            raise ValueError(f"{twice[0]} is in both {found[twice[0]].file} and {path.name}")
        found |= here
    return found


def _headers(path: Path) -> dict[str, Place]:
    regular(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Place(path, part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def require_files(folder: str | Path) -> None:
    """Raise ValueError, naming it, for a FIFO, socket or device in this folder: some loader might open it."""
    for path in sorted(Path(folder).iterdir()):
        if not path.is_dir() and path.exists():
            regular(path)


def recorded_files(folder: str | Path) -> list[str]:
    """Names of the files that were saved as this checkpoint, and of the one that records them."""
    return [*_recorded(Path(folder)), SIDECAR]


def weight_hash(folder: str | Path) -> str:
    """One digest for all weight files of a checkpoint, from the recorded hash of each."""
    recorded = _recorded(Path(folder))
    digests = [f"{name} {recorded[name]}" for name in sorted(recorded) if name.endswith(".safetensors")]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
