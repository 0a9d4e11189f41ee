"""A recipe: one YAML file that says everything a run does. Frozen dataclasses on this side, YAML on the other.

The options of a stage are the keyword-only arguments of the verb that runs it: the signature is the one place
where they, their types and their defaults are written.
"""

import contextlib
import dataclasses
import difflib
import inspect
import types
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .decompose import decompose
from .extend import INITS, extend
from .heal import heal
from .learn import learn
from .linalg.budget import BYTES, keep_for
from .linalg.metrics import METRICS
from .linalg.scores import SCORES
from .prune import BUDGETS, prune
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
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping of recipe keys")
    for key in ("model", "task"):
        if key not in content:
            raise ValueError(f"{path} does not name a {key}")
    recipe = override(Recipe(model=content.pop("model"), task=content.pop("task")), _flat(content, path), str(path))
    changes = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} should read key=value, for example prune.keep=0.25")
        changes[key] = yaml.safe_load(value)
    recipe = override(recipe, changes, "command line")
    for name, row in {"": recipe, **recipe.family(), **recipe.variants()}.items():  # mistakes show now, not after hours
        try:
            _check_values(row)
        except ValueError as error:
            raise ValueError(f"{path}{name and f', {name}'}: {error}") from None
    return recipe


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
            raise ValueError(f"{name} is {value!r}; known are {', '.join(map(str, known))}")
    targets = {k: getattr(r.prune, k) for k in TARGETS if getattr(r.prune, k) is not None}
    if len(targets) != 1:
        raise ValueError(f"prune names {' and '.join(targets) or 'no size'}: give exactly one of {', '.join(TARGETS)}")
    for key, value in targets.items():
        if key in ("keep", "mass") and not 0 < value <= 1:
            raise ValueError(f"prune.{key} is {value}, it should be a fraction above 0 and up to 1")
        if key == "size":
            keep_for(2**80, 2**80, r.dtype, size=value)  # only its form: the model is not known yet
    if r.soft_labels < 0:
        raise ValueError(f"soft_labels is {r.soft_labels}, it should be a number of tokens, or 0 for the parent itself")
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


def write(recipe):
    """The YAML text of a recipe with every default written out."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _flat(content, path):
    flat = {}
    for key, value in content.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key} holds options, {value!r} is none")
            flat |= {f"{key}.{name}": v for name, v in value.items()}
        else:
            flat[key] = value
    return flat


def override(recipe, changes, where):
    """`recipe` with `{"key" or "section.key": value}` changed; every key and type is checked."""
    if not isinstance(changes, dict):
        raise ValueError(f"{where}: {changes!r} is not a mapping of recipe keys")
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
        raise ValueError(f"{where} is {value!r}, it should be {names}")
    if name in (
        "steps",
        "batch_size",
        "examples",
        "train",
        "validation",
        "test",
        "max_length",
        "rank",
        "lora",
        "multiple_of",
    ):
        least = 0 if name in ("steps", "rank", "lora") else 1
        if value < least:
            raise ValueError(f"{where} is {value}, it should be at least {least}")
    if name == "lr" and value is not None and not value > 0:
        raise ValueError(f"{where} is {value}, it should be above 0")
    return value
