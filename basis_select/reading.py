"""Files that a user or an earlier run wrote, read strictly: whatever is wrong with one is a sentence that names it."""

import json
import reprlib

import yaml

LARGEST = 2**20  # bytes of a recipe
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class _Plain(yaml.SafeLoader):
    """YAML without tags, aliases and dates, whose keys are text and occur once."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, f"write out what *{event.anchor} stands for", event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag} has no meaning here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
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


def shown(value):
    """`repr`, cut to what fits into a sentence."""
    return _repr.repr(value)


def parse_yaml(text, where):
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


def read_yaml(path):
    """The mapping in a YAML file of at most LARGEST bytes. Raises ValueError or FileNotFoundError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe at {path}")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST // 2**20} MiB: it should be a recipe")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    content = parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping of recipe keys")
    return content


def parse_json(text, shape, where):
    """The JSON value in `text`, of a shape as in `misfit`. Raises ValueError, which begins with `where`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if wrong := misfit(value, shape):
        raise ValueError(f"{where} is damaged or was written by something else: {wrong}")
    return value


def read_json(path, shape=dict):
    """The value in a JSON file, of a shape as in `misfit`. Raises ValueError or FileNotFoundError naming the file."""
    return parse_json(_text(path), shape, path)


def read_lines(path, shape=dict, stop=None):
    """The values in the first `stop` lines of a JSONL file, each as in `read_json`."""
    lines = _text(path).splitlines()[:stop]
    return [parse_json(line, shape, f"{path}, line {i},") for i, line in enumerate(lines, 1)]


def _text(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def misfit(value, shape, name="it"):
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
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        return None if right else f"{name} is {shown(value)}, it should be {names}"
    return next((wrong for key, item, part in parts if (wrong := misfit(item, part, key))), None)
