"""Ours beside the authors' own code: one parent, the same examples, nothing trained after the cut.

python eval/parity.py RECIPE.yaml FOLDER RESULT.json [--svd-llm CHECKOUT] [--basel CHECKOUT]

RECIPE names the parent (its `tune` stage, made in FOLDER unless it is there) and the examples of its `decompose`
stage. RESULT.json is written, and a table printed, of the response NLL on the test split, per token. The checkouts are
those of github.com/AIoT-MLSys-Lab/SVD-LLM and github.com/carozy797/Basel; without one its rows are left out.

SVD-LLM's whitening and truncation run as they were released, on batches of one example, so that nothing is padded. Its
attention has one key per query head, so the products of its factors are put into the parent's own layers: the function
is that of the factors. What differs from ours: it sums `x x^T` over all tokens in fp32 before a Cholesky in float64,
and only where that fails adds the smallest eigenvalue and 1e-6 to the diagonal; ours shrinks every moment a little
towards the identity. It inverts the root and decomposes in fp32, we in float64. It rounds each layer's rank
down for itself, `int(m n ratio / (m + n))`; ours are multiples of `multiple_of` within one budget.

Basel's rule runs as it was released, without the training between its prunings: what is compared is how many bases
it leaves in the decoder's layers, the tied head aside, as eval/cuts.py counts ours. What differs from ours: it first
drops every s below 1e-3 of the layer's mean, and keeps all bases that equal the last one it needs.
"""

import argparse
import copy
import json
import sys
import types
from pathlib import Path

import torch
from cuts import cuts, share

from basis_select.checkpoint.models import load
from basis_select.checkpoint.targets import targets
from basis_select.decompose import decompose
from basis_select.layers.shape import Shape
from basis_select.prune import prune
from basis_select.run import recipe
from basis_select.run.disk import OnDisk
from basis_select.selection import Rule
from basis_select.sizes import sizes
from basis_select.target import target
from basis_select.training.data import drawn
from basis_select.training.loss import response_nll

TIMES = (2, 4, 8)  # fewer parameters in the layers
OWN = {"ours": 1, "ours, ranks in multiples of 16": 16}
MASS, ROUNDS = 0.5, 50  # Basel's example: K and how often it prunes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("recipe", "folder", "result"):
        parser.add_argument(name, type=Path)
    for name in ("--svd-llm", "--basel"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    (given.folder / "stages").mkdir(parents=True, exist_ok=True)
    r = recipe.read(given.recipe)
    disk = OnDisk(r, given.folder)
    state = disk.parent()
    parent, _ = load(state["parent"] / "model", "float32")
    task, examples = disk.view(r, state).task, r.decompose.examples
    found = {"recipe": given.recipe.name, "examples": examples, "test items": len(task.test)}
    found["parent"] = nll(parent, task)
    found["whitened, uniform"] = rows = {name: {} for name in OWN}
    whole = decompose(copy.deepcopy(parent), task, metric="whitened", share=False, examples=examples)
    for name, step in OWN.items():
        for times in TIMES:
            model = prune(copy.deepcopy(whole), keep=1 / times, budget="uniform", multiple_of=step)
            now = sizes(model)
            kept = round(now["targeted"] / now["targeted_dense"], 4)
            rows[name][f"{times}x"] = {"nll": nll(model, task), "kept": kept}
            print(name, times, rows[name][f"{times}x"], flush=True)
    del whole
    if given.svd_llm:
        rows["authors"] = {f"{times}x": value for times, value in svd_llm(given.svd_llm, parent, task, examples)}
    if given.basel:
        found["kept by Basel's rule"] = {"ours": basel_ours(parent, task), "authors": basel(given.basel, parent)}
    given.result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def nll(model, task):
    return round(response_nll(model, task.test, task.pad_id), 4)


def svd_llm(checkout, parent, task, examples):
    """`(times smaller, {nll, kept})` of SVD-LLM's own functions, at each of TIMES."""
    for name, wanted in (
        ("svd_mistral", ("SVD_MistralAttention", "SVD_MistralMLP")),
        ("svd_opt", ("SVDOPTDecoderLayer",)),
    ):
        stub = types.ModuleType(f"component.{name}")  # they ask for an older transformers, and are not for this model
        for each in wanted:
            setattr(stub, each, None)
        sys.modules[stub.__name__] = stub
    sys.path.insert(0, str(checkout))
    import SVDLLM

    batches = [{"input_ids": torch.tensor([e.input_ids])} for e in drawn(task.train, examples)]
    roots = SVDLLM.profle_svdllm("llama", copy.deepcopy(parent), batches, "cpu")
    for times in TIMES:
        model = copy.deepcopy(parent)
        SVDLLM.whitening("llama", model, roots, 1 / times, "cpu")
        product, parameters = copy.deepcopy(parent), 0
        for name, layer in targets(product).items():
            u, v = (model.get_submodule(f"{name.removesuffix('_proj')}_{side}_proj").weight for side in "uv")
            layer.weight.data = u.data @ v.data
            parameters += u.numel() + v.numel()
        dense = sum(layer.weight.numel() for layer in targets(parent).values())
        yield times, {"nll": nll(product, task), "kept": round(parameters / dense, 4)}


def basel(checkout, parent):
    """What Basel's own rule leaves of the decoder's layers, its new bases not counted: `share`."""
    sys.path.insert(0, str(checkout))
    from methods import basis_selection

    body = basis_selection.model_init(copy.deepcopy(parent.base_model), 0)
    for _ in range(ROUNDS):
        basis_selection.select_basis(body, MASS ** (1 / ROUNDS))
    layers = [m for m in body.modules() if isinstance(m, basis_selection.BSLinear)]
    return share([(Shape(m.input_dim, (m.output_dim,)), int(m.mask.sum())) for m in layers])


def basel_ours(parent, task):
    """The same of ours, by the cuts of `learn`."""
    model = decompose(copy.deepcopy(parent), metric="plain", share=False)
    return cuts(model, task, ROUNDS, target(mass=MASS ** (1 / ROUNDS)), Rule("mass", "magnitude"))[-1]


def table(found):
    lines = [f"parent {found['parent']}", f"{'whitened, uniform':32}" + "".join(f"{t:>4}x" + " " * 12 for t in TIMES)]
    for name, row in found["whitened, uniform"].items():
        lines.append(f"{name:32}" + "".join(f"{v['nll']:.4f} (kept {v['kept']:.3f})".ljust(22) for v in row.values()))
    for name, kept in found.get("kept by Basel's rule", {}).items():
        how = f"{kept['left']} of dense, {kept['deployed']} with layers dense where that is less"
        lines.append(f"Basel's rule, {name}: {how}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
