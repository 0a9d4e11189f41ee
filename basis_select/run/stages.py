"""The stages of a recipe, in their order: what a run does on disk, a plan adds up and a comparison does in memory.

A stage reads and makes products: `parent` (the dense model that the task runs well on), `tokenizer`, `model` (what that
has become so far), `teacher`, `derivatives`, `final` (the checkpoint that is published) and `evaluation`. What a row of
a recipe has reached is a dict of them, its state. `walk` leads a row through the list; a runner, of which there is one
for each of the three uses, says what a stage's product is there: a folder, a key, or the thing itself.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from . import estimates, measuring, verbs
from .recipe import Recipe
from .view import View, own

ONE = "one"  # the first process alone
COPIES = "copies"  # all processes, each with a model of its own
SPREAD = "spread"  # all processes, the model in parts if the run is sharded


@dataclass(frozen=True)
class Stage:
    """One entry of the list.

    options: what its product depends on beside what it reads, None where the recipe leaves the stage out; says: what it
    does, in words; run: does it, see run/work.py; cost: what it will cost; processes: ONE, COPIES or SPREAD; dense:
    whether the parent, which is published and evaluated too, goes through it; otherwise: what stands in for its product
    where it is left out.
    """

    name: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    options: Callable[[View], dict | None]
    says: Callable[[View], str]
    run: Callable
    cost: Callable
    processes: Callable[[Recipe, bool], str] = lambda recipe, shard: ONE
    dense: bool = False
    otherwise: str | None = None


def walk(
    row: Recipe,
    runner: Any,
    state: dict | None = None,
    *,
    dense: bool = False,
    after: str | None = None,
    until: str | None = None,
    given: Collection[str] = (),
) -> dict:
    """The state of a row of a recipe behind all stages, or those `after` one `until` another, named.

    runner: `view(row, state, dense)` is the View where a stage begins, `do(stage, view, options, read)` returns what
    stands for its product, `read` being what stands for those that it reads. dense: the row is the parent's. given:
    products that `state` holds from the start, and that no stage makes.
    """
    state, names = dict(state or {}), [stage.name for stage in STAGES]
    first = names.index(after) + 1 if after else 0
    for stage in STAGES[first : names.index(until) + 1 if until else None]:
        if (dense and not stage.dense) or set(stage.makes) <= set(given):
            continue
        view = runner.view(row, state, dense)
        options = stage.options(view)
        if options is not None:
            read = {product: state[product] for product in stage.reads if product in state}
            state |= dict.fromkeys(stage.makes, runner.do(stage, view, options, read))
        elif stage.otherwise:
            state |= dict.fromkeys(stage.makes, state[stage.otherwise])
    return state


def key(stage: Stage, options: dict, upstream: list, data: str | None) -> str:
    """The name of what a stage makes: `NAME-DIGEST` of its options, all upstream and the examples (`data`)."""
    given = [stage.name, options, upstream, data]
    return f"{stage.name}-{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]}"


def _labels(name: str) -> Stage:
    """Options of the stage in which the parent says what "learn" or "heal" will need of it."""

    def options(view: View) -> dict | None:
        if not (examples := verbs.examples_to_label(view.recipe, view.task, name)):
            return None
        digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
        return {"top": view.recipe.soft_labels, "teacher": view.recipe.teacher, "examples": digest}

    return Stage(
        name="soft_labels",
        reads=("parent",),
        makes=("teacher",),
        options=options,
        says=lambda view: (
            f"ask the parent about {len(verbs.examples_to_label(view.recipe, view.task, name)):,} examples"
        ),
        run=lambda work: verbs.run_label(work, name),
        cost=lambda view, machine: estimates.labelling(
            view, machine, verbs.examples_to_label(view.recipe, view.task, name)
        ),
        processes=lambda recipe, shard: SPREAD,
        otherwise="parent",
    )


STAGES = (
    Stage(
        name="load",
        reads=(),
        makes=("parent", "model", "tokenizer"),
        options=lambda view: view.source,
        says=lambda view: "read the model",
        run=verbs.run_load,
        cost=estimates.loading,
        dense=True,
    ),
    Stage(
        name="tune",
        reads=("parent",),
        makes=("parent", "model"),
        options=lambda view: own(view.recipe.tune) if view.recipe.tune.steps else None,
        says=lambda view: f"train the dense model, {_steps(view.recipe.tune)}",
        run=verbs.run_tune,
        cost=estimates.tuning,
        processes=lambda recipe, shard: SPREAD,
        dense=True,
    ),
    Stage(
        name="trim",
        reads=("parent",),
        makes=("parent", "model", "tokenizer"),
        options=verbs.trim_options,
        says=lambda view: "keep the tokens that the task needs",
        run=verbs.run_trim,
        cost=estimates.trimming,
    ),
    Stage(
        name="decompose",
        reads=("parent",),
        makes=("model",),
        options=lambda view: own(view.recipe.decompose),
        says=verbs.say_decompose,
        run=verbs.run_decompose,
        cost=estimates.decomposing,
        processes=lambda recipe, shard: ONE if shard else COPIES,  # a copy in every process is what must not be
    ),
    _labels("learn"),
    Stage(
        name="learn",
        reads=("model", "teacher"),
        makes=("model",),
        options=verbs.learn_options,
        says=lambda view: f"learn which bases matter, {_steps(view.recipe.learn)}",
        run=verbs.run_learn,
        cost=estimates.learning,
        processes=lambda recipe, shard: COPIES,  # shapes change while it trains
    ),
    Stage(
        name="derivatives",
        reads=("model",),
        makes=("derivatives",),
        options=verbs.derivatives_options,
        says=lambda view: "differentiate the loss by the weights of the bases",
        run=verbs.run_derivatives,
        cost=estimates.differentiating,
    ),
    Stage(
        name="prune",
        reads=("model", "derivatives"),
        makes=("model",),
        options=verbs.prune_options,
        says=verbs.say_prune,
        run=verbs.run_prune,
        cost=estimates.pruning,
    ),
    Stage(
        name="extend",
        reads=("model", "parent"),
        makes=("model",),
        options=lambda view: own(view.recipe.extend) if view.recipe.extend.rank else None,
        says=lambda view: f"add {view.recipe.extend.rank} new bases to every layer",
        run=verbs.run_extend,
        cost=estimates.extending,
    ),
    Stage(
        name="refine",
        reads=("model", "parent"),
        makes=("model",),
        options=lambda view: own(view.recipe.refine) if view.recipe.refine.steps else None,
        says=lambda view: f"match every block to the parent's, {_steps(view.recipe.refine)} each",
        run=verbs.run_refine,
        cost=estimates.refining,
    ),
    _labels("heal"),
    Stage(
        name="heal",
        reads=("model", "teacher"),
        makes=("model",),
        options=verbs.heal_options,
        says=lambda view: f"train the smaller model, {_steps(view.recipe.heal)}",
        run=verbs.run_heal,
        cost=estimates.healing,
        # Adapters are added to whole layers; a rounded model is read whole, and what trains of it is spread by heal.
        processes=lambda recipe, shard: COPIES if recipe.heal.lora or recipe.prune.bits != 16 else SPREAD,
    ),
    Stage(
        name="save",
        reads=("model",),
        makes=("final",),
        options=lambda view: {"dtype": view.recipe.dtype},
        says=lambda view: f"write the checkpoint in {view.recipe.dtype}",
        run=verbs.run_save,
        cost=estimates.saving,
        dense=True,
    ),
    Stage(
        name="evaluate",
        reads=("final",),
        makes=("evaluation",),
        options=lambda view: {},
        says=lambda view: f"{'answer' if view.task.score else 'score'} {len(view.task.test):,} test examples",
        run=verbs.run_evaluate,
        cost=estimates.evaluating,
        dense=True,
    ),
)
TIME = Stage(  # of all rows together, behind the list: it reads the `final` of each, under the row's name
    name="time",
    reads=(),
    makes=("speed",),
    options=lambda view: {},
    says=lambda view: "measure how fast they decode, in turn",
    run=verbs.run_time,
    cost=lambda finals, machine: measuring.timing(finals, machine.rates),
)


def _steps(options: Any) -> str:
    return f"{options.steps:,} steps of {options.batch_size} examples"
