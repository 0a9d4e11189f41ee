"""Which bases stay: scores and a budget in, ranks out. Maths on plain tensors and ints."""

import math

import torch


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
