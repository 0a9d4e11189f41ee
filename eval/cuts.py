"""What budgets and the cuts of learning leave of a tuned model, before anything is trained.

python eval/cuts.py RECIPE.yaml FOLDER RESULTS.json

Tunes the parent of the recipe in FOLDER unless it is there. RESULTS.json: for `budget=uniform` at 2x, 4x and 8x the
least and the largest fraction of its dense parameters that a layer keeps, how many layers are dense, and the validation
NLL; for the rule of Basel at K = 50 % in 50 cuts, and for 8 cuts to 8x, what each leaves of the targeted layers.
"""

import copy
import json
import sys
from pathlib import Path

from basis_select import decompose, load, prune, recipe
from basis_select.bases import basis_cost, dense_cost, groups, take
from basis_select.prune import select
from basis_select.run.disk import OnDisk
from basis_select.training.loss import response_nll


def uniform(model, task, times):
    pruned = prune(copy.deepcopy(model), keep=1 / times, budget="uniform")
    kept = [m[0][1].rank * basis_cost(m) / dense_cost(m) for m in groups(pruned)]
    return {
        "least": round(min(kept), 4),
        "largest": round(max(kept), 4),
        "dense layers": len(groups(model)) - len(kept),
        "validation_nll": round(response_nll(pruned, task.validation, task.pad_id), 4),
    }


def cuts(model, task, rounds, measured=False, **how):
    """What is left of the dense parameters after each of `rounds` cuts, with the weights as they are."""
    model, rows = copy.deepcopy(model), []
    found = groups(model)
    for left in range(rounds, 0, -1):
        for members, index in select(model, cuts=left, **how):
            if index is not None:
                take(members, index)
        row = share([(m[0][1].rank, basis_cost(m), dense_cost(m)) for m in found])
        if measured:
            row["validation_nll"] = round(response_nll(model, task.validation, task.pad_id), 4)
        rows.append(row)
    return rows


def share(layers):
    """What bases leave of the dense parameters, and with layers dense where that is less.

    layers: `[(rank, parameters of a basis, parameters of the dense layer), ...]`
    """
    whole = sum(dense for *_, dense in layers)
    left, deployed = sum(r * c for r, c, _ in layers), sum(min(r * c, dense) for r, c, dense in layers)
    return {"left": round(left / whole, 4), "deployed": round(deployed / whole, 4)}


def main():
    source, folder, results = map(Path, sys.argv[1:])
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    r = recipe.read(source)
    disk = OnDisk(r, folder)
    state = disk.parent()
    parent, task = load(state["parent"] / "model")[0], disk.view(r, state).task
    plain = decompose(copy.deepcopy(parent), task, metric="plain", share=False)
    kronecker = decompose(parent, task, examples=r.decompose.examples)
    found = {
        "layers": len(groups(plain)),
        "uniform, plain metric": {f"{times}x": uniform(plain, task, times) for times in (2, 4, 8)},
        "Basel's rule, K = 0.5, 50 cuts": cuts(plain, task, 50, mass=0.5 ** (1 / 50), budget="mass", score="magnitude"),
        "8 cuts to 8x, kronecker": cuts(kronecker, task, 8, measured=True, keep=1 / 8),
    }
    results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, values in found.items():
        print(name, values[-1] if isinstance(values, list) and len(values) > 8 else values)


if __name__ == "__main__":
    main()
