"""Methods x sizes x tasks x seeds from one YAML grid, measured alike: same parent, same training steps, same items.

python eval/compare.py GRID.yaml FOLDER RESULTS.jsonl     continues whatever is there
python eval/compare_report.py RESULTS.jsonl               writes the table and the plot beside it

FOLDER keeps what rows share: parents and decompositions. Every row done is one line of RESULTS.jsonl. A method is
a dict of recipe keys that differ from the grid's `base`; what it spends on learning and refining is taken from its
healing, so that all rows train for `steps` steps on batches of one size. `then: int8` adds a row for the same
model with int8 weights. A method `{dense: 4}` (8, 4, 3 or 2) is the dense parent rounded to so many bits, its table to
8, healed for as many steps with its rounding known, as ours is; it has one size. A size is how many times smaller the
targeted layers are, or, as "45MB", bytes on disk, which goes with `prune.bits: auto`.

A method whose keys trim (`trim.tokens: task`) starts from a trimmed parent and has as many parameters as one that does
not; a `base` that trims trims for all, int8 and int4 of the dense parent too. "parent" is never trimmed, "trimmed" is
what trimming alone makes of it. The likelihood of every row is per token of the untrimmed tokenizer.

No rate is chosen on test items. A key whose value is a list names candidates; `choose` names a size, `at`, and in
`heal` multiples of the rate that heal would take by itself. Of all combinations each method takes, on every task, the
one with the least NLL on the validation split at that size, and keeps it at all others. Its rows hold what was chosen
and, in `candidates`, the validation NLL of all of them, null where the loss did not stay finite.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from basis_select.checkpoint.models import load
from basis_select.checkpoint.targets import targets
from basis_select.heal import suitable_rate
from basis_select.layers.embedding import round_table
from basis_select.layers.group import groups, table_of
from basis_select.layers.rounded import RoundedLinear
from basis_select.layers.rounding import GROUP, nearest, stored_bytes
from basis_select.linalg.metrics import METRICS
from basis_select.run.disk import OnDisk
from basis_select.run.recipe import Recipe, override
from basis_select.run.stages import walk
from basis_select.run.work import Work, read_derivatives
from basis_select.sizes import sizes
from basis_select.statistics.moments import TABLE, second_moments
from basis_select.statistics.readers import same_input
from basis_select.training.loss import log_probabilities, response_nll, response_nlls


class Teacher:
    """The parent's log-probabilities in half precision, computed once for every batch that rows have in common.

    What is kept in `folder` is found by the parent's weights, the tokens, and the positions that were asked for.
    """

    def __init__(self, parent, folder):
        self.parent, self.folder = parent, folder
        folder.mkdir(exist_ok=True)
        self.weights = hashlib.sha256()
        for name, tensor in sorted(parent.state_dict().items()):
            self.weights.update(name.encode())
            self.weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

    def __call__(self, batch):
        key = self.weights.copy()
        for name in ("input_ids", "positions"):
            key.update(f"{name} {tuple(batch[name].shape)}".encode())
            key.update(batch[name].contiguous().numpy())
        path = self.folder / f"{key.hexdigest()}.safetensors"
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
                for method, own in grid["methods"].items()
                for size in ([1] if "dense" in own else [size])
                if (name, seed, method, size) not in done
            ]
            dense = [(name, seed, m, 1) for m in dense_rows(grid, name) if (name, seed, m, 1) not in done]
            if not rows and not dense:
                continue
            every = setting(grid, name, seed, folder)
            for row in dense:
                bench = every.trimmed({"trim.tokens": "all"} if row[2] == "parent" else {})
                write(results, row, measure(rounded(copy.deepcopy(bench.parent)), bench.task, row[2]))
            for row in rows:
                logging.warning("%s", " ".join(map(str, row)))
                own = dict(grid["methods"][row[2]])
                bench, width = every.trimmed(own), own.pop("then", None)
                choice = chosen_before(results, row) or choose(bench, own, row[2], grid.get("choose"))
                model, facts = made(bench, own | choice["chosen"], row[2], row[3], choice["heal"])
                write(results, row, {**measure(model, bench.task, None), **facts, **choice})
                if width:
                    row = (*row[:2], f"{row[2]}, {width}", row[3])
                    write(results, row, {**measure(model, bench.task, width), **facts, **choice})


def dense_rows(grid, name):
    """Names of the rows of a task that are not factored."""
    trims = base_of(grid, name, 0).trim.tokens != "all"
    return ("parent", *(["trimmed"] if trims else []), "int8", "int4")


class Bench:
    """What all rows of one task and seed have in common that trim alike; `steps` of training for each.

    Parent and decompositions are stages on disk in the folder `home`; all later ones run in memory, because rows are
    many and each is done in minutes.
    """

    def __init__(self, base: Recipe, home: Path, steps: int):
        (home / "stages").mkdir(parents=True, exist_ok=True)
        self.base, self.home, self.steps, self.others = base, home, steps, {}
        self.disk = OnDisk(base, home, moments=self.moments_for)
        self.state = self.disk.row(until="trim")
        self.task = self.disk.view(base, self.state).task
        self.parent = load(self.state["parent"] / "model")[0]
        self.teacher = Teacher(self.parent, home / "teacher")

    def trimmed(self, own: dict) -> "Bench":
        """The Bench of rows with these keys of their own: this one, unless they trim otherwise."""
        r = override(self.base, {key: own[key] for key in own if key.startswith("trim.")}, "trim")
        if r.trim == self.base.trim:
            return self
        if r.trim not in self.others:
            self.others[r.trim] = Bench(r, self.home, self.steps)
        return self.others[r.trim]

    @functools.cached_property
    def moments(self):
        return all_moments(self.parent, self.task, self.base)

    def moments_for(self, r):
        """What `decompose` is given: None for a metric that needs no second moments, or others."""
        uses = METRICS[r.decompose.metric]
        return None if uses.squares or uses == METRICS["plain"] else self.moments[r.decompose.share]

    def row(self, r, clock, model=None, until="heal"):
        """The model of row `r` behind the stage `until`, from `model`, which is where healing starts, or from disk."""
        state, after = {"model": model}, "refine"
        if model is None:
            after = "decompose" if r.learn.steps else "derivatives"
            folders = self.disk.row(r, until=after)
            state = {"model": load(folders["model"] / "model")[0]}
            if "derivatives" in folders:
                state["derivatives"] = read_derivatives(folders["derivatives"])
        state |= {"parent": self.parent, "teacher": self.teacher}
        runner = InMemory(lambda row, *_: self.disk.view(row, self.state), clock)
        return walk(r, runner, state, after=after, until=until, given=("teacher",))["model"]


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Runs stages on what is in memory; `clock` gets the seconds of each."""

    view: Callable
    clock: dict

    def do(self, stage, view, options, read):
        work, began = Work(view.recipe, view.task, options, read), time.monotonic()
        made = stage.run(work)
        self.clock[stage.name] = round(time.monotonic() - began, 1)
        return work.model if made is None else made


def chosen_before(results, row):
    """What an earlier row of the same task, seed and method has chosen, if there is one."""
    for r in read(results):
        if (r["task"], r["seed"], r["method"]) == row[:3]:
            return {key: r[key] for key in ("chosen", "heal", "candidates")}
    return None


def choose(bench, own, method, ladder):
    """`{chosen: {recipe key: value}, heal: times its rate, candidates: [...]}` by NLL on the validation split."""
    lists = {key: value for key, value in own.items() if isinstance(value, list)}
    if lists and not ladder:
        raise ValueError(
            f"{method} lists candidates of {', '.join(lists)}: name in `choose` the size to choose them at"
        )
    options = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    factors, found = ladder["heal"] if ladder else [1], []
    if len(options) * len(factors) == 1:
        return {"chosen": options[0], "heal": factors[0], "candidates": []}
    for chosen in options:
        start = finite(started, bench, own | chosen, method, ladder["at"])
        for factor in factors:
            end = start and finite(healed, bench, start, factor)
            nll = end[1]["validation_nll"]["healed"] if end else math.nan
            nll = round(nll, 4) if math.isfinite(nll) else None
            logging.warning("%s, %s, heal %g times: validation NLL %s", method, chosen, factor, nll)
            found.append({**chosen, "heal": factor, "validation_nll": nll})
    best = min(found, key=lambda c: math.inf if c["validation_nll"] is None else c["validation_nll"])
    if best["validation_nll"] is None:
        raise FloatingPointError(f"none of the rates of {method} leaves a finite loss: {found}")
    return {"chosen": {key: best[key] for key in lists}, "heal": best["heal"], "candidates": found}


def finite(verb, *args):
    """What `verb` returns, None where its loss does not stay finite: a rate that is too large is a result."""
    try:
        return verb(*args)
    except FloatingPointError as error:
        logging.warning("%s", error)
        return None


def base_of(grid, name, seed):
    """The recipe that the rows of a task differ from."""
    changes = dict(grid["tasks"][name])
    base = Recipe(model=grid["model"], task=changes.pop("task"), seed=seed)
    return override(override(base, grid["base"], "base"), changes, name)


def setting(grid, name, seed, folder):
    """The Bench of a task: the recipe that its rows differ from, its parent and teacher."""
    return Bench(base_of(grid, name, seed), folder / f"{name}-{seed}", grid["steps"])


def at_size(recipe, parent, times):
    """`recipe` at the size of the whole model that it has when its targeted layers alone are `times` smaller, or at one
    that is said in bytes.
    """
    if isinstance(times, str):
        return recipe.at(times)
    now = sizes(parent)
    return recipe.at(f"{(now['parameters_dense'] - now['targeted_dense'] * (1 - 1 / times)) / 1e6:f}M")


def cut(grid, name, method, size, folder):
    """`(recipe, task, teacher, model)` of one row of a grid after `prune`, without learning: where healing starts."""
    bench = setting(grid, name, 0, folder).trimmed(grid["methods"][method])
    own = {k: v for k, v in grid["methods"][method].items() if k != "then" and not isinstance(v, list)}
    r = at_size(override(bench.base, own | {"learn.steps": 0}, method), bench.parent, size)
    return r, bench.task, bench.teacher, bench.row(r, {}, until="prune")


def made(bench, own, method, size, factor):
    """`(model, facts)` of one row, healed at `factor` times the rate that heal would take."""
    return healed(bench, started(bench, own, method, size), factor)


def started(bench, own, method, size):
    """`(recipe, model, seconds, heal's rate)` before healing."""
    own, clock = dict(own), {}
    if bits := own.pop("dense", None):
        r, model = override(bench.base, own, method), dense(copy.deepcopy(bench.parent), bits)
    else:
        r = at_size(override(bench.base, own, method), bench.parent, size)
        model = bench.row(r, clock, until="refine")
    rate = r.heal.lr or suitable_rate(model, bench.task, bench.teacher, r.seed)
    if not math.isfinite(rate):
        raise FloatingPointError(f"{method}: what healing would start from is not finite")
    return r, model, clock, rate


def dense(model, bits):
    """The layers of a dense model rounded to so many bits, the table to 8, in place."""
    for name, linear in targets(model).items():
        model.set_submodule(name, RoundedLinear.rounded(linear, bits))
    round_table(model, 8)
    return model


def healed(bench, start, factor):
    """`(model, facts)` of what `started` has made, which stays as it is."""
    r, model, clock, rate = start
    model, clock, task = copy.deepcopy(model), dict(clock), bench.task
    before, lr = response_nll(model, task.validation, task.pad_id), factor * rate
    left = bench.steps - r.learn.steps - r.refine.steps
    model = bench.row(override(r, {"heal.steps": left, "heal.lr": lr}, "heal"), clock, model)
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
    inputs, outputs, seen = second_moments(
        parent, members, task, r.decompose.examples, METRICS["kronecker"], embedding=True
    )
    alone = ({name: inputs[names[0]] for names in members for name in names}, {}, {})
    for own, all_ in zip(alone, (inputs, outputs), strict=False):
        own[TABLE] = all_[TABLE]
    for names in members:
        blocks = outputs[names[0]]
        if len(blocks) < len(names):
            parts = [layers[name].out_features for name in names]
            blocks = [row.split(parts, dim=1)[i] for i, row in enumerate(blocks[0].split(parts))]
        alone[1].update({name: [block] for name, block in zip(names, blocks, strict=True)})
        alone[2].update(dict.fromkeys(names, seen[names[0]]))
    return {True: (inputs, outputs, seen), False: alone}


def quantized(model, width):
    """Round the weights of `model` in place; returns `(its bytes, what was rounded)`.

    width: "int8", one scale a row; "int4", one scale for GROUP weights; any other is bfloat16. In both the token
    embedding, with a head tied to it, is int8, whole or as bases: few bits hurt it most. Scales, and all that is no
    linear layer or table, are bfloat16. A table is stored as the values that stand for its int8, since it looks up rows
    as well.
    """
    if width not in ("int8", "int4"):
        own = [m for m in model.modules() if isinstance(m, RoundedLinear)]
        taken = sum(stored_bytes(m.out_features, m.in_features, m.bits) for m in own)
        return 2 * sum(p.numel() for p in model.parameters() if p.is_floating_point()) + taken, {}
    layers = list(targets(model, required=False).values())
    layers += [m for g in groups(model) for layer in g.layers for m in layer.children()]
    table = table_of(model)
    table = [model.get_input_embeddings()] if table is None else list(table.leader.children())
    inner, outer = (sum(m.weight.numel() for m in part) for part in (layers, table))
    rest = sum(p.numel() for p in model.parameters()) - inner - outer
    if width == "int8":
        config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        taken = inner + 2 * sum(len(m.weight) for m in layers)
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
        taken = inner // 2 + 2 * inner // GROUP
    taken += outer + 2 * sum(len(m.weight) for m in table)
    quantize_(model, config, lambda m, _: m in layers)
    for m in table:
        q, scale = nearest(m.weight.data, 8)
        m.weight.data = q * scale.float()[:, None]
    return 2 * rest + taken, {"layers": width, "embedding and tied head": "int8"}


def rounded(model):
    """`model` with the values its parameters have in a bfloat16 checkpoint, computed with in fp32."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.bfloat16().float()
    return model


def measure(model, task, width):
    """Test NLL item by item and the sizes of `model`, after its weights are `quantized` to `width`, in place."""
    facts = sizes(model)
    facts["bytes"], what = quantized(model, width)
    nll, tokens = response_nlls(model, task.test, task.pad_id)
    if not torch.isfinite(nll).all():
        raise FloatingPointError("a test item has a likelihood that is not finite")
    return {"sizes": facts, "rounded": what, "nll": [round(x, 4) for x in nll.tolist()], "tokens": tokens.tolist()}


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
