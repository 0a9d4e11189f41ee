"""What every stage of a recipe costs, from the model's config and the token counts of its task alone."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..data.tasks import Task
from ..heal import add_adapters
from ..layers.embedding import module_name
from ..layers.group import Group
from ..layers.shape import Shape
from ..learn import weights
from ..linalg.metrics import METRICS, Metric
from ..statistics.derivatives import PROBES
from ..statistics.moments import EXAMPLES_TOGETHER, moment_bytes, moment_room, passes
from ..system import processes
from ..training.cost import Cost, moments_step, training_step
from ..training.data import Batches, rows_at_once
from ..tune import trainable
from . import measuring, room
from .measuring import Estimate
from .view import View


@dataclass(frozen=True)
class Machine:
    """What computes: its FLOP/s, `{"train", "float64"}`, and how many processes share the work, a machine each."""

    rates: dict
    processes: int = 1
    known: dict = field(default_factory=dict)  # training stages that rows have in common, by what they depend on

    def once(self, key: str, make: Callable[[], Estimate]) -> Estimate:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


def loading(view: View, machine: Machine) -> Estimate:
    return Estimate()


def tuning(view: View, machine: Machine) -> Estimate:
    found = _training(view, machine, "tune", view.recipe.seed, trainable, sharded=True)
    best = 4 * view.linears if view.recipe.tune.patience else 0
    return dataclasses.replace(found, memory=found.memory + best)


def trimming(view: View, machine: Machine) -> Estimate:
    """Next to nothing; but what is planned after it has fewer tokens."""
    parent = copy.deepcopy(view.parent)
    view.parent, view.tokenizer, view.task, _ = room.trimmed(view.recipe, parent, view.tokenizer, view.task)
    return Estimate()


def decomposing(view: View, machine: Machine) -> Estimate:
    r, task, total = view.recipe, view.task, view.total
    shapes = [group.shape for group in view.groups]
    uses = METRICS[r.decompose.metric]
    size = min(EXAMPLES_TOGETHER, r.decompose.examples)
    steps = -(-min(r.decompose.examples, len(task.train)) // size)
    shape, share, tokens = _batch_shapes(task, size, steps, 0)
    collected = _moments(uses, shapes, total) if uses.inputs or uses.outputs else []
    # Half of a Gram matrix is computed: one multiplication and one addition for every entry.
    moments, passing = steps * tokens * sum(collected) / 4, 0
    if collected:
        step = moments_step(view.parent.config, shape)
        moments += len(collected) * steps * _average(step, share)
        passing = step.passing
    svd = sum(_svd(shape, uses) for shape in shapes)
    widest = max(shapes, key=lambda shape: shape.dense_cost)
    work = 8 * (4 * widest.dense_cost + 4 * widest.full_rank**2 + bool(uses.outputs) * widest.output_moment)
    factors = 4 * sum(shape.full_cost for shape in shapes)
    # Weights read from a file stay mapped until the last of them is replaced. What activations leave free in the heap
    # stays with the process and takes up factors, but not float64 work, whose blocks are mapped anew.
    memory = 4 * total + max(collected, default=0) + max(passing, factors) + work
    if len(collected) > 1:
        memory += passing  # beside the factors of earlier passes
    seconds = moments / machine.rates["train"] + svd / machine.rates["float64"]
    return Estimate(None, len(collected) * steps * tokens or None, moments + svd, seconds, memory)


def labelling(view: View, machine: Machine, examples: list) -> Estimate:
    """One pass of the parent over the training examples of these indices."""
    rows, head = [view.task.train[i] for i in examples], view.parent.get_output_embeddings()
    tokens, responses = sum(len(e.input_ids) for e in rows), sum(len(e.input_ids) - e.start for e in rows)
    body = sum(m.weight.numel() for m in view.layers.values() if m is not head)
    flops = 2 * tokens * body + 2 * responses * head.weight.numel()
    return Estimate(None, tokens, flops, flops / machine.rates["train"])


def learning(view: View, machine: Machine) -> Estimate:
    r, groups = view.recipe, view.groups
    bases = view.bases({n: g.shape.full_rank for g in groups for n in g.names}, weighted=1, new=r.learn.new)
    trains = functools.partial(weights, rest=r.learn.rest)
    found = _training(view, machine, "learn", r.seed, trains, sharded=False, bases=bases)
    if not r.learn.rounds or view.keep == 1:
        return found
    cut = [g for g in groups if not room.is_table(g)]  # what is alive shrinks from cut to cut
    less = 4 * _tokens_read(r.learn, view.task, r.seed, view.parent, cut) * _set_aside(r.learn, view.keep, cut)
    return dataclasses.replace(found, flops=found.flops - less, seconds=found.seconds * (1 - less / found.flops))


def differentiating(view: View, machine: Machine) -> Estimate:
    """Two gradients of the full set of bases for every probe, in fp32."""
    tokens = PROBES * _batch_shapes(view.task, 8, PROBES, view.recipe.seed)[2]
    flops = 2 * tokens * 4 * sum(g.shape.full_cost for g in view.groups)
    return Estimate(PROBES, tokens, flops, 2 * flops / machine.rates["train"])


def pruning(view: View, machine: Machine) -> Estimate:
    bases = sum(g.shape.full_cost for g in view.groups) + view.total - view.targeted
    tries = measuring.validations(view.recipe, min(view.parent.get_input_embeddings().weight.shape))
    return measuring.pruning(tries, view.task, bases, final(view), machine.rates)


def extending(view: View, machine: Machine) -> Estimate:
    """A gradient of the whole products for every example, or eigenvectors of what they lost; random ones are free."""
    options = view.recipe.extend
    if options.init == "residual":
        flops = sum(_lost(g.shape) for g in view.groups if not room.is_table(g))
        return Estimate(flops=flops, seconds=flops / machine.rates["float64"])
    if options.init == "random":
        return Estimate()
    steps = -(-options.examples // 8)
    tokens = steps * _batch_shapes(view.task, 8, steps, view.recipe.seed)[2]
    flops = tokens * (4 * view.keep + 2) * view.targeted
    return Estimate(None, tokens, flops, flops / machine.rates["train"])


def refining(view: View, machine: Machine) -> Estimate:
    options = view.recipe.refine
    tokens = options.steps * _batch_shapes(view.task, options.batch_size, options.steps, view.recipe.seed)[2]
    flops = (2 + 8 * view.keep) * view.targeted * tokens
    return Estimate(options.steps, tokens, flops, flops / machine.rates["train"])


def healing(view: View, machine: Machine) -> Estimate:
    r = view.recipe
    cut = view.bases(room.ranks_for(r, view.groups, view.keep), cut=True) if view.keep < 1 else {}
    trains = functools.partial(trainable, embeddings=r.heal.embeddings)
    if r.heal.lora:
        trains = functools.partial(add_adapters, rank=r.heal.lora)
    rounded, sharded = r.prune.bits != 16, not r.heal.lora
    found = _training(view, machine, "heal", r.seed + 1, trains, sharded=sharded, bases=cut, rounded=rounded)
    if rounded and sharded and machine.processes > 1:  # beside what is spread, each has the rounded model
        found = dataclasses.replace(found, memory=found.memory + room.bytes_of(r, view.parent, view.published))
    return found


def saving(view: View, machine: Machine) -> Estimate:
    return measuring.saving(final(view))


def evaluating(view: View, machine: Machine) -> Estimate:
    return measuring.evaluating(view.task, final(view), machine.rates)


def final(view: View) -> measuring.Final:
    """What is published of a row."""
    head, table = view.parent.get_output_embeddings().weight, view.parent.get_input_embeddings().weight
    tied = head is table and (view.dense or not room.shared_table(view.recipe, view.parent))
    reads = view.targeted if view.dense else view.keep * view.targeted
    return measuring.Final(view.published, reads, head.numel() if tied else 0, len(table), view.recipe.dtype)


def _moments(uses: Metric, shapes: Sequence[Shape], total: int) -> list[int]:
    """Bytes of the second moments that each pass of `decompose` over its examples collects: one number for a pass."""
    sizes = [moment_bytes(shape, uses) for shape in shapes]
    coming = 4 * (total + sum(shape.full_cost for shape in shapes))  # the model and its factors
    parts = passes(range(len(shapes)), sizes, moment_room(processes.device(), coming))
    return [sum(sizes[i] for i in part) for part in parts]


def _svd(shape: Shape, uses: Metric) -> int:
    """FLOPs of a decomposition: the metric, half of a Gram matrix of the smaller side, its eigenvectors, a product."""
    r = shape.full_rank
    return 2 * bool(uses.outputs) * shape.output_moment * r + 4 * shape.dense_cost * r + 10 * r**3


def _lost(shape: Shape) -> int:
    """FLOPs of the eigenvectors of what a group has lost."""
    return 2 * shape.inputs * shape.dense_cost + 10 * shape.inputs**3


def _tokens_read(options: Any, task: Task, seed: int, model: nn.Module, groups: Sequence[Group]) -> float:
    """Tokens of a step that the average parameter of these bases sees: the output head sees responses only."""
    (_, _, most), share, tokens = _batch_shapes(task, options.batch_size, options.steps, seed)
    head = module_name(model, model.get_output_embeddings())
    read = sum(g.shape.full_cost * (most * share[1] if head in g.names else tokens) for g in groups)
    return read / sum(g.shape.full_cost for g in groups)


def _set_aside(options: Any, keep: float, groups: Sequence[Group]) -> float:
    """Parameters that `learn` has set aside, summed over its steps."""
    whole, targeted = sum(g.shape.full_cost for g in groups), sum(g.shape.dense_cost for g in groups)
    first, total = int(options.unpruned * options.steps), 0
    for step in range(first, options.steps):
        cuts = (step - first) * options.rounds // (options.steps - first) + 1
        total += whole - min(whole, whole * (keep * targeted / whole) ** (cuts / options.rounds))
    return total


def _training(
    view: View,
    machine: Machine,
    name: str,
    seed: int,
    trains: Callable,
    sharded: bool,
    bases: dict | None = None,
    rounded: bool = False,
) -> Estimate:
    """The Estimate of a verb that trains, on processes of which each takes its part of every batch."""
    r, options = view.recipe, getattr(view.recipe, name)
    taught = {"teacher": r.teacher, "soft_labels": r.soft_labels}

    def make() -> Estimate:
        step = functools.partial(
            training_step, view.parent.config, trains=trains, bases=bases, rounded=rounded, **taught
        )
        return _steps(options, view.task, seed, step, machine, sharded)

    return machine.once(repr((name, options, taught, bases, rounded, view.total)), make)


def _steps(options: Any, task: Task, seed: int, step_at: Callable, machine: Machine, sharded: bool) -> Estimate:
    count = machine.processes
    shape, share, tokens = _batch_shapes(task, options.batch_size, options.steps, seed, count)
    how = {"precision": options.precision, "checkpointing": options.checkpointing}
    how["taught"] = getattr(options, "kl", 0) > 0
    step = _in_parts(step_at, shape, **how)
    flops = options.steps * count * _average(step, share)
    parts = count if sharded else 1
    memory = _memory(step, parts, step.held)
    later = _batch_shapes(task, options.batch_size, options.steps, seed, count, first=1)[0]
    if later != shape:  # the largest batch comes first, before there are optimizer states
        after = _in_parts(step_at, later, **how)
        memory = max(_memory(step, parts, step.held - step.states), _memory(after, parts, after.held))
    return Estimate(options.steps, options.steps * tokens, flops, flops / machine.rates["train"] / count, memory)


def _in_parts(step_at: Callable, shape: tuple[int, int, int], **how: Any) -> Cost:
    """The Cost of a step on a batch of `shape`, in the parts in which it passes here."""
    rows, length, responses = shape
    size = rows_at_once(rows, length, processes.device().type)
    step, parts = step_at((size, length, -(-responses * size // rows)), **how), rows / size
    passing = step.passing + step.gradients * (parts > 1)  # those of the parts before it
    flops = {key: round(getattr(step, key) * parts) for key in ("flops", "head_flops")}
    return dataclasses.replace(step, passing=passing, **flops)


def _memory(step: Cost, parts: int, held: int) -> float:
    """Bytes of a step for one of `parts` processes: weights, states and gradients shared, but the layers at work."""
    if parts == 1:
        return held + step.passing
    return held / parts + step.passing + step.gradients * (1 / parts - 1) + 2 * step.block


def _batch_shapes(
    task: Task, batch_size: int, steps: int, seed: int, processes: int = 1, first: int = 0
) -> tuple[tuple[int, int, int], tuple[float, float], int]:
    """Of a stage's batches, from the `first` on if there are more: the largest (rows, length, responses), what share
    of its tokens and of its responses the average has, and the average's tokens, padding counted.

    The shape is what one of `processes` sees, the tokens are those of all.
    """
    steps = min(steps, 64)
    batches = list(Batches(task.train, batch_size, steps, seed))
    batches = batches[first:] or batches
    tokens = [b["input_ids"].numel() for b in batches]
    responses = [len(b["targets"]) for b in batches]
    length = max(b["input_ids"].shape[1] for b in batches)
    rows = -(-batch_size // processes)
    share = (sum(tokens) / len(batches) / (batch_size * length), sum(responses) / len(batches) / max(responses))
    return (rows, length, -(-max(responses) // processes)), share, round(sum(tokens) / len(batches))


def _average(step: Cost, share: tuple[float, float]) -> float:
    """FLOPs of an average step from those of the largest."""
    return step.flops * share[0] + step.head_flops * share[1]
