"""Remove the bases that matter least until the budget is met."""

import functools
import math
from typing import Annotated, get_args

import torch
from pydantic import Field
from transformers import PreTrainedModel

from .derivatives import derivatives as differentiate
from .evaluation.profile import prices
from .layers.group import groups, only, table_of
from .linalg.budget import (
    Budget,
    Dtype,
    allocate,
    by_mass,
    keep_for,
    linear_prices,
    table_rank,
    training_prices,
    uniform,
)
from .linalg.scores import SCORES, ScoreName
from .options import Count, Fraction, Positive, checked
from .sizes import sizes
from .tasks import Task
from .training.loss import response_nll


@checked
def prune(
    model: PreTrainedModel,
    task: Task | None = None,
    derivatives: list | None = None,
    reserve: int = 0,
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    *,
    keep: Annotated[
        Fraction | None, Field(description="Fraction of the targeted layers' parameters that stays.")
    ] = None,
    size: Annotated[
        str | None,
        Field(
            description="Size of the whole model: 4x smaller, 90M parameters or 120MB.", examples=["4x", "90M", "120MB"]
        ),
    ] = None,
    max_drop: Annotated[
        Positive | None,
        Field(description="The smallest model whose loss rises by at most so many nats per token, before healing."),
    ] = None,
    mass: Annotated[
        Fraction | None,
        Field(description="Basel's share of each layer's sum of singular values; the size is what comes out."),
    ] = None,
    latency: Annotated[
        str | None,
        Field(
            description="Speed of the whole model, by the times in `costs`: 2x decode, 20ms decode, 1.5x prefill 128. "
            "Layers that are no faster factored stay dense.",
            examples=["2x decode", "20ms decode", "1.5x prefill 128"],
        ),
    ] = None,
    costs: Annotated[
        str | None, Field(description="The file of times that `basis-select profile` measured on the device.")
    ] = None,
    budget: Annotated[
        Budget,
        Field(
            description="How layers share the size: global keeps the highest scores per parameter, uniform the same "
            "fraction of every layer, mass (Basel) the same share of every layer's sum of scores."
        ),
    ] = "global",
    score: Annotated[
        ScoreName,
        Field(
            description="Which bases stay: energy (error in the metric), magnitude (Basel), taylor (gradient and "
            "curvature of the loss, after BSI), random."
        ),
    ] = "energy",
    multiple_of: Annotated[Count, Field(description="Ranks are multiples of this.")] = 16,
    keep_embedding: Annotated[
        Fraction | None,
        Field(
            description="Fraction of the embedding's parameters that stays, where it was written as bases; without it, "
            "its part of `size` is found on the validation split."
        ),
    ] = None,
) -> PreTrainedModel:
    """Keep the best bases, fold their weights into the factors, in place; returns the model.

    How much stays is said in one of five ways. `keep`: the fraction of the targeted layers' parameters. `size`: of
    the whole model, "4x" fewer parameters, "90M" parameters or "120MB" in `dtype`. Neither is ever exceeded.
    `max_drop`: the smallest model whose response NLL on the validation split of `task` rises by at most so many nats
    per token, before healing and with the embedding cut as `keep_embedding` says. `mass`: Basel's KeepRatio, the
    share of each layer's sum of scores; size is an outcome. `latency`: how fast the whole model should be on the device
    whose times `basis-select profile` wrote to the file `costs`: "2x decode", "20ms decode", "1.5x prefill 128". Bases
    are kept by score per second then, at ranks that were timed, and a layer stays dense where it would be no faster
    factored.

    `score` is one of SCORES; those that need derivatives take `derivatives` or compute them on `task`. `budget` says
    how the size is shared: "global" (highest score per parameter over all layers), "uniform" (the same
    fraction of every layer), or "mass" (Basel: the same share of each layer's sum of scores). Ranks are multiples of
    `multiple_of`, with `mass` given alone they are not rounded; a layer whose rank would reach break-even,
    in*out/(in+out), stays dense. `reserve` bases per layer are left free for `extend`. `keep_embedding` is the fraction
    of the embedding's parameters that may stay, where `decompose` wrote it as bases: not part of the targeted
    layers, but of `size`. Without it, `size` is shared between embedding and layers as `best_share` finds on the
    validation split of `task`. Raises ValueError when the budget cannot be met.

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> model = bs.prune(model, size="1.5x", multiple_of=4)
        >>> sizes = bs.sizes(model)
        >>> sizes["parameters_dense"] / sizes["parameters"] >= 1.5
        True

        What is asked for is checked:

        >>> bs.prune(model, keep=2)
        Traceback (most recent call last):
        ValueError: prune: keep is 2, it should be a fraction above 0 and up to 1, or null
    """
    if sum(target is not None for target in (keep, size, max_drop, mass, latency)) != 1:
        raise ValueError("say how much to keep: exactly one of keep, size, max_drop, mass, latency")
    how = {"budget": budget, "score": score, "multiple_of": multiple_of, "reserve": reserve, "seed": seed}
    if SCORES.get(score) and SCORES[score].derivatives:
        if task is None and derivatives is None:
            raise ValueError(f"score {score!r} looks at the loss: pass a task or its derivatives")
        how["derivatives"] = derivatives or differentiate(model, task, seed)
    table, saved = table_of(model), 0
    if keep_embedding is not None and table is None:
        raise ValueError("keep_embedding is for an embedding written as bases: decompose(embedding=True)")
    if keep_embedding is not None:
        rank, saved = table_rank(keep_embedding, table.shape, multiple_of)
    elif table is not None:
        if size is None or task is None:
            raise ValueError(
                "an embedding written as bases needs keep_embedding, or a size of the whole model and a task: "
                "its part of the size is then found on the validation split"
            )
        rank, saved = best_share(model, task, size, dtype, **how)
    if max_drop is not None:
        keep = smallest(model, task, max_drop, **how)
    elif latency is not None:
        how["latency"] = _times(model, latency, costs, budget, reserve, [(table, rank)] if table else [])
    elif mass is None:
        now = sizes(model)
        keep = keep_for(now["parameters_dense"], now["targeted_dense"], dtype, keep, size, saved)
    chosen = select(model, keep, mass, **how)
    if table is not None:
        chosen.append((table, _best(table, rank) if saved else None))
    for group, index in chosen:
        if index is None:
            group.to_dense(model)
        else:
            group.take(index)
            group.fold(model)
    return model


def _times(model, latency, costs, budget, reserve, settled):
    """What `select` needs to choose by time: prices of every group's ranks, and the seconds they may take."""
    if costs is None:
        raise ValueError("latency is reached by measured times: name the file of costs that basis-select profile wrote")
    if budget != "global":
        raise ValueError(f"latency is shared over all layers: it goes with budget=global, not {budget}")
    found = groups(model)
    later = reserve + (found[0].new_rank if found else 0)
    more = [(table.shape, rank) for table, rank in settled]
    return prices(costs, latency, [group.shape for group in found], later, more)


def select(
    model,
    keep=None,
    mass=None,
    latency=None,
    budget="global",
    score="energy",
    multiple_of=16,
    reserve=0,
    seed=0,
    derivatives=None,
    cuts=0,
):
    """`[(group, index), ...]`: for every group the indices of the bases to keep, or None if it stays as it is.

    latency: prices and budget of measured times, in place of a size. Bases that `learn` removed come back only when
    its later, smaller sets leave room, or where time is the budget. cuts: of how many cuts that lead to `keep` while
    weights are learned this is the first; each leaves the same fraction of what was there. Break-even decides what is
    deployed, not what trains: until the last of them a layer may have any rank, and with `mass` in the last too.
    """
    for name, value in (("keep", keep), ("mass", mass)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}={value} is not a fraction above 0 and up to 1")
    if budget not in get_args(Budget):
        raise ValueError(f"unknown budget {budget!r}; known are {', '.join(get_args(Budget))}")
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; known are {', '.join(SCORES)}")
    found = groups(model)
    if not found or not all(group.weighted for group in found):
        raise ValueError("there are no weighted bases to prune: call decompose first")
    shapes = [group.shape for group in found]
    free = None
    if keep is not None:
        later = sum((reserve + group.new_rank) * group.shape.basis_cost for group in found)
        free = int(keep * sum(shape.dense_cost for shape in shapes)) - later
    trains = cuts > 1 or (cuts == 1 and mass is not None)
    if cuts or latency is not None:
        alive, done = [torch.arange(group.rank) for group in found], False
    else:
        alive, done = _survivors(found, free, multiple_of)
    if trains and free is not None:
        now = sum(group.rank * group.shape.basis_cost for group in found)
        free = int(now * (max(free, 0) / now) ** (1 / cuts))
    kept = alive
    if not done:
        scores = _scores(found, alive, score, derivatives, seed)
        positions = _choose(scores, shapes, free, mass, latency, budget, multiple_of, trains)
        kept = [None if k is None else index[k] for index, k in zip(alive, positions, strict=True)]
    return [
        (group, None if index is None or (len(index) > group.shape.largest_rank and not trains) else index)
        for group, index in zip(found, kept, strict=True)
    ]


def _scores(found, alive, score, derivatives, seed):
    """What each of the bases that are `alive` is worth: a list of (bases,), one for each group."""
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for group, index, (g, h) in zip(found, alive, derivatives or [(None, None)] * len(found), strict=True):
        s = group.s.detach().double().cpu()
        g, h = (d if d is None else d.cpu() for d in (g, h))
        scores.append(SCORES[score].of(s, g, h, generator)[index])
    return scores


def _choose(scores, shapes, free, mass, latency, budget, multiple_of, trains):
    """For each group the positions to keep among its `scores`, or None to leave it as it is."""
    if mass is not None:
        return [by_mass(x, mass) for x in scores]
    if budget == "mass":
        return _by_mass_within(scores, shapes, free, multiple_of, trains)
    orders = [x.argsort(descending=True, stable=True) for x in scores]
    worth, bases = [x[o] for x, o in zip(scores, orders, strict=True)], [len(x) for x in scores]
    if latency is not None:
        ranks = allocate(worth, *latency, unit="seconds")
    else:
        may_become = training_prices if trains else linear_prices
        prices = [may_become(shape, n, multiple_of) for shape, n in zip(shapes, bases, strict=True)]
        ranks = uniform(shapes, bases, prices, free) if budget == "uniform" else allocate(worth, prices, free)
    return [None if r is None else o[:r].sort().values for r, o in zip(ranks, orders, strict=True)]


def _survivors(found, free, multiple_of):
    """Indices of the bases to choose from, per group, and whether they are the choice already.

    Of the nested sets that the prunings of `learn` left, the smallest that fills what is `free`, or the one that
    meets it as closely as one step of one layer allows. Without learning it is all bases.
    """
    rounds = max(int(group.leader.s.survived.max()) for group in found)
    step = multiple_of * max(group.shape.basis_cost for group in found)
    for least in range(rounds, -1, -1):
        alive = [(group.leader.s.survived >= least).nonzero()[:, 0].cpu() for group in found]
        size = sum(group.shape.deployed(len(index)) for group, index in zip(found, alive, strict=True))
        if free is None or size > free:
            return alive, free is None and rounds > 0
        if least == 0 or free - size < step:
            break
    return alive, True


def _by_mass_within(scores, shapes, free, multiple_of, trains):
    """Basel's rule with the largest share whose ranks, rounded up to `multiple_of`, fit into `free` parameters."""

    def kept(share):
        found = []
        for x in scores:
            rank = min(len(x), -(-len(by_mass(x, share)) // multiple_of) * multiple_of)
            found.append(x.argsort(descending=True, stable=True)[:rank].sort().values)
        return found

    def fits(indices):
        ranks = zip(shapes, map(len, indices), strict=True)
        return sum(s.basis_cost * rank if trains else s.deployed(rank) for s, rank in ranks) <= free

    low, high = 0.0, 1.0
    if fits(kept(high)):
        return kept(high)
    if not fits(kept(low)):
        raise ValueError(f"{multiple_of} bases in every layer are more than the {free:,} parameters that are allowed")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(kept(middle)) else (low, middle)
    return kept(low)


@torch.no_grad()
def smallest(model, task, max_drop, **how):
    """The smallest `keep`, to about 1 %, at which the validation NLL rises by at most `max_drop` nats per token.

    Found by bisection over nested selections; the other bases are only set aside, so that nothing has to be rebuilt.
    """
    if task is None:
        raise ValueError("max_drop is measured on a validation split: pass a task")
    if not max_drop >= 0:
        raise ValueError(f"max_drop={max_drop} should be a number of nats, 0 or more")
    allowed = response_nll(model, task.validation, task.pad_id) + max_drop
    low, high = 0.0, 1.0
    while high - low > 0.01 * high:
        middle = (low * high) ** 0.5 if low else high / 2
        try:
            chosen = select(model, middle, **how)
        except ValueError:  # less than the smallest possible
            low = middle
            continue
        drop = _nll_of(model, task, chosen)
        low, high = (low, middle) if drop <= allowed else (middle, high)
    return high


@torch.no_grad()
def best_share(model, task, size, dtype, **how):
    """`(rank, parameters saved)` of the embedding with the least validation NLL at this size of the whole model.

    What either costs by its own s does not compare: a small error of the table moves tens of thousands of logits at
    once, which no second-order estimate sees. So it is measured, with the other bases set aside, at ranks that differ
    by factors of two and then of the root of two around the best; the table may also stay whole.
    """
    table, now, step = table_of(model), sizes(model), how["multiple_of"]
    why, largest = [], table.rank
    if model.get_input_embeddings().scale != 1:  # it cannot be put back whole: the largest rank that saves anything
        largest = table.shape.largest_rank // step * step

    def saved(rank):
        return table.shape.dense_cost - table.shape.deployed(rank)

    @functools.cache
    def nll(rank):
        try:
            keep = keep_for(now["parameters_dense"], now["targeted_dense"], dtype, None, size, saved(rank))
            chosen = select(model, keep, **how)
        except ValueError as error:  # too little is left for the layers
            why.append(error)
            return math.inf
        return _nll_of(model, task, [*chosen, (table, _best(table, rank))])

    def near(rank):
        rank = max(round(rank / step), 1) * step
        return rank if rank < table.rank and saved(rank) else largest

    ladder = [near(table.rank / 2**i) for i in range(12)]
    best = ladder[0]
    for rank in dict.fromkeys(ladder):
        if nll(rank) > nll(best):
            break
        best = rank
    if math.isinf(nll(best)):
        raise why[-1]
    best = min((best, near(best * 2**0.5), near(best / 2**0.5)), key=nll)
    return best, saved(best)


def _best(table, rank):
    return table.s.argsort(descending=True, stable=True)[:rank]


def _nll_of(model, task, chosen):
    """Validation NLL with only the bases that are `chosen`."""
    with only(chosen):
        return response_nll(model, task.validation, task.pad_id)
