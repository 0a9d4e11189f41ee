"""A recipe: one YAML file that says everything a run does. Frozen dataclasses on this side, YAML on the other.

The options of a stage are the keyword-only arguments of the verb that runs it: the signature is the one place
where they, their types and their defaults are written.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import string
import types
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .decompose import decompose
from .evaluation.profile import parse_latency
from .extend import INITS, extend
from .heal import heal
from .learn import learn
from .linalg.budget import BYTES, parse_size
from .linalg.metrics import METRICS
from .linalg.scores import SCORES
from .prune import BUDGETS, prune
from .reading import parse_yaml, read_yaml, shown
from .refine import refine
from .tasks import SCORES as ANSWER_SCORES
from .tasks import load_task
from .training.collage import VARIANTS
from .tune import tune


def _options(verb):
    """A frozen dataclass of the keyword-only arguments of `verb`."""
    fields = [
        (p.name, p.annotation, field(default=p.default))
        for p in inspect.signature(verb).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    return dataclasses.make_dataclass(verb.__name__.title(), fields, frozen=True)


Tune, Decompose, Learn, Prune, Extend, Refine, Heal = map(
    _options, (tune, decompose, learn, prune, extend, refine, heal)
)
Data = _options(load_task)


RESULT = "result"  # the name of the recipe's own row among those it compares
TARGETS = ("keep", "size", "max_drop", "mass", "latency")  # of prune: how much stays
COMMON = ("model", "task", "seed", "dtype", "sizes", "compare", "data", "tune")  # what all rows of a run share
TINY = math.ulp(0)  # above 0
FINITE = 3e38  # in float32
MANY = 2**31 - 1
LIMITS = {  # of every option that is a number, in any section: the least and the most
    "seed": (0, 2**32 - 1),
    "soft_labels": (0, MANY),
    "steps": (0, MANY),
    "batch_size": (1, MANY),
    "examples": (1, MANY),
    "train": (1, MANY),
    "validation": (1, MANY),
    "test": (1, MANY),
    "max_length": (1, MANY),
    "rounds": (0, MANY),
    "rank": (0, MANY),
    "new": (0, MANY),
    "lora": (0, MANY),
    "multiple_of": (1, MANY),
    "lr": (TINY, FINITE),
    "kl": (0, FINITE),
    "max_drop": (TINY, FINITE),
    "unpruned": (0, 1),
    "keep": (TINY, 1),
    "mass": (TINY, 1),
    "keep_embedding": (TINY, 1),
}


@dataclass(frozen=True)
class Recipe:
    model: str
    task: str
    seed: int = 0
    data: Data = Data()
    tune: Tune = Tune()
    decompose: Decompose = Decompose()
    learn: Learn = dataclasses.field(default_factory=lambda: Learn(steps=0))
    prune: Prune = Prune()
    extend: Extend = dataclasses.field(default_factory=lambda: Extend(rank=0))
    refine: Refine = Refine()
    heal: Heal = Heal()
    teacher: str = (
        "float32"  # dtype of the dense parent while it teaches; bfloat16 takes half the memory, int8 a quarter
    )
    soft_labels: int = 64  # so many of the parent's likeliest tokens, found once, teach; 0: all, anew for every batch
    dtype: str = "bfloat16"  # of the final checkpoint and of all evaluation
    sizes: list = field(default_factory=list)  # further sizes, 0.5 (to keep) or "2x": a family from one learning
    compare: dict = field(default_factory=dict)  # row name -> {"section.key": value} that differ from this recipe

    def variants(self):
        """`{name: Recipe}` of the rows in `compare`."""
        return {name: override(self, changes, f"compare.{name}") for name, changes in self.compare.items()}

    def family(self):
        """`{name: Recipe}` of the further `sizes`; each still names all of them: it learns down to the smallest."""
        own = self.prune.size if self.prune.keep is None else self.prune.keep
        whole = dataclasses.replace(self, sizes=[*self.sizes, own])
        return {f"{RESULT} at {size}": whole.at(size) for size in self.sizes}

    def at(self, size):
        """This recipe at another size: a fraction to keep of the targeted parameters, or one of the whole model."""
        targets = dict.fromkeys(TARGETS) | ({"size": size} if isinstance(size, str) else {"keep": size})
        return override(self, {f"prune.{k}": v for k, v in targets.items()}, "sizes")


SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)}


def read(path, overrides=()):
    """A Recipe from a YAML file and `section.key=value` strings. Raises ValueError naming file and key."""
    path = Path(path)
    content = read_yaml(path)
    for key in ("model", "task"):
        if key not in content:
            raise ValueError(f"{path} does not name a {key}")
    recipe = override(Recipe(model="", task=""), _flat(content, path), str(path))
    changes = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{shown(text)} should read key=value, for example prune.keep=0.25")
        changes[key] = parse_yaml(value, f"command line: {key}")
    recipe = override(recipe, changes, "command line")
    _check_rows(recipe, path)
    for name, row in {"": recipe, **recipe.family(), **recipe.variants()}.items():  # mistakes show now, not after hours
        try:
            _check_values(row)
        except ValueError as error:
            raise ValueError(f"{path}{name and f', {name}'}: {error}") from None
    return recipe


def _check_rows(recipe, path):
    """Raise ValueError unless further sizes and rows of `compare` are other models under names of their own."""
    own = recipe.prune.size if recipe.prune.keep is None else recipe.prune.keep
    seen = {}
    for size in [*([] if own is None else [own]), *recipe.sizes]:
        if type(size) not in (int, float, str):
            raise ValueError(f"{path}: sizes holds {shown(size)}, a size is a fraction to keep or text like 4x")
        try:
            amount = parse_size(size) if isinstance(size, str) else ("keep", size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if amount in seen:
            raise ValueError(f"{path}: the size {size!r} is the same as {seen[amount]!r}: name every size once")
        seen[amount] = size
    for name, changes in recipe.compare.items():
        where = f"{path}: compare.{shown(name)[1:-1]}"
        if name.casefold() in ("parent", RESULT) or name.casefold().startswith(f"{RESULT} at "):
            raise ValueError(f"{where} is the name of a row that every run has: choose another")
        if not 0 < len(name) <= 60 or not name.isprintable() or name != name.strip():
            raise ValueError(f"{where}: the name of a row is up to 60 printable characters, none a space at its ends")
        if not isinstance(changes, dict) or not changes:
            raise ValueError(
                f"{where} is {shown(changes)}, it should hold what differs from the recipe, as heal.steps: 50"
            )
        for key in changes:
            if key.partition(".")[0] in COMMON:
                raise ValueError(f"{where}: {key} is what all rows share: a run of its own can have another")


def _check_values(r):
    for name, value, known in (
        ("decompose.metric", r.decompose.metric, METRICS),
        ("prune.budget", r.prune.budget, BUDGETS),
        ("prune.score", r.prune.score, SCORES),
        ("extend.init", r.extend.init, INITS),
        *((f"{s}.precision", getattr(r, s).precision, ("fp32", *VARIANTS)) for s in ("tune", "learn", "heal")),
        ("dtype", r.dtype, BYTES),
        ("teacher", r.teacher, (*BYTES, "int8")),
        ("data.score", r.data.score, (None, *ANSWER_SCORES)),
    ):
        if value not in known:
            raise ValueError(f"{name} is {shown(value)}; known are {', '.join(map(str, known))}")
    targets = {k: getattr(r.prune, k) for k in TARGETS if getattr(r.prune, k) is not None}
    if len(targets) != 1:
        raise ValueError(f"prune names {' and '.join(targets) or 'no size'}: give exactly one of {', '.join(TARGETS)}")
    if r.prune.size is not None:
        parse_size(r.prune.size)
    if r.prune.latency is not None:
        parse_latency(r.prune.latency)
    _check_data(r)
    if r.prune.keep_embedding is not None and not r.decompose.embedding:
        raise ValueError("prune.keep_embedding is for an embedding written as bases: it goes with decompose.embedding")
    if r.decompose.embedding and r.prune.keep_embedding is None:
        if "size" not in targets:
            raise ValueError(
                "the embedding's part is found in a size of the whole model: give prune.size or keep_embedding"
            )
        if r.learn.steps and r.learn.rounds:
            raise ValueError("learning prunes the layers to a size known beforehand: give prune.keep_embedding with it")
    if r.sizes and not {"keep", "size"} & targets.keys():
        raise ValueError("sizes is a list of further sizes: prune itself needs keep or size then")
    if r.prune.budget != "mass" and "mass" in targets:
        raise ValueError("prune.mass is a share of every layer's scores: it goes with prune.budget=mass")
    if "latency" in targets and (r.prune.costs is None or r.prune.budget != "global"):
        raise ValueError("prune.latency needs prune.costs, a file of basis-select profile, and prune.budget=global")
    if r.learn.rounds > (room := r.learn.steps - int(r.learn.unpruned * r.learn.steps)) and r.learn.steps:
        raise ValueError(f"learn.rounds={r.learn.rounds} prunings do not fit into {room} steps of learning")


def _check_data(r):
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


def write(recipe):
    """The YAML text of a recipe with every default written out."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _flat(content, path):
    flat = {}
    for key, value in content.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key} holds options, {shown(value)} is none")
            flat |= {f"{key}.{name}": v for name, v in value.items()}
        else:
            flat[key] = value
    return flat


def override(recipe, changes, where):
    """`recipe` with `{"key" or "section.key": value}` changed; every key and type is checked."""
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: {shown(changes)} is not a mapping of recipe keys")
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        if dot and section in SECTIONS:
            options = getattr(recipe, section)
            value = _checked(options, name, value, f"{where}: {key}", f"{section}.")
            recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(options, **{name: value})})
        else:
            if key in SECTIONS:
                raise ValueError(f"{where}: {key} holds options; set one of them, for example {key}.{_first(key)}")
            value = _checked(recipe, key, value, f"{where}: {key}", "")
            recipe = dataclasses.replace(recipe, **{key: value})
    return recipe


def _first(section):
    return dataclasses.fields(SECTIONS[section])[0].name


def _checked(options, name, value, where, prefix):
    known = {f.name: f.type for f in dataclasses.fields(options)}
    if name not in known:
        every = [*known, *(f"{s}.{f.name}" for s in SECTIONS for f in dataclasses.fields(SECTIONS[s]))]
        near = difflib.get_close_matches(name, every, 1)
        hint = (
            f"; did you mean {prefix if near[0] in known else ''}{near[0]}?"
            if near
            else f"; known are {', '.join(known)}"
        )
        raise ValueError(f"{where} is not a recipe key{hint}")
    expected = known[name]
    kinds = expected.__args__ if isinstance(expected, types.UnionType) else (expected,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, str) and float in kinds:
        with contextlib.suppress(ValueError):  # YAML reads 1e-4 as text
            value = float(value)
    if not any(type(value) is kind for kind in kinds):
        names = " or ".join("nothing" if k is types.NoneType else k.__name__ for k in kinds)
        raise ValueError(f"{where} is {shown(value)}, it should be {names}")
    if type(value) in (int, float):
        least, most = LIMITS[name]
        if not least <= value <= most:
            raise ValueError(f"{where} is {shown(value)}, it should be {_range(least, most)}")
    return value


def _range(least, most):
    if (least, most) == (TINY, 1):
        return "a fraction above 0 and up to 1"
    if most == 1:
        return "a fraction from 0 to 1"
    if least == TINY:
        return "above 0" + ("" if most != FINITE else " and finite")
    return f"at least {least}" + (" and finite" if most == FINITE else f" and at most {most}")
