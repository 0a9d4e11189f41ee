"""What checkpoints say about their bases, from config.json and single small tensors: no model is loaded."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from ..system.reading import read_json


def bases_of(stage: Path) -> dict:
    """The quantization_config of a stage's checkpoint; of a dense one, that of a model without bases."""
    config = read_json(stage / "model" / "config.json").get("quantization_config") or {}
    return {"ranks": {}, "groups": [], "embedding": None, "weighted": 0, **config}


def layers(full: dict, kept: dict) -> tuple[list[dict], list[dict]]:
    """`(modules, extra)` for html.heat from two quantization_configs: with all bases, and with those that stayed."""
    shares = {name: group[0] for group in full["groups"] for name in group}
    order = [name for group in full["groups"] for name in group]
    order += [name for name in full["ranks"] if name not in shares]
    place = {name: i for i, name in enumerate(full["ranks"])}  # as in the file, groups kept together
    order.sort(key=lambda name: (place[shares.get(name, name)], shares.get(name, name) != name))
    modules = [
        {"name": n, "rank": kept["ranks"].get(n), "full": full["ranks"][n], "leader": shares.get(n)} for n in order
    ]
    extra = []
    if full["embedding"]:
        name, rank = full["embedding"]["name"], (kept["embedding"] or {}).get("rank")
        extra.append({"name": name, "rank": rank, "full": full["embedding"]["rank"], "leader": None})
    return modules, extra


def weights(stage: Path) -> dict[str, tuple[list[float], list[int]]]:
    """`{leader: (s, survived)}` of a checkpoint that carries weighted bases; both are lists, one entry a basis."""
    config, found = bases_of(stage), {}
    for path in sorted((stage / "model").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if key.endswith(".scale"):
                    name = key.removesuffix(".scale")
                    power = config["weighted"] if name in config["ranks"] else 1  # the embedding's are never squared
                    s = file.get_tensor(key) * file.get_tensor(f"{name}.weight") ** power
                    found[name] = s.tolist(), file.get_tensor(f"{name}.survived").tolist()
    return found


def kept_ranks(decomposed: Path, pruned: Path) -> dict[str, int]:
    """`{leader: bases left}` of what `prune` did not make dense; the token embedding goes by the name of its table."""
    full, left = bases_of(decomposed), bases_of(pruned)
    ranks = dict(left["ranks"])
    if left["embedding"]:
        table = next(name for name in weights(decomposed) if name not in full["ranks"])
        ranks[table] = left["embedding"]["rank"]
    return ranks


def kept(found: Mapping[str, tuple[list[float], list[int]]], ranks: Mapping[str, int]) -> dict[str, list[bool]]:
    """`{leader: [bool, ...]}`: which bases `prune` kept, by |s| among those that outlived enough prunings of `learn`.

    found: of `weights`; ranks: of `kept_ranks`. As `selection.select` does it; the token embedding is not in `learn`.
    """
    left = {name: pair for name, pair in found.items() if name in ranks}
    pruned = {name: survived for name, (_, survived) in left.items() if any(survived)}
    least = max(map(max, pruned.values()), default=0)
    while any(sum(x >= least for x in survived) < ranks[name] for name, survived in pruned.items()):
        least -= 1
    marked = {}
    for name, (s, survived) in left.items():
        alive = [i for i in range(len(s)) if name not in pruned or survived[i] >= least]
        stay = set(sorted(alive, key=lambda i: -abs(s[i]))[: ranks[name]])
        marked[name] = [i in stay for i in range(len(s))]
    return marked
