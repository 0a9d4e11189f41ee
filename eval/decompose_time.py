"""Decomposition in the kronecker metric: roots of stacked output moments by eigenvectors, as a first prototype had it,
against one triangular root per layer, as linalg/metrics.py has it. Seconds and response NLL after a cut.

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
from basis_select.decompose import _install, same_input, second_moments, targets
from basis_select.linalg import metrics
from basis_select.linalg.metrics import METRICS
from basis_select.training.data import Batches
from basis_select.training.loss import response_nll, task_loss

EXAMPLES = 64


def stacked_moments(model, members, task):
    """E[g g^T] of the stacked outputs of every group, cross terms included; labels are the task's own."""
    total, parts, handles = {}, {}, []

    def watch(names, name):
        def on_gradient(g):
            parts[name] = g.flatten(0, -2).float()
            if all(n in parts for n in names):
                stacked = torch.cat([parts.pop(n) for n in names], dim=1)
                total[names[0]] = total.get(names[0], 0) + stacked.T @ stacked

        def on_output(module, args, y):
            y.register_hook(on_gradient)

        return on_output

    for names in members:
        handles += [model.get_submodule(n).register_forward_hook(watch(names, n)) for n in names]
    model.requires_grad_(False)
    handles.append(model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_()))
    for batch in Batches(task.train[:EXAMPLES], 8, EXAMPLES // 8, 0, task.pad_id):
        loss, tokens = task_loss(model, batch)[0], int((batch["targets"] >= 0).sum())
        (loss * tokens).backward()
    for handle in handles:
        handle.remove()
    return total


def by_eigenvectors(weights, stacked, inputs):
    """Bases from symmetric square roots by `eigh` in float64, the output moment taken over all layers at once."""

    def root(moment):
        moment = moment.double()
        moment.diagonal().add_(metrics.SHRINKAGE * moment.diagonal().mean())
        values, vectors = torch.linalg.eigh(moment)
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    (g, g_inverse), (a, a_inverse) = root(stacked), root(inputs)
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
    inputs, outputs = second_moments(parent, members, task, EXAMPLES, METRICS["kronecker"])
    stacked = stacked_moments(parent, members, task)
    models = {name: copy.deepcopy(parent) for name in ("stacked, eigenvectors", "per layer, triangular")}
    seconds = dict.fromkeys(models, 0.0)
    for names in members:
        weights = [layers[n].weight.detach() for n in names]
        for kind, model in models.items():
            began = time.perf_counter()
            if kind == "stacked, eigenvectors":
                found = by_eigenvectors(weights, stacked[names[0]], inputs[names[0]])
            else:
                roots = [metrics.root(outputs[n]) for n in names]
                found = metrics.decompose(weights, roots, metrics.root(inputs[names[0]]))
            seconds[kind] += time.perf_counter() - began
            with torch.no_grad():
                _install(model, names, [model.get_submodule(n) for n in names], *found)
    result = {"blocks": args.blocks, "parent_nll": response_nll(parent, task.validation, task.pad_id)}
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
