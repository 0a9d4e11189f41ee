"""How big a model is, the four ways in which it is always reported."""

import collections
from pathlib import Path

from torch import nn

from .checkpoint.targets import targets
from .layers.group import groups, table_of
from .layers.low_rank import LowRankLinear
from .layers.rounded import RoundedLinear
from .trim import trimmed_away


def sizes(model: nn.Module, folder: str | Path | None = None) -> dict:
    """Bases kept, parameters of the targeted linears, of the whole model, and bytes of its weight files.

    `*_dense` are the same for the dense parent, before tokens were trimmed away. Biases and norms count only in the
    whole model. `bits` says how many of the parameters take 8, 4, 3 and 2 bits. `bytes` is None without a `folder`;
    otherwise it is what the .safetensors files there occupy.

        >>> sizes = bs.sizes(parent)
        >>> sizes["parameters"] == sizes["parameters_dense"]
        True
    """
    factored, table = groups(model), table_of(model)
    dense = list(targets(model, required=False).values())
    untouched = sum(m.in_features * m.out_features for m in dense)
    targeted = untouched + sum(g.parameters for g in factored)
    targeted_dense = untouched + sum(g.shape.dense_cost for g in factored)
    saved = table.shape.dense_cost - table.parameters if table else 0
    weights = sum(g.rank for g in (*factored, table) if g and g.weighted)
    total = sum(p.numel() for p in model.parameters())
    # Of what is rounded the numbers count, which share bytes where they have few bits, and their scales do not.
    for m in model.modules():
        if isinstance(m, RoundedLinear):
            total += m.in_features * m.out_features - m.q.numel() - (m.scale.numel() if m.bits == 8 else 0)
    return {
        "bases": sum(min(m.in_features, m.out_features) for m in dense) + sum(g.rank for g in factored),
        "targeted": targeted,
        "targeted_dense": targeted_dense,
        "parameters": total - weights,
        "parameters_dense": total - weights - targeted + targeted_dense + saved + trimmed_away(model),
        "bits": {str(bits): numbers for bits, numbers in _rounded(model).items()},
        "bytes": sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")) if folder else None,
    }


def _rounded(module: nn.Module) -> dict[int, int]:
    """`{bits: numbers that take so many}` of what is rounded in it."""
    found = collections.Counter()
    for m in module.modules():
        if isinstance(m, RoundedLinear):
            found[m.bits] += m.in_features * m.out_features
    return dict(sorted(found.items(), reverse=True))


def layer_table(model: nn.Module) -> list[dict]:
    """`[{name, in, out, rank (None: dense), bits, shares}, ...]` in model order; `shares` names the layer that owns v.

    bits: {8: how many of its numbers take 8 bits, 4: ...}, its own alone, nothing where all take 16 or more.
    """
    owners = {layer: name for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    rows = []
    for name, module in [*((n, m) for m, n in owners.items()), *targets(model, required=False).items()]:
        factored = isinstance(module, LowRankLinear)
        rows.append(
            {
                "name": name,
                "in": module.in_features,
                "out": module.out_features,
                "rank": module.rank if factored else None,
                "bits": _rounded(module),
                "shares": owners[module.leader] if factored and module.leader is not module else None,
            }
        )
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(rows, key=lambda row: order[row["name"]])
