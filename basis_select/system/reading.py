"""Files that a user or an earlier run wrote, read strictly: whatever is wrong with one is a sentence that names it."""

import hashlib
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

LARGEST = 2**20  # bytes of a recipe
NAMES = {dict: "an object", list: "a list", type(None): "null"}  # of kinds of values, as JSON has them
LARGEST_JSON = 64 * 2**20  # bytes: the index of a model with a million tensors
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class _Plain(yaml.SafeLoader):
    """YAML without tags, aliases and dates, whose keys are text and occur once."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, f"write out what *{event.anchor} stands for", event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag} has no meaning here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not key.tag.endswith(":str"):
                said = f"the key {key.value} is not text: put it in quotes" if key.value else "a key is empty"
                raise yaml.MarkedYAMLError(None, None, said if isinstance(key.value, str) else "a key is not text",
                                           key.start_mark)  # fmt: skip
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def shown(value: Any) -> str:
    """`repr`, cut to what fits into a sentence."""
    return _repr.repr(value)


def parse_yaml(text: str, where: str | Path) -> Any:
    """The value of a YAML text. Raises ValueError, which begins with `where`, for anything but plain YAML."""
    try:
        return yaml.load(text, _Plain)
    except RecursionError:
        raise ValueError(f"{where} is not valid YAML: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where} is not valid YAML: {place}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from None


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file of at most LARGEST bytes. Raises ValueError or FileNotFoundError naming the file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a recipe")
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe at {path}")
    content = parse_yaml(read_text(path, LARGEST), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping of recipe keys")
    return content


def regular(path: str | Path) -> None:
    """Raise ValueError unless `path` is a file: to open a FIFO waits for ever, to open a device may act."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is missing" if not os.path.islink(path) else f"{path} is a link to nothing") from None
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in KINDS if test(mode)), "special")
        raise ValueError(f"{path} is {kind}, it should be a file")


def opened(path: str | Path) -> BinaryIO:
    """A regular file, opened to read its bytes. Raises ValueError for anything else, without waiting for it."""
    regular(path)
    # Another may lie there by now: it does not block, and what was opened is asked what it is.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is no longer a file")
    return file


def state(found: os.stat_result) -> tuple[int, ...]:
    """What tells one state of a file from another, of its os.stat_result: no edit leaves its ctime as it was."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256(path: str | Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path, most: int | None = None) -> str:
    """The text of a UTF-8 file of at most `most` bytes, its lines ended by \\n. Raises ValueError naming the file."""
    with opened(path) as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:
        raise ValueError(f"{path} is larger than {most / 2**20:g} MB, which no such file is")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: str | Path, shape: type | tuple | dict | list = dict) -> Any:
    """The value in a JSON file, of a shape as in `misfit`. Raises ValueError naming the file."""
    return parse_json(read_text(path, LARGEST_JSON), shape, path)


def read_lines(path: str | Path, shape: type | tuple | dict | list = dict, stop: int | None = None) -> list:
    """The values in the first `stop` lines of a JSONL file, each as in `read_json`."""
    lines = read_text(path).splitlines()[:stop]
    return [parse_json(line, shape, f"{path}, line {i},") for i, line in enumerate(lines, 1)]


def parse_json(text: str, shape: type | tuple | dict | list, where: str | Path) -> Any:
    """The JSON value in `text`, of a shape as in `misfit`. Raises ValueError, which begins with `where`."""
    try:
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if wrong := misfit(value, shape):
        raise ValueError(f"{where} is damaged or was written by something else: {wrong}")
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no key occurs twice. Raises ValueError naming one that does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it names {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def misfit(value: Any, shape: type | tuple | dict | list, name: str = "it") -> str | None:
    """What of `value` does not have `shape`, as a phrase; None if all has.

    shape: a type or a tuple of types, `{key: shape}` with the keys that must be there, `{str: shape}` for any keys,
    `[shape]` for a list. A whole number is a float, true and false are no numbers.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is {shown(value)}, it should be an object"
        inner = dict.fromkeys(value, shape[str]) if str in shape else shape
        if missing := [key for key in inner if key not in value]:
            return f"{name} has no {missing[0]}"
        parts = ((f"{name}.{key}".removeprefix("it."), value[key], part) for key, part in inner.items())
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is {shown(value)}, it should be a list"
        parts = ((f"{name}[{i}]", item, shape[0]) for i, item in enumerate(value))
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        right = type(value) in kinds or (float in kinds and type(value) is int)
        names = " or ".join(NAMES.get(kind, kind.__name__) for kind in kinds)
        return None if right else f"{name} is {shown(value)}, it should be {names}"
    return next((wrong for key, item, part in parts if (wrong := misfit(item, part, key))), None)
