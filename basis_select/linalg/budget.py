"""Which bases stay: scores and a budget in, ranks out. Maths on plain tensors and ints."""

import itertools
import re
from typing import Literal

import torch

from ..layers.shape import Shape

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
Budget = Literal["global", "uniform", "mass"]


def table_rank(keep: float, shape: Shape, multiple_of: int = 16) -> tuple[int, int]:
    """The rank of an embedding of which the fraction `keep` may stay, and the parameters that saves."""
    rank = int(keep * shape.dense_cost / shape.basis_cost) // multiple_of * multiple_of
    if not 0 < rank <= shape.inputs:
        raise ValueError(f"keep_embedding={keep} makes a rank of {rank}, not one from {multiple_of} to {shape.inputs}")
    return rank, shape.dense_cost - rank * shape.basis_cost


def keep_for(total, targeted, dtype, keep=None, size=None, saved=0):
    """The fraction of `targeted` parameters that may stay so that a model of `total` meets `keep` or `size`.

    saved: parameters by which the rest of the model shrinks.

    size: "4x" fewer parameters in all, "90M" (K, M, B) parameters in all, or "120MB" (KB, MB, GB; 10^3 steps) of
    weights in `dtype`. Raises ValueError, with the smallest size there is, for one that cannot be met.
    """
    if (keep is None) == (size is None):
        raise ValueError("say how much to keep: exactly one of keep, size, max_drop, mass, latency")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} is not a fraction above 0 and up to 1 of the targeted parameters")
        return keep
    number, unit = parse_size(str(size))
    allowed = total / number if unit == "x" else number / (BYTES[dtype] if unit == "bytes" else 1)
    if allowed > total:
        whole = f"{total / 1e6:.1f} M parameters, {total * BYTES[dtype] / 1e6:.0f} MB in {dtype}"
        raise ValueError(f"size={size} is more than the model has: {whole}")
    rest = total - targeted - saved
    fraction = (allowed - rest) / targeted
    if fraction <= 0:
        raise ValueError(
            f"size={size} leaves nothing for the targeted layers: the rest of the model alone is {rest / 1e6:.1f} M "
            f"parameters, {rest * BYTES[dtype] / 1e6:.0f} MB in {dtype}"
        )
    return min(fraction, 1.0)


def parse_size(size):
    """`(number, "x" or "parameters" or "bytes")` of a size as `keep_for` takes it. Raises ValueError for other text."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(x|[KMB]|[KMG]B)", size)
    if not match or float(match[1]) == 0:
        raise ValueError(f"size={size[:40]!r} should read like 4x, 90M or 120MB")
    number, unit = float(match[1]), match[2]
    if unit == "x":
        if number < 1:
            raise ValueError(f"size={size} asks for more than the whole model: it should be 1x or more")
        return number, "x"
    return number * {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[unit[0]], "bytes" if len(unit) == 2 else "parameters"


def by_mass(s, keep):
    """Basel's rule: indices of the smallest set whose |s| sum to at least `keep` of the total. s: (r,)"""
    size = s.abs().double()
    order = size.argsort(descending=True, stable=True)
    mass = size[order].cumsum(0)
    count = int(torch.searchsorted(mass, keep * mass[-1] * (1 - 1e-12)).item()) + 1
    return order[: min(count, len(s))].sort().values


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
    ranks, offers = [], []  # (-value per price, layer, position, rank it leads to or None, what it adds to the price)
    for g, (score, choices) in enumerate(zip(scores, prices, strict=True)):
        (cheapest, spent), *others = _undominated(choices, len(score))
        ranks.append(cheapest)
        budget -= spent
        value = torch.cat([torch.zeros(1, dtype=torch.float64), score.double().cpu().cumsum(0)]).tolist()
        points = [(price, value[-1 if rank is None else rank]) for rank, price in ((cheapest, spent), *others)]
        for i, ((rank, price), density) in enumerate(zip(others, _descending(points), strict=True)):
            offers.append((-density, g, i, rank, price - points[i][0]))
    _require(budget, prices, unit)
    full = set()
    for _, g, _, rank, price in sorted(offers, key=lambda offer: offer[:3]):
        if g in full:
            continue
        if price <= budget:
            ranks[g], budget = rank, budget - price
        else:
            full.add(g)  # the next ones need this one first
    return ranks


def _require(left, prices, unit):
    """Raise ValueError where the cheapest choice of every layer leaves less than nothing of the budget."""
    if left < 0:
        least = sum(min(price for _, price in choices) for choices in prices)
        raise ValueError(f"the smallest possible is {least:,} {unit}, the budget allows {int(left + least):,}")


def _undominated(choices, bases):
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


def _descending(points):
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
