"""Seconds that the decomposition in the kronecker metric takes: symmetric roots of both moments by eigenvectors and
LAPACK's SVD, as a first prototype had it, against one triangular root and one Gram matrix of the smaller side, as
linalg/metrics.py has it. Both get the same moments; response NLL after a cut shows that nothing is lost.

python eval/decompose_time.py PARENT TASK_FOLDER OUT.json [--blocks N]

Only the first N blocks are decomposed and cut (default 3); the others stay dense. The two take turns, group by group.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch

from basis_select import load, load_task, prune
from basis_select.checkpoint.targets import targets
from basis_select.decompose import fill
from basis_select.linalg import metrics
from basis_select.linalg.metrics import METRICS
from basis_select.statistics.moments import second_moments
from basis_select.statistics.readers import same_input
from basis_select.training.loss import response_nll

EXAMPLES = 64


def by_eigenvectors(weights, outputs, inputs):
    """Bases from symmetric square roots by `eigh` in float64 and a bidiagonal SVD."""

    def root(moment):
        values, vectors = torch.linalg.eigh(moment)
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    (g, g_inverse), (a, a_inverse) = root(outputs), root(inputs)
    u, s, v = torch.linalg.svd(g @ torch.cat(weights).double() @ a, full_matrices=False)
    return g_inverse @ u, s, v @ a_inverse


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parent")
    parser.add_argument("task")
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    args = parser.parse_args()
    parent, tokenizer = load(args.parent, "float32")
    task = load_task(args.task, tokenizer, validation=64, test=64)
    layers = targets(parent)
    members = [g for g in same_input(parent, layers, task) if any(f".{i}." in g[0] for i in range(args.blocks))]
    began = time.perf_counter()
    inputs, outputs, samples = second_moments(parent, members, task, EXAMPLES, METRICS["kronecker"])
    result = {"blocks": args.blocks, "examples": EXAMPLES, "moments_seconds": time.perf_counter() - began}
    models = {name: copy.deepcopy(parent) for name in ("eigenvectors, SVD", "triangular root, Gram matrix")}
    seconds = dict.fromkeys(models, 0.0)
    for names in members:
        weights = [layers[n].weight.detach() for n in names]
        (g,) = (metrics.shrunk(x, samples[names[0]]) for x in outputs[names[0]])
        a = metrics.shrunk(inputs[names[0]], samples[names[0]])
        for kind, model in models.items():
            began = time.perf_counter()
            found = by_eigenvectors(weights, g, a) if "SVD" in kind else metrics.decompose(weights, [g], a)
            seconds[kind] += time.perf_counter() - began
            with torch.no_grad():
                for n, layer in zip(names, fill([model.get_submodule(n) for n in names], *found), strict=True):
                    model.set_submodule(n, layer)
    result["parent_nll"] = response_nll(parent, task.validation, task.pad_id)
    for kind, model in models.items():
        nll = {}
        for times in (4, 8):
            cut = copy.deepcopy(model)
            prune(cut, keep=1 / times)
            nll[f"{times}x"] = response_nll(cut, task.validation, task.pad_id)
        result[kind] = {"seconds_per_block": seconds[kind] / args.blocks, "nll": nll}
        print(kind, result[kind], flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
