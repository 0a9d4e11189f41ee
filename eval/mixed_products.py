"""How far gradients of mixed products (bfloat16) are from those in float32, beside how far those of two batches are.

python eval/mixed_products.py [STEPS ...]

The quickstart's parent after so many steps of tuning (default: 0 and 25), on a processor with bfloat16 units. Writes
results/mixed_products.json beside this file: for each, over all linear layers, the lowest, the median and the highest
cosine between the gradients of one batch in both ways, and between those of two batches in float32.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch

import basis_select as bs
from basis_select.checkpoint.targets import targets
from basis_select.run import recipe as recipes
from basis_select.training.data import Batches
from basis_select.training.loss import task_loss
from basis_select.tune import trainable

REPO = Path(__file__).parents[1]
OUT = REPO / "eval" / "results" / "mixed_products.json"


def gradients(model, batch, mixed):
    model.train()
    model.zero_grad()
    task_loss(model, batch, mixed=mixed)[0].backward()
    return [linear.weight.grad.flatten() for linear in targets(model).values()]


def cosines(a, b):
    found = [torch.nn.functional.cosine_similarity(x, y, dim=0).item() for x, y in zip(a, b, strict=True)]
    return {"lowest": min(found), "median": statistics.median(found), "highest": max(found)}


def measured(r, steps):
    model, tokenizer = bs.load(r.model, "float32")
    task = bs.load_task(r.task, tokenizer, r.seed, **dataclasses.asdict(r.data))
    bs.tune(model, task, seed=r.seed, steps=steps, batch_size=r.tune.batch_size, lr=r.tune.lr)
    trainable(model)
    batches = Batches(task.train, r.tune.batch_size, steps + 2, r.seed, task.pad_id)
    one, other = batches[steps], batches[steps + 1]
    exact = gradients(model, one, mixed=False)
    return {
        "mixed and float32": cosines(exact, gradients(model, one, mixed=True)),
        "two batches": cosines(exact, gradients(model, other, mixed=False)),
    }


if __name__ == "__main__":
    r = recipes.read(REPO / "recipes" / "quickstart.yaml")
    found = {steps: measured(r, steps) for steps in map(int, sys.argv[1:] or ("0", "25"))}
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
