"""Remove the bases that matter least until the budget is met."""

import torch

from .bases import basis_cost, dense_cost, fold, groups, take, to_dense
from .checkpoint.format import describe
from .linalg.budget import allocate, by_mass, uniform_scores

BUDGETS = ("global", "uniform", "mass")


def prune(model, reserve=0, *, keep: float = 0.25, budget: str = "global", multiple_of: int = 16):
    """Keep the best bases, fold their weights into the factors, in place; returns the model.

    `keep` is the fraction of the parameters of the targeted layers that may remain; it is never exceeded.
    `budget` says how it is shared: "global" (largest s^2 per parameter over all layers; s^2 is the energy in the
    metric, comparable across layers for "kronecker"), "uniform" (the same fraction of every layer), or "mass" (Basel:
    the largest s of each layer that sum to `keep` of its total; the size is then an outcome). Ranks are
    multiples of `multiple_of`; a layer whose rank would reach break-even, in*out/(in+out), stays dense. `reserve`
    bases per layer are left free for `extend`. Raises ValueError when the budget cannot be met.
    """
    chosen = select(model, keep, budget, multiple_of, reserve)
    for members, index in chosen:
        if index is None:
            to_dense(model, members)
        else:
            shrink(members, index)
            fold(members)
    describe(model)
    return model


def select(model, keep, budget="global", multiple_of=16, reserve=0):
    """`[(members, index), ...]`: for every group the indices of the bases to keep, or None if it stays dense."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is not a fraction above 0 and up to 1 of the targeted parameters")
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; known are {', '.join(BUDGETS)}")
    found = groups(model)
    if not found or not all(members[0][1].weighted for members in found):
        raise ValueError("there are no weighted bases to prune: call decompose first")
    costs, dense = [basis_cost(m) for m in found], [dense_cost(m) for m in found]
    free = int(keep * sum(dense)) - reserve * sum(costs)
    now = [min(m[0][1].rank * c, d) for m, c, d in zip(found, costs, dense, strict=True)]
    if budget != "mass" and sum(now) <= free:  # learning has pruned already
        return [(m, None if n == d else torch.arange(m[0][1].rank)) for m, n, d in zip(found, now, dense, strict=True)]
    energies = [members[0][1].s.detach().double().square() for members in found]
    orders = [e.argsort(descending=True, stable=True) for e in energies]
    if budget == "mass":
        kept = [by_mass(e.sqrt(), keep) for e in energies]
        return [(m, None if len(i) * c >= d else i) for m, i, c, d in zip(found, kept, costs, dense, strict=True)]
    if budget == "uniform":
        scores = [uniform_scores(len(e), c, d) for e, c, d in zip(energies, costs, dense, strict=True)]
    else:
        scores = [e[o] for e, o in zip(energies, orders, strict=True)]
    ranks = allocate(scores, costs, dense, free, multiple_of)
    return [
        (m, None if rank is None else order[:rank].sort().values)
        for m, order, rank in zip(found, orders, ranks, strict=True)
    ]


def shrink(members, index):
    """Drop all bases of a group but `index`, keeping the layers weighted."""
    if len(index) < members[0][1].rank:
        take(members, torch.as_tensor(index, device=members[0][1].leader.v.weight.device))
