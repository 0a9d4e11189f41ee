"""Which bases stay: scores and a budget in, ranks out. Maths on plain tensors and ints."""

import itertools
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import torch

from ..layers.shape import Shape

T = TypeVar("T")


def table_rank(keep: float, shape: Shape, multiple_of: int = 16) -> int:
    """The rank of an embedding of which the fraction `keep` of the parameters may stay."""
    rank = int(keep * shape.dense_cost / shape.basis_cost) // multiple_of * multiple_of
    if not 0 < rank <= shape.inputs:
        raise ValueError(f"keep_embedding={keep} makes a rank of {rank}, not one from {multiple_of} to {shape.inputs}")
    return rank


def by_mass(s: torch.Tensor, keep: float) -> int:
    """Basel's rule: how many of the largest |s| sum to at least the share `keep` of the total. s: (r,)"""
    mass = s.abs().double().sort(descending=True).values.cumsum(0)
    return min(int(torch.searchsorted(mass, keep * mass[-1] * (1 - 1e-12)).item()) + 1, len(s))


def by_mass_within(
    scores: list[torch.Tensor], shapes: list[Shape], room: int, multiple_of: int, trains: bool
) -> list[int]:
    """Basel's rule with the largest share whose ranks, rounded up to `multiple_of`, fit into `room` parameters.

    trains: whether a rank at or past break-even counts as it is, not as the dense layer that it would be deployed as.
    """

    def kept(share: float) -> list[int]:
        return [min(len(x), -(-by_mass(x, share) // multiple_of) * multiple_of) for x in scores]

    def fits(ranks: list[int]) -> bool:
        sized = zip(shapes, ranks, strict=True)
        return sum(s.basis_cost * rank if trains else s.deployed(rank) for s, rank in sized) <= room

    low, high = 0.0, 1.0
    if fits(kept(high)):
        return kept(high)
    if not fits(kept(low)):
        raise ValueError(f"{multiple_of} bases in every layer are more than the {room:,} parameters that are allowed")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(kept(middle)) else (low, middle)
    return kept(low)


Choices = list[tuple[int | None, float]]  # what a group may become: (rank, or None for dense, price), ranks ascending


def linear_prices(shape: Shape, bases: int, multiple_of: int = 16) -> Choices:
    """What a group of which `bases` are left may become once deployed: multiples below break-even, or dense.

    One that stays smaller factored even with all its `bases` may also keep every one.
    """
    largest = min(bases, shape.largest_rank)
    ranks = list(range(multiple_of, largest + 1, multiple_of))
    if largest == bases and (not ranks or ranks[-1] < largest):
        ranks.append(largest)  # nothing to round
    return [*((rank, rank * shape.basis_cost) for rank in ranks), (None, shape.dense_cost)]


def training_prices(shape: Shape, bases: int, multiple_of: int = 16) -> Choices:
    """What such a group may become while its weights are learned, when none is dense: multiples, or all its `bases`."""
    return [(rank, rank * shape.basis_cost) for rank in [*range(multiple_of, bases, multiple_of), bases]]


def uniform(
    shapes: list[Shape], bases: list[int], prices: list[Choices], budget: float, unit: str = "parameters"
) -> list[int | None]:
    """Ranks that are the same fraction of every layer, to within one of its steps, and use at most `budget`.

    bases: how many each group has. prices, what is returned and what is raised as in `allocate`. The layer whose next
    step leads to the smallest fraction takes it, the first of equals first, until that step does not fit; a dense layer
    is the fraction 1, so layers are dense only where all others are past their last rank below break-even, or where
    there is no such rank.
    """
    ranks, steps = [], []  # (fraction, layer, rank or None it leads to, what it adds to the price)
    for g, (shape, most, choices) in enumerate(zip(shapes, bases, prices, strict=True)):
        share = shape.basis_cost / shape.dense_cost
        (cheapest, spent), *others = _undominated(choices, most)
        ranks.append(cheapest)
        budget -= spent
        for rank, price in others:
            steps.append((1.0 if rank is None else rank * share, g, rank, price - spent))
            spent = price
    _require(budget, prices, unit)
    for _, g, rank, price in sorted(steps, key=lambda step: step[:2]):
        if price > budget:
            break
        ranks[g], budget = rank, budget - price
    return ranks


def allocate(
    scores: list[torch.Tensor], prices: list[Choices], budget: float, unit: str = "parameters"
) -> list[int | None]:
    """Ranks that take the best score per price over all layers until `budget` is used.

    scores: list of (r_g,), each descending: what keeping the g-th layer's next basis is worth. prices: for each layer
    `[(rank, price), ...]` of what may be chosen, ranks ascending, then `(None, price)` of leaving it dense; parameters,
    or measured times, which need not grow with the rank. Returns one of its ranks, or None, per layer. A rank is never
    chosen where a larger one, or the dense layer, costs no more. The total is never above `budget`, and nothing that
    still fits is left out. Raises ValueError, naming the smallest possible budget in `unit`, when even the cheapest
    choice of every layer is too much.
    """
    climbs = []
    for score, choices in zip(scores, prices, strict=True):
        value = torch.cat([torch.zeros(1, dtype=torch.float64), score.double().cpu().cumsum(0)]).tolist()
        left = _undominated(choices, len(score))
        climbs.append([(rank, price, value[-1 if rank is None else rank]) for rank, price in left])
    return best_for(climbs, budget, unit)


def best_for(climbs: Sequence[Sequence[tuple[T, float, float]]], budget: float, unit: str) -> list[T]:
    """Of each of the `climbs`, `[(choice, price, value), ...]` with ascending prices, one choice: together those of
    most value per price, for at most `budget`.

    Nothing that still fits is left out. Raises ValueError, naming the smallest possible budget in `unit`, when even the
    cheapest choices are too much.

    >>> best_for([[("a", 1, 1.0), ("b", 3, 6.0)], [("c", 1, 1.0), ("d", 2, 2.0)]], 4, "bytes")
    ['b', 'c']
    """
    chosen, offers = [], []  # (-value per price, climb, position, what it leads to, what it adds to the price)
    for g, climb in enumerate(climbs):
        chosen.append(climb[0][0])
        budget -= climb[0][1]
        steps = itertools.pairwise(climb)
        for i, (((_, before, _), (choice, price, _)), density) in enumerate(
            zip(steps, _descending([point[1:] for point in climb]), strict=True)
        ):
            offers.append((-density, g, i, choice, price - before))
    if budget < 0:
        _refuse(budget, sum(climb[0][1] for climb in climbs), unit)
    full = set()
    for _, g, _, choice, price in sorted(offers, key=lambda offer: offer[:3]):
        if g in full:
            continue
        if price <= budget:
            chosen[g], budget = choice, budget - price
        else:
            full.add(g)  # the next ones need this one first
    return chosen


def rising(points: Sequence[tuple[T, float, float]]) -> list[tuple[T, float, float]]:
    """Those of `[(choice, price, value), ...]` that are worth more than all that cost no more, by ascending prices."""
    kept = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not kept or point[2] > kept[-1][2]:
            kept.append(point)
    return kept


def _require(left: float, prices: Sequence[Choices], unit: str) -> None:
    """Raise ValueError where the cheapest choice of every layer leaves less than nothing of the budget."""
    if left < 0:
        _refuse(left, sum(min(price for _, price in choices) for choices in prices), unit)


def _refuse(left: float, least: float, unit: str) -> NoReturn:
    raise ValueError(f"the smallest possible is {least:,} {unit}, the budget allows {int(left + least):,}")


def _undominated(choices: Choices, bases: int) -> Choices:
    """Those of at most `bases`, without any that a larger rank or the dense layer costs no more than: prices ascend."""
    kept = []
    for rank, price in choices:
        if rank is not None and rank > bases:
            continue
        while kept and kept[-1][1] >= price:
            kept.pop()
        if rank is not None or not kept or kept[-1][0] != bases:  # dense is worth no more than all bases
            kept.append((rank, price))
    return kept


def _descending(points: list[tuple[float, float]]) -> list[float]:
    """Value per price of each step between `[(price, value), ...]`, steps pooled where a later one is worth more.

    A layer's steps are only ever taken in order, so a good one lends its worth to those before it: what is returned
    are the slopes of the points' upper concave hull.
    """
    pools = []  # [value, price, steps]
    for (before, low), (price, high) in itertools.pairwise(points):
        pools.append([high - low, price - before, 1])
        while len(pools) > 1 and pools[-1][0] * pools[-2][1] > pools[-2][0] * pools[-1][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    return [value / price for value, price, steps in pools for _ in range(steps)]
