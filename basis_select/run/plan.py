"""What a recipe will do and cost, from the model's config and the task's token counts alone: no weights are read."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoint.format import dense_on_meta
from ..checkpoint.models import config_and_tokenizer
from ..checkpoint.targets import targets
from ..data.tasks import Task
from ..system.machine import resident_memory
from ..target import BYTES
from ..training.data import require_fit
from . import estimates, measuring
from .estimates import Machine
from .measuring import Estimate
from .recipe import PARENT, RESULT, Recipe
from .room import in_tokens, require_decoder
from .stages import TIME, Stage, key, walk
from .view import View

LIBRARIES = 2**28  # bytes more that libraries and the kernels they generate take in a run than when its plan starts


def rows_of(recipe: Recipe) -> dict[str, Recipe]:
    """All that a run makes smaller models of, by name: the recipe itself first."""
    return {RESULT: recipe, **recipe.family(), **recipe.variants()}


def plan(recipe: Recipe, processes: int = 1, rates: dict | None = None) -> "Plan":
    """The Plan of a recipe for so many processes, a machine like this one each.

    rates: the FLOP/s of that, measured if not given. Raises ValueError, like `run`, for data or sizes that cannot work.
    """
    base = resident_memory() + LIBRARIES
    machine = Machine(rates or measuring.machine_rates(), processes)
    config, tokenizer = config_and_tokenizer(recipe.model)
    require_decoder(config, recipe.model)
    model, task = dense_on_meta(config), in_tokens(recipe, tokenizer)
    require_fit(model, task)
    targets(model)  # raises ValueError if there is nothing to decompose
    forecast, views = Forecast(model, tokenizer, task, machine), {}
    for name, row in {PARENT: recipe, **rows_of(recipe)}.items():
        forecast.row = name
        state = walk(row, forecast, dense=name == PARENT)
        views[name] = forecast.view(row, state, name == PARENT)
    finals = [estimates.final(view) for view in views.values()]
    steps = [*forecast.steps.values(), Step("", TIME.name, TIME.cost(finals, machine))]
    del views[PARENT]
    return Plan(recipe, model, task, views, steps, machine, base)


def text(plan: "Plan") -> str:
    """A plan for a person."""
    first, task = next(iter(plan.rows.values())), plan.task
    total = sum(p.numel() for p in plan.model.parameters())
    lines = [
        f"model    {plan.recipe.model}: {total / 1e6:.1f} M parameters, {first.linears / 1e6:.1f} M of them in "
        f"{len(first.layers)} targeted linear layers",
        f"task     {plan.recipe.task}: {len(task.train)} training, {len(task.validation)} validation, {len(task.test)} "
        f"test examples of {plan.tokens:.0f} tokens on average",
        "",
        *(_size(name, view) for name, view in plan.rows.items()),
        "",
        f"{'stage':34}{'steps':>7}{'tokens':>11}{'TFLOP':>11}{'about':>11}{'memory':>11}",
        *(_line(step, plan.base) for step in plan.steps),
        "",
        _sum(plan),
    ]
    return "\n".join(lines)


def _size(name: str, view: View) -> str:
    after, dtype = view.keep * view.targeted, view.recipe.dtype
    return (
        f"{name}: {after / 1e6:.2f} M targeted {'and embedding ' if view.targeted > view.linears else ''}parameters "
        f"({view.targeted / after:.2f}x fewer), "
        f"{view.published / 1e6:.2f} M in all, {view.published * BYTES[dtype] / 1e6:.0f} MB in {dtype}"
    )


def _line(step: "Step", base: float) -> str:
    c, name = step.cost, step.name.replace("_", " ")
    memory = f"{(base + c.memory) / 2**30:.1f} GiB" if c.memory else ""
    return (
        f"{step.row[:20]:22}{name:12}{c.steps or '':>7}{c.tokens or '':>11}{c.flops / 1e12:>11.1f}"
        f"{c.seconds:>9.0f} s{memory:>11}"
    )


def _sum(plan: "Plan") -> str:
    processes = plan.machine.processes
    where = "here" if processes == 1 else f"on {processes} machines like this one"
    return (
        f"about {plan.seconds / 60:.0f} minutes {where} "
        f"({plan.machine.rates['train'] / 1e9:.0f} GFLOP/s in training matmuls), "
        f"{plan.memory / 2**30:.1f} GiB of memory{'' if processes == 1 else ' a process'}, "
        f"{plan.disk / 1e9:.1f} GB of disk for stages"
    )


@dataclass(frozen=True)
class Step:
    """A stage of one row, the first of those that share it, and what it costs. TIME is of no row."""

    row: str
    name: str
    cost: Estimate


@dataclass(frozen=True)
class Plan:
    """What a recipe will do and cost: `model` on the meta device, `rows` (`{name: View}`) and `steps`.

    base: bytes that a process takes before any stage; machine: its rates were measured here unless they were given.
    """

    recipe: Recipe
    model: torch.nn.Module
    task: Task
    rows: dict
    steps: list
    machine: Machine
    base: int

    @property
    def tokens(self) -> float:
        """Of a training example, on average."""
        return sum(len(e.input_ids) for e in self.task.train) / len(self.task.train)

    @property
    def flops(self) -> float:
        return sum(step.cost.flops for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.cost.seconds for step in self.steps)

    @property
    def memory(self) -> float:
        """Bytes that a process takes at the worst moment."""
        return self.base + max(step.cost.memory for step in self.steps)

    @property
    def disk(self) -> float:
        """Bytes of all stages."""
        rows = self.rows.values()
        return 4 * next(iter(rows)).total + sum(4 * v.total + 8 * v.linears + 12 * v.published for v in rows)


class Forecast:
    """Leads rows through the list of stages without doing anything: a product is the key that it would have.

    Without a `machine` nothing is estimated either. `steps`: a Step by key, once where rows share a stage.
    """

    def __init__(
        self,
        model: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase | None,
        task: Task,
        machine: Machine | None = None,
    ):
        self.start, self.machine, self.row = (tokenizer, task, model), machine, ""
        self.steps, self.behind, self.views = {}, {}, {}

    def view(self, row: Recipe, state: dict, dense: bool = False) -> View:
        at = id(row), state.get("parent"), state.get("tokenizer"), dense
        if at not in self.views:
            tokenizer, task, _ = self.behind.get(state.get("tokenizer"), self.start)
            *_, parent = self.behind.get(state.get("parent"), self.start)
            self.views[at] = View(row, {"model": row.model}, tokenizer, task, parent, dense)
        return self.views[at]

    def do(self, stage: Stage, view: View, options: dict, read: dict) -> str:
        made = key(stage, options, list(read.values()), None)
        if made not in self.steps:
            cost = stage.cost(view, self.machine) if self.machine else None
            self.steps[made] = Step(self.row, stage.name, cost)
            self.behind[made] = view.tokenizer, view.task, view.parent  # which `cost` may have replaced
        return made
