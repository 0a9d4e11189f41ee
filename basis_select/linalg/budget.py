"""Which bases stay: scores and a budget in, ranks out. Maths on plain tensors and ints."""

import math
import re

import torch

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def table_rank(keep, rows, columns, multiple_of=16):
    """The rank of a (rows, columns) embedding of which the fraction `keep` may stay, and the parameters that saves."""
    rank = int(keep * rows * columns / (rows + columns)) // multiple_of * multiple_of
    if not 0 < rank <= columns:
        raise ValueError(f"keep_embedding={keep} makes a rank of {rank}, not one from {multiple_of} to {columns}")
    return rank, rows * columns - rank * (rows + columns)


def keep_for(total, targeted, dtype, keep=None, size=None, saved=0):
    """The fraction of `targeted` parameters that may stay so that a model of `total` meets `keep` or `size`.

    saved: parameters by which the rest of the model shrinks.

    size: "4x" fewer parameters in all, "90M" (K, M, B) parameters in all, or "120MB" (KB, MB, GB; 10^3 steps) of
    weights in `dtype`. Raises ValueError, with the smallest size there is, for one that cannot be met.
    """
    if (keep is None) == (size is None):
        raise ValueError("say how much to keep: exactly one of keep, size, max_drop, mass")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} is not a fraction above 0 and up to 1 of the targeted parameters")
        return keep
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(x|[KMB]|[KMG]B)", str(size))
    if not match or float(match[1]) == 0:
        raise ValueError(f"size={size!r} should read like 4x, 90M or 120MB")
    number, unit = float(match[1]), match[2]
    if unit == "x":
        allowed = total / number
    else:
        allowed = number * {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[unit[0]] / (BYTES[dtype] if len(unit) == 2 else 1)
    rest = total - targeted - saved
    fraction = (allowed - rest) / targeted
    if fraction <= 0:
        raise ValueError(
            f"size={size} leaves nothing for the targeted layers: the rest of the model alone is {rest / 1e6:.1f} M "
            f"parameters, {rest * BYTES[dtype] / 1e6:.0f} MB in {dtype}"
        )
    return min(fraction, 1.0)


def by_mass(s, keep):
    """Basel's rule: indices of the smallest set whose |s| sum to at least `keep` of the total. s: (r,)"""
    size = s.abs().double()
    order = size.argsort(descending=True, stable=True)
    mass = size[order].cumsum(0)
    count = int(torch.searchsorted(mass, keep * mass[-1] * (1 - 1e-12)).item()) + 1
    return order[: min(count, len(s))].sort().values


def uniform_scores(bases, basis_cost, dense_cost):
    """Scores under which `allocate` keeps the same fraction of every layer: (bases,), descending."""
    fraction = torch.arange(1, bases + 1, dtype=torch.float64) * basis_cost / dense_cost
    return basis_cost * (2.0 - fraction)


def allocate(scores, basis_costs, dense_costs, budget, multiple_of=16):
    """Ranks that take the best score per parameter over all layers until `budget` parameters are used.

    scores: list of (r_g,), each descending: what keeping the g-th layer's next basis is worth. basis_costs: what
    one basis costs; dense_costs: what the dense layer costs. Returns one int per layer, the rank (a multiple of
    `multiple_of`), or None where the layer stays dense because a factored one of that rank would be no smaller.
    The total is never above `budget`, and nothing that still fits is left out. Raises ValueError, naming the
    smallest possible budget, when even one step per layer is too much.
    """
    ranks = [0] * len(scores)
    offers = []  # (value per parameter, layer, position, rank it leads to or None, parameters it adds)
    for g, (score, cost, dense) in enumerate(zip(scores, basis_costs, dense_costs, strict=True)):
        value = torch.cat([torch.zeros(1, dtype=torch.float64), score.double().cpu().cumsum(0)]).tolist()
        largest = min(len(score), math.ceil(dense / cost) - 1)  # below break-even
        steps = list(range(multiple_of, largest + 1, multiple_of))
        if largest == len(score) and (not steps or steps[-1] < largest):
            steps.append(largest)  # every basis is kept: nothing to round
        previous_rank, used, density = 0, 0, math.inf
        for position, rank in enumerate([*steps, None]):
            if rank is None and largest == len(score):
                break
            price = (dense if rank is None else rank * cost) - used
            gain = value[-1 if rank is None else rank] - value[previous_rank]
            # Bases of one layer are only ever taken in order, so an offer is worth at most the one before it.
            density = min(density, gain / price)
            offers.append((math.inf if position == 0 else density, g, position, rank, price))
            previous_rank, used = rank, used + price
    offers.sort(key=lambda o: (-o[0], o[1], o[2]))
    least = sum(price for _, _, position, _, price in offers if position == 0)
    if least > budget:
        raise ValueError(f"the smallest possible is {least:,} parameters, the budget allows {int(budget):,}")
    full = set()
    for _, g, _, rank, price in offers:
        if g in full:
            continue
        if price <= budget:
            ranks[g], budget = rank, budget - price
        else:
            full.add(g)  # the next ones need this one first
    return ranks
