"""Methods x sizes x tasks x seeds from one YAML grid, measured alike: same parent, same training steps, same items.

python eval/compare.py GRID.yaml FOLDER RESULTS.jsonl     continues whatever is there
python eval/compare_report.py RESULTS.jsonl               writes the table and the plot beside it

FOLDER keeps what rows share: parents and decompositions. Every row done is one line of RESULTS.jsonl. A method is
a dict of recipe keys that differ from the grid's `base`; what it spends on learning and refining is taken from its
healing, so that all rows train for `steps` steps on batches of one size. `then: int8` adds a row for the same
model with int8 weights.
"""

import copy
import functools
import hashlib
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from basis_select import pipeline
from basis_select.bases import groups
from basis_select.decompose import same_input, targets
from basis_select.embedding import TABLE, table_of
from basis_select.extend import extend
from basis_select.heal import heal, suitable_rate
from basis_select.learn import learn
from basis_select.linalg.metrics import METRICS
from basis_select.models import load
from basis_select.moments import second_moments
from basis_select.prune import prune
from basis_select.recipe import Recipe, override
from basis_select.refine import refine
from basis_select.sizes import sizes
from basis_select.training.loss import log_probabilities, response_nll, response_nlls

GROUP = 32  # weights that share one scale in int4


class Teacher:
    """The parent's log-probabilities in half precision, computed once for every batch that rows have in common."""

    def __init__(self, parent, folder):
        self.parent, self.folder = parent, folder
        folder.mkdir(exist_ok=True)

    def __call__(self, batch):
        path = self.folder / f"{hashlib.sha256(batch['input_ids'].numpy()).hexdigest()}.safetensors"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            save_file({"log_p": log_probabilities(self.parent, batch).half()}, partial)
            partial.rename(path)
        return load_file(path)["log_p"].float()


def compare(grid, folder, results):
    done = {(r["task"], r["seed"], r["method"], r["size"]) for r in read(results)}
    for seed in grid["seeds"]:
        for name in grid["tasks"]:
            rows = [
                (name, seed, method, size)
                for size in grid["sizes"]
                for method in grid["methods"]
                if (name, seed, method, size) not in done
            ]
            dense = [(name, seed, m, 1) for m in ("parent", "int8", "int4") if (name, seed, m, 1) not in done]
            if not rows and not dense:
                continue
            base, stages, parent = setting(grid, name, seed, folder)
            for row in dense:
                write(results, row, measure(rounded(copy.deepcopy(parent)), stages.task, row[2]))
            teacher = Teacher(parent, folder / f"{name}-{seed}" / "teacher")
            moments = functools.cache(functools.partial(all_moments, parent, stages.task, base))
            for row in rows:
                logging.warning("%s", " ".join(map(str, row)))
                changes = dict(grid["methods"][row[2]])
                width = changes.pop("then", None)
                recipe = at_size(override(base, changes, row[2]), parent, row[3])
                model, facts = compressed(recipe, stages, parent, teacher, moments, grid["steps"])
                write(results, row, {**measure(model, stages.task, None), **facts})
                if width:
                    row = (*row[:2], f"{row[2]}, {width}", row[3])
                    write(results, row, {**measure(model, stages.task, width), **facts})


def setting(grid, name, seed, folder):
    """The recipe that all rows of a task differ from, its stages and its parent."""
    changes = dict(grid["tasks"][name])
    base = Recipe(model=grid["model"], task=changes.pop("task"), seed=seed)
    base = override(override(base, grid["base"], "base"), changes, name)
    (folder / f"{name}-{seed}" / "stages").mkdir(parents=True, exist_ok=True)
    stages = pipeline.Stages(base, folder / f"{name}-{seed}")
    return base, stages, load(stages.parent() / "model")[0]


def at_size(recipe, parent, times):
    """`recipe` at the size of the whole model that it has when its targeted layers alone are `times` smaller."""
    now = sizes(parent)
    return recipe.at(f"{(now['parameters_dense'] - now['targeted_dense'] * (1 - 1 / times)) / 1e6:f}M")


def cut(grid, name, method, size, folder):
    """`(recipe, task, teacher, model)` of one row of a grid after `prune`: where healing starts."""
    base, stages, parent = setting(grid, name, 0, folder)
    own = {k: v for k, v in grid["methods"][method].items() if k != "then"}
    r = at_size(override(base, own, method), parent, size)
    found = stages.decomposed(r, lambda: all_moments(parent, stages.task, base)[r.decompose.share])
    model, _ = load(found / "model")
    teacher = Teacher(parent, folder / f"{name}-0" / "teacher")
    return r, stages.task, teacher, prune(model, stages.task, **vars(r.prune))


def compressed(r, stages, parent, teacher, moments, steps):
    """Everything after the decomposition in memory: rows are many, and each is done in minutes."""
    clock = {}

    def timed(name, verb, *args, **options):
        began = time.monotonic()
        verb(*args, **options)
        clock[name] = round(time.monotonic() - began, 1)

    decomposed = stages.decomposed(r, lambda: moments()[r.decompose.share])
    model, _ = load(decomposed / "model")
    task, seed, options = stages.task, r.seed, {k: vars(getattr(r, k)) for k in ("learn", "prune", "heal")}
    cuts = stages.cuts(r)
    if r.learn.steps:
        timed("learn", learn, model, task, teacher, seed=seed, **cuts, **options["learn"])
    found = None if r.learn.steps else stages.derivatives(r, decomposed)
    timed("prune", prune, model, task, found, r.extend.rank, r.dtype, seed, **options["prune"])
    if r.extend.rank:
        timed("extend", extend, model, task, parent, seed, **vars(r.extend))
    if r.refine.steps:
        timed("refine", refine, model, task, parent, seed=seed, **vars(r.refine))
    before = response_nll(model, task.validation, task.pad_id)
    left = steps - r.learn.steps - r.refine.steps
    lr = r.heal.lr or suitable_rate(model, task, teacher, seed)
    timed("heal", heal, model, task, teacher, seed=seed, **{**options["heal"], "steps": left, "lr": lr})
    return rounded(model), {
        "validation_nll": {"unhealed": before, "healed": response_nll(model, task.validation, task.pad_id)},
        "lr": lr,
        "steps": {"learn": r.learn.steps, "refine": r.refine.steps, "heal": left},
        "seconds": clock,
    }


def all_moments(parent, task, r):
    """`{share: second moments}`, every metric's: those of a layer on its own are blocks of its group's."""
    layers = targets(parent)
    members = same_input(parent, layers, task)
    inputs, outputs = second_moments(parent, members, task, r.decompose.examples, METRICS["kronecker"], embedding=True)
    alone = {name: inputs[names[0]] for names in members for name in names}, {}
    for own, all_ in zip(alone, (inputs, outputs), strict=True):
        own[TABLE] = all_[TABLE]
    for names in members:
        blocks = outputs[names[0]]
        if len(blocks) < len(names):
            parts = [layers[name].out_features for name in names]
            blocks = [row.split(parts, dim=1)[i] for i, row in enumerate(blocks[0].split(parts))]
        alone[1].update({name: [block] for name, block in zip(names, blocks, strict=True)})
    return {True: (inputs, outputs), False: alone}


def quantized(model, width):
    """Round the weights of all linear layers but a dense tied head, in place; returns the bytes of the model.

    width: "int8", one scale a row; "int4", one scale for GROUP weights; any other is bfloat16. Scales, and all
    that is no linear layer, are bfloat16. A table of bases is rounded too, but stored as the values that stand for it,
    since an embedding looks up rows and not products.
    """
    if width not in ("int8", "int4"):
        return 2 * sum(p.numel() for p in model.parameters())
    layers = list(targets(model, required=False).values())
    layers += [m for g in groups(model) for _, layer in g for m in layer.children()]
    table = table_of(model)
    table = [] if table is None else list(table.children())
    weights = sum(m.weight.numel() for m in layers + table)
    rest = sum(p.numel() for p in model.parameters()) - weights
    if width == "int8":
        config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        taken = weights + 2 * sum(m.out_features for m in layers + table)
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
        taken = weights // 2 + 2 * weights // GROUP
    quantize_(model, config, lambda m, _: m in layers or m in table)
    for m in table:
        m.weight = torch.nn.Parameter(m.weight.dequantize(), requires_grad=False)
    return 2 * rest + taken


def rounded(model):
    """`model` with the values its parameters have in a bfloat16 checkpoint, computed with in fp32."""
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model


def measure(model, task, width):
    """Test NLL item by item and the sizes of `model`, after its weights are `quantized` to `width`, in place."""
    facts = sizes(model)
    facts["bytes"] = quantized(model, width)
    nll, tokens = response_nlls(model, task.test, task.pad_id)
    if not torch.isfinite(nll).all():
        raise FloatingPointError("a test item has a likelihood that is not finite")
    return {"sizes": facts, "nll": [round(x, 4) for x in nll.tolist()], "tokens": tokens.tolist()}


def write(results, row, values):
    names = ("task", "seed", "method", "size")
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**dict(zip(names, row, strict=True)), **values}) + "\n")


def read(results):
    """The rows of a results file; a last line cut short by a kill does not count."""
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True) if results.exists() else []
    if lines and not lines[-1].endswith("\n"):
        results.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    path, folder, results = map(Path, sys.argv[1:])
    compare(yaml.safe_load(path.read_text(encoding="utf-8")), folder, results)
