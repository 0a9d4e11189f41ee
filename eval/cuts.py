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

from basis_select import decompose, load, prune
from basis_select.layers.group import groups
from basis_select.run import recipe
from basis_select.run.disk import OnDisk
from basis_select.selection import Rule, cut
from basis_select.target import target
from basis_select.training.loss import response_nll


def uniform(model, task, times):
    pruned = prune(copy.deepcopy(model), keep=1 / times, budget="uniform")
    kept = [g.parameters / g.shape.dense_cost for g in groups(pruned)]
    return {
        "least": round(min(kept), 4),
        "largest": round(max(kept), 4),
        "dense layers": len(groups(model)) - len(kept),
        "validation_nll": round(response_nll(pruned, task.validation, task.pad_id), 4),
    }


def cuts(model, task, rounds, asked, rule, measured=False):
    """What is left of the dense parameters after each of `rounds` cuts, with the weights as they are."""
    model, rows = copy.deepcopy(model), []
    found = groups(model)
    for left in range(rounds, 0, -1):
        for group, index in cut(model, asked, rule, left):
            if index is not None:
                group.take(index)
        row = share([(group.shape, group.rank) for group in found])
        if measured:
            row["validation_nll"] = round(response_nll(model, task.validation, task.pad_id), 4)
        rows.append(row)
    return rows


def share(found):
    """What bases, `[(shape, rank), ...]`, leave of the dense parameters, and with layers dense where that is less."""
    whole = sum(shape.dense_cost for shape, _ in found)
    left = sum(rank * shape.basis_cost for shape, rank in found)
    deployed = sum(shape.deployed(rank) for shape, rank in found)
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
        "Basel's rule, K = 0.5, 50 cuts": cuts(
            plain, task, 50, target(mass=0.5 ** (1 / 50)), Rule("mass", "magnitude")
        ),
        "8 cuts to 8x, kronecker": cuts(kronecker, task, 8, target(keep=1 / 8), Rule(), measured=True),
    }
    results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, values in found.items():
        print(name, values[-1] if isinstance(values, list) and len(values) > 8 else values)


if __name__ == "__main__":
    main()
