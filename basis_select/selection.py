"""Which bases stay: a target, the shapes of groups and the scores of their bases in, what each group becomes out."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .data.tasks import Task
from .layers.group import Group, groups, only, table_of
from .layers.shape import Shape
from .linalg.budget import allocate, by_mass, by_mass_within, linear_prices, table_rank, training_prices, uniform
from .linalg.scores import SCORES, ScoreName
from .sizes import sizes
from .target import Dtype, Target, target
from .times import prices
from .training.loss import response_nll
from .trim import trimmed_away

Budget = Literal["global", "uniform", "mass"]
Chosen = list[tuple[Group, torch.Tensor | None]]  # of every group the indices of the bases that stay, or None: dense


@dataclass(frozen=True)
class Rule:
    """By what bases are compared and how a size is shared, as `prune` describes it.

    reserve: bases that each layer gets later. derivatives: for each group, of scores that need them.
    """

    budget: Budget = "global"
    score: ScoreName = "energy"
    multiple_of: int = 16
    reserve: int = 0
    seed: int = 0
    derivatives: Sequence | None = None

    def __post_init__(self):
        for name, value, known in (("budget", self.budget, get_args(Budget)), ("score", self.score, SCORES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known are {', '.join(known)}")


def select(
    model: torch.nn.Module,
    asked: Target,
    rule: Rule | None = None,
    task: Task | None = None,
    dtype: Dtype = "bfloat16",
    costs: str | None = None,
    keep_embedding: float | None = None,
) -> Chosen:
    """What every group of a decomposed `model` becomes, the token embedding last where it is written as bases.

    task, dtype, costs, keep_embedding: as in `prune`. Raises ValueError where the target cannot be met.

        chosen = select(model, target(size="4x"), Rule(budget="uniform"))
    """
    rule, found, table, rank = rule or Rule(), weighted_groups(model), table_of(model), None
    if keep_embedding is not None and table is None:
        raise ValueError("keep_embedding is for an embedding written as bases: decompose(embedding=True)")
    if keep_embedding is not None:
        rank = table_rank(keep_embedding, table.shape, rule.multiple_of)
    elif table is not None:
        if asked.name != "size" or task is None:
            raise ValueError(
                "an embedding written as bases needs keep_embedding, or a size of the whole model and a task: "
                "its part of the size is then found on the validation split"
            )
        rank = best_share(model, task, asked, rule, dtype)
    if asked.name == "latency":
        chosen = _in_time(found, asked, rule, costs, [(table, rank)] if table else [])
    elif asked.name == "mass":
        chosen = of_groups(found, asked, rule)
    elif asked.name == "max_drop":
        share = smallest(model, task, asked, rule)
        chosen = of_groups(found, target(keep=share), rule, share)
    else:
        share = _share(model, asked, dtype)
        chosen = of_groups(found, asked, rule, share(_saved(table, rank) if table else 0))
    if table is not None:
        chosen.append((table, table.best(rank) if _saved(table, rank) else None))
    return chosen


def of_groups(found: list[Group], asked: Target, rule: Rule, share: float | None = None) -> Chosen:
    """`select` for groups of weighted bases. share: the fraction of their dense parameters that stays, but of a mass.

    Of the nested sets that the cuts of `learn` left, the smallest that leaves enough is what is chosen from.
    """
    room = None if share is None else _room(found, share, rule)
    kept, done = _survivors(found, room, rule.multiple_of)
    if not done:
        kept = _choose(found, kept, asked, rule, room)
    return [(g, _below_break_even(g, index)) for g, index in zip(found, kept, strict=True)]


def cut(model: torch.nn.Module, asked: Target, rule: Rule, left: int) -> Chosen:
    """The first of `left` cuts that lead to what is asked, a keep or a mass, while weights are learned.

    Each cut leaves the same fraction of what is there. Break-even decides what is deployed, not what trains: until the
    last of them a layer may have any rank, and with a mass in the last too.
    """
    found = weighted_groups(model)
    alive, room, trains = [torch.arange(g.rank) for g in found], None, left > 1 or asked.name == "mass"
    if asked.name == "keep":
        room = _room(found, asked.amount, rule)
        if trains:
            now = sum(g.rank * g.shape.basis_cost for g in found)
            room = int(now * (max(room, 0) / now) ** (1 / left))
    kept = _choose(found, alive, asked, rule, room, trains)
    return [(g, i if trains else _below_break_even(g, i)) for g, i in zip(found, kept, strict=True)]


def rank_below(shape: Shape, share: float) -> int:
    """The most bases that have fewer parameters than this share of the dense layers, however good each is."""
    return min(shape.full_rank, math.ceil(share * shape.dense_cost / shape.basis_cost) - 1)


def even_ranks(shapes: Sequence[Shape], room: float, multiple_of: int) -> list[int | None]:
    """Ranks that are the same fraction of every layer: what can be said of them before there are weights."""
    bases = [shape.full_rank for shape in shapes]
    may_become = [linear_prices(shape, n, multiple_of) for shape, n in zip(shapes, bases, strict=True)]
    return uniform(shapes, bases, may_become, room)


def weighted_groups(model: torch.nn.Module) -> list[Group]:
    found = groups(model)
    if not found or not all(group.weighted for group in found):
        raise ValueError("there are no weighted bases to prune: call decompose first")
    return found


def _share(model: torch.nn.Module, asked: Target, dtype: Dtype) -> Callable[[int], float]:
    """The fraction of the parameters of the groups of bases that a target leaves, by what the embedding saves.

    A keep is of these alone. Of a size, targeted layers that `decompose` left dense, such as those that a task for text
    never reaches in a model for images, have all their parameters.
    """
    if asked.name == "keep":
        return lambda saved: asked.amount
    now, away = sizes(model), trimmed_away(model)
    whole = sum(group.shape.dense_cost for group in weighted_groups(model))
    fixed = now["targeted_dense"] - whole

    def share(saved: int) -> float:
        of_all = asked.share(now["parameters_dense"], now["targeted_dense"], dtype, saved + away)
        left = of_all - (1 - of_all) * fixed / whole
        if left <= 0:
            raise ValueError(f"{asked} leaves nothing for the bases: layers left dense have {fixed:,} weights")
        return left

    return share


def _room(found: list[Group], share: float, rule: Rule) -> int:
    """The parameters that all bases to choose may have."""
    later = sum((rule.reserve + group.new_rank) * group.shape.basis_cost for group in found)
    return int(share * sum(group.shape.dense_cost for group in found)) - later


def _below_break_even(group: Group, index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None or len(index) > group.shape.largest_rank else index


def _survivors(found: list[Group], room: int | None, multiple_of: int) -> tuple[list[torch.Tensor], bool]:
    """Indices of the bases to choose from, per group, and whether they are the choice already.

    Of the nested sets that the prunings of `learn` left, the smallest that fills the `room`, or the one that
    meets it as closely as one step of one layer allows. Without learning it is all bases.
    """
    rounds = max(int(group.leader.s.survived.max()) for group in found)
    step = multiple_of * max(group.shape.basis_cost for group in found)
    for least in range(rounds, -1, -1):
        alive = [(group.leader.s.survived >= least).nonzero()[:, 0].cpu() for group in found]
        size = sum(group.shape.deployed(len(index)) for group, index in zip(found, alive, strict=True))
        if room is None or size > room:
            return alive, room is None and rounds > 0
        if least == 0 or room - size < step:
            break
    return alive, True


def _choose(
    found: list[Group],
    alive: list[torch.Tensor],
    asked: Target,
    rule: Rule,
    room: float | None,
    trains: bool = False,
    priced: list | None = None,
) -> list[torch.Tensor | None]:
    """For each group the indices to keep among those `alive`, or None to leave it as it is.

    room: parameters, None for a mass, or with `priced`, what every group's ranks cost, what that counts.
    """
    scores, shapes = _scores(found, alive, rule), [group.shape for group in found]
    orders = [x.argsort(descending=True, stable=True) for x in scores]
    if asked.name == "mass":
        ranks = [by_mass(x, asked.amount) for x in scores]
    elif rule.budget == "mass":
        ranks = by_mass_within(scores, shapes, room, rule.multiple_of, trains)
    else:
        bases = [len(x) for x in scores]
        if priced is None:
            may_become = training_prices if trains else linear_prices
            priced = [may_become(shape, n, rule.multiple_of) for shape, n in zip(shapes, bases, strict=True)]
        if rule.budget == "uniform":
            ranks = uniform(shapes, bases, priced, room)
        else:
            worth = [x[order] for x, order in zip(scores, orders, strict=True)]
            ranks = allocate(worth, priced, room, "seconds" if asked.name == "latency" else "parameters")
    return [
        None if rank is None else index[order[:rank].sort().values]
        for rank, index, order in zip(ranks, alive, orders, strict=True)
    ]


def _scores(found: list[Group], alive: list[torch.Tensor], rule: Rule) -> list[torch.Tensor]:
    """What each of the bases that are `alive` is worth: a list of (bases,), one for each group."""
    generator = torch.Generator().manual_seed(rule.seed)
    scores = []
    for group, index, (g, h) in zip(found, alive, rule.derivatives or [(None, None)] * len(found), strict=True):
        s = group.s.detach().double().cpu()
        g, h = (d if d is None else d.cpu() for d in (g, h))
        scores.append(SCORES[rule.score].of(s, g, h, generator)[index])
    return scores


def _in_time(
    found: list[Group], asked: Target, rule: Rule, costs: str | None, settled: list[tuple[Group, int]]
) -> Chosen:
    """`select` by measured times. settled: `[(table, its rank)]` of an embedding whose part is known."""
    if costs is None:
        raise ValueError("latency needs measured times: name the file of costs that basis-select profile wrote")
    if rule.budget != "global":
        raise ValueError(f"latency is shared over all layers: it goes with budget=global, not {rule.budget}")
    later = rule.reserve + found[0].new_rank
    more = [(table.shape, rank) for table, rank in settled]
    times, room = prices(costs, asked, [group.shape for group in found], later, more)
    kept = _choose(found, [torch.arange(g.rank) for g in found], asked, rule, room, priced=times)
    return [(g, _below_break_even(g, index)) for g, index in zip(found, kept, strict=True)]


@torch.no_grad()
def smallest(model: torch.nn.Module, task: Task | None, asked: Target, rule: Rule) -> float:
    """The smallest share of the parameters of the groups of bases, to about 1 %, at which the validation NLL rises by
    no more nats per token than are asked.

    Found by bisection over nested selections; the other bases are only set aside, so that nothing has to be rebuilt.
    """
    if task is None:
        raise ValueError("max_drop is measured on a validation split: pass a task")
    found, allowed = weighted_groups(model), response_nll(model, task.validation, task.pad_id) + asked.amount
    low, high = 0.0, 1.0
    while high - low > 0.01 * high:
        middle = (low * high) ** 0.5 if low else high / 2
        try:
            chosen = of_groups(found, target(keep=middle), rule, middle)
        except ValueError:  # less than the smallest possible
            low = middle
            continue
        low, high = (low, middle) if _nll_of(model, task, chosen) <= allowed else (middle, high)
    return high


def best_share(model: torch.nn.Module, task: Task, asked: Target, rule: Rule, dtype: Dtype) -> int:
    """The `best_rank` of the embedding at this size of the whole model."""
    found, table, share = weighted_groups(model), table_of(model), _share(model, asked, dtype)
    return best_rank(
        model, task, rule.multiple_of, lambda rank: of_groups(found, asked, rule, share(_saved(table, rank)))
    )


@torch.no_grad()
def best_rank(model: torch.nn.Module, task: Task, multiple_of: int, choose: Callable[[int], Chosen]) -> int:
    """The rank of the embedding with the least validation NLL where `choose(rank)` says what the layers then become.

    What either costs by its own s does not compare: a small error of the table moves tens of thousands of logits at
    once, which no second-order estimate sees. So it is measured, with the other bases set aside, at ranks that differ
    by factors of two and then of the root of two around the best; the table may also stay whole.
    """
    table, step, why = table_of(model), multiple_of, []
    largest = table.rank
    if model.get_input_embeddings().scale != 1:  # it cannot be put back whole: the largest rank that saves anything
        largest = table.shape.largest_rank // step * step

    @functools.cache
    def nll(rank: int) -> float:
        try:
            chosen = choose(rank)
        except ValueError as error:  # too little is left for the layers
            why.append(error)
            return math.inf
        return _nll_of(model, task, [*chosen, (table, table.best(rank))])

    def near(rank: float) -> int:
        rank = max(round(rank / step), 1) * step
        return rank if rank < table.rank and _saved(table, rank) else largest

    ladder = [near(table.rank / 2**i) for i in range(12)]
    best = ladder[0]
    for rank in dict.fromkeys(ladder):
        if nll(rank) > nll(best):
            break
        best = rank
    if math.isinf(nll(best)):
        raise why[-1]
    return min((best, near(best * 2**0.5), near(best / 2**0.5)), key=nll)


def _saved(table: Group, rank: int) -> int:
    """Parameters by which an embedding of that rank is smaller."""
    return table.shape.dense_cost - table.shape.deployed(rank)


def _nll_of(model: torch.nn.Module, task: Task, chosen: Chosen) -> float:
    """Validation NLL with only the bases that are `chosen`."""
    with only(chosen):
        return response_nll(model, task.validation, task.pad_id)
