"""Files that are replaced in one step, and are on disk when it is said that they are."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Return when all files of `folder`, and the folder, are on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_file(path: str | Path) -> None:
    """Raise ValueError unless a result can be written to the file `path`, before what it costs to get one."""
    path = Path(path)
    above = next(p for p in path.resolve().parents if p.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{above} is no folder in which files can be written"
        raise ValueError(f"the result cannot be written to {path}: {why}")
