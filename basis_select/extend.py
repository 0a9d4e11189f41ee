"""Add new bases: directions the pretrained weights do not have, for healing to fill."""

import torch

from .bases import groups, resize
from .checkpoint.format import describe


@torch.no_grad()
def extend(model, seed=0, *, rank: int = 16):
    """Append `rank` new bases to every factored layer, in place; returns the model.

    `u~ = 0` and `v~` random with the mean row norm of the kept `v`, so the function does not change and the first
    gradient reaches u~ at the scale of the others. Layers that share a `v` share the new rows too. The
    bases count against the size: `prune(reserve=rank)` leaves room for them. Source: Basel.
    """
    found = groups(model)
    if rank and not found:
        raise ValueError("there are no factored layers to extend: call decompose and prune first")
    if rank and found[0][0][1].weighted:
        raise ValueError("these bases are still weighted: call prune before extend")
    generator = torch.Generator().manual_seed(seed)
    for members in found if rank else []:
        v = members[0][1].leader.v
        new = torch.randn(rank, v.in_features, generator=generator).to(v.weight)
        new *= v.weight.float().norm(dim=1).mean() / v.in_features**0.5
        resize(v, torch.cat([v.weight, new]))
        for _, layer in members:
            u = layer.u.weight
            resize(layer.u, torch.cat([u, u.new_zeros(len(u), rank)], dim=1))
    describe(model)
    return model
