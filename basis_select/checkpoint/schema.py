"""What `quantization_config` of a checkpoint may hold: the one place that says so, before anything is built from it."""

import difflib
import math
from typing import Any, get_args

from ..layers.rounding import Bits
from ..system.reading import shown

VERSION = 3
READABLE = (1, 2, 3)
LARGEST = 2**31  # above every rank that a tensor in memory can have


def require_version(version: Any) -> None:
    if version not in READABLE or type(version) is not int:
        raise ValueError(
            f"this checkpoint has format version {version}; this basis_select reads versions 1 to {VERSION}: "
            "install the one that wrote it, or a newer one"
        )


def require_description(description: Any) -> None:
    """Raise ValueError, naming the field, unless this is a `quantization_config` that format.py can build from."""
    if not isinstance(description, dict):
        raise ValueError(f"quantization_config is {shown(description)}, it should be an object")
    require_version(description.get("format_version"))
    for field, value in description.items():
        if field not in FIELDS:
            near = difflib.get_close_matches(str(field), FIELDS, 1)
            hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(FIELDS)}"
            raise ValueError(f"quantization_config has no field {shown(field)}{hint}")
        fits, meant = FIELDS[field]
        versions = VERSIONS_OF.get(field, READABLE)
        if description["format_version"] not in versions:
            of = " or ".join(map(str, versions))
            raise ValueError(f"quantization_config.{field} is of format version {of}, this is another")
        if not fits(value):
            raise ValueError(f"quantization_config.{field} is {shown(value)}, it should be {meant}")
    ranks = description.get("ranks", {})
    for name, rank in ranks.items():
        _require_rank(f"quantization_config.ranks gives {shown(name)}", rank)
    for name, head in description.get("heads", {}).items():
        if name not in ranks or not _counts(head) or not 0 < head < ranks[name]:
            raise ValueError(
                f"quantization_config.heads gives {shown(name)} {shown(head)} of its {ranks.get(name)} bases"
            )
    for name, bits in description.get("bits", {}).items():
        fits, meant = WIDTH
        if not fits(bits):
            raise ValueError(f"quantization_config.bits gives {shown(name)} {shown(bits)}, it should be {meant}")
    for field in ("embedding", "table"):
        if description.get(field) is not None:
            _require_embedding(description[field], field)
    _require_groups(description.get("groups", []), ranks)


def _require_rank(where: str, rank: Any) -> None:
    if not _counts(rank) or rank < 1:
        raise ValueError(f"{where} the rank {shown(rank)}, which is not a number of bases")


def _require_embedding(embedding: dict, of: str) -> None:
    embedding, fields = {"scale": 1.0, **embedding}, {**EMBEDDING, **(RANK if of == "embedding" else BITS)}
    if embedding.keys() != fields.keys():
        raise ValueError(f"quantization_config.{of} has {shown(sorted(embedding))}, it needs {sorted(fields)}")
    for field, (fits, meant) in fields.items():
        if not fits(embedding[field]):
            said = shown(embedding[field])
            raise ValueError(f"quantization_config.{of}.{field} is {said}, it should be {meant}")


def _require_groups(groups: list[list[str]], ranks: dict[str, int]) -> None:
    """Every group names layers that have one rank, each layer once in all."""
    seen = set()
    for group in groups:
        for name in group:
            if name not in ranks:
                raise ValueError(f"quantization_config.groups lists {name} in a group, ranks gives it none")
            if name in seen:
                raise ValueError(f"quantization_config.groups lists {name} in a group twice")
            if ranks[name] != ranks[group[0]]:
                both = f"{ranks[name]} and {ranks[group[0]]}"
                raise ValueError(
                    f"quantization_config gives {name} and {group[0]}, which share a basis, the ranks {both}"
                )
            seen.add(name)


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and all(value.split("."))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value)) and len(set(value)) == len(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_name, value))


NAMES = "a list of names of modules, each once"
FIELDS = {  # field -> (what it must satisfy, in words)
    "quant_method": (lambda x: isinstance(x, str), "a name"),
    "format_version": (_counts, "a number"),
    "ranks": (_is_object, "an object, {name of a module: rank}"),
    "groups": (
        lambda x: isinstance(x, list) and all(g and isinstance(g, list) and all(map(_is_name, g)) for g in x),
        "a list of lists of names of modules",
    ),
    "weighted": (lambda x: type(x) is int and x in (0, 1, 2), "0, 1 or 2"),
    "new": (_counts, "a number of bases"),
    "embedding": (lambda x: x is None or isinstance(x, dict), "an object or null"),
    "int8": (_is_names, NAMES),
    "bits": (_is_object, "an object, {name of a module: 2, 3, 4 or 8}"),
    "heads": (_is_object, "an object, {name of a module: number of bases}"),
    "table": (lambda x: x is None or isinstance(x, dict), "an object or null"),
}
VERSIONS_OF = {"int8": (1,), "bits": (2, 3), "heads": (2, 3), "table": (2, 3)}  # of fields that not all have
EMBEDDING = {
    "name": (_is_name, "the name of a module"),
    "tied": (lambda x: isinstance(x, bool), "true or false"),
    "scale": (lambda x: type(x) in (int, float) and 0 < x < math.inf, "a number above zero"),
}
RANK = {"rank": (lambda x: _counts(x) and x > 0, "a number of bases")}
WIDTH = (lambda x: type(x) is int and x in get_args(Bits), "2, 3, 4 or 8")
BITS = {"bits": WIDTH}
