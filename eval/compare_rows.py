"""How a row of compare.py is made: what all rows of a task and a seed share, the choice of rates, start, healing."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import forms
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from basis_select.checkpoint.targets import targets
from basis_select.decompose import decompose
from basis_select.evaluation.accuracy import generated
from basis_select.heal import distance, heal, probes, rate_at
from basis_select.layers import straight_through
from basis_select.layers.embedding import round_table
from basis_select.layers.group import groups, table_of
from basis_select.layers.rounded import quantized
from basis_select.linalg.metrics import METRICS
from basis_select.refine import blocks
from basis_select.run.disk import OnDisk
from basis_select.run.recipe import Recipe, override
from basis_select.run.stages import walk
from basis_select.run.view import own as options_of
from basis_select.run.work import Work, load_here, read_derivatives
from basis_select.statistics.moments import TABLE, second_moments
from basis_select.statistics.readers import same_input
from basis_select.system.writing import replace_text
from basis_select.training.loss import response_nll
from basis_select.training.soft_labels import SoftLabels, seen, soft_labels

# Keys of a method, no recipe's.
OWN = ("answered", "blind", "dense", "dropped", "first", "forms", "learned", "shipped", "sizes", "trained")

ALIKE = 32  # examples with responses of about one length, which the parent answers together


def alone(home, what):
    """A lock on something in the folder `home`; entering it raises Timeout where another process holds it."""
    (home / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(home / "locks" / f"{plain(what)}.lock", timeout=0)


def plain(name):
    """A name as part of the name of a file."""
    return re.sub(r"\W+", "_", name)


class Bench:
    """What all rows of one task and seed have in common.

    Parents and decompositions are stages on disk in the folder `home`; all later ones run in memory, because rows are
    many and each is done in minutes.
    """

    def __init__(self, base: Recipe, home: Path, tokens: int, steps: int):
        self.base, self.home, self.tokens = base, home, tokens
        self.disk = OnDisk(base, home, moments=self.moments_for)
        with alone(home, "stages"):
            (home / "stages").mkdir(parents=True, exist_ok=True)
            self.tuned, self.state = self.disk.row(until="tune"), self.disk.row(until="trim")
            view = self.disk.view(base, self.state)
            self.tokenizer, self.task = view.tokenizer, view.task
            self.parent = load_here(self.state["parent"] / "model")[0]
            self.trained_on = self._trained_on(max(steps, self.steps(tokens)))
            self.labels = self._labels(self.trained_on)

    def _trained_on(self, steps: int) -> list[int]:
        """Indices of the training examples that so many steps see, of learning, of healing, and of healing twice."""
        r, task = self.base, self.task
        found = seen(task, r.learn.batch_size, steps, r.seed)
        for seed in (r.seed, r.seed + 1):
            found.update(probes(task, seed), seen(task, r.heal.batch_size, steps, seed + 1))
        return sorted(found)

    def for_method(self, own: dict) -> "Bench":
        """That of a method with keys of its `own`."""
        return self._answered if own.get("answered") else self

    @functools.cached_property
    def _answered(self) -> "Bench":
        """The same, where the parent's own answers stand in place of every second response that healing sees."""
        other, train = copy.copy(self), list(self.task.train)
        path = self.home / f"answers-{self._digest(self.trained_on)}.json"
        own = sorted(self.trained_on[::2], key=lambda i: len(train[i].response))
        if not path.exists():
            texts = []
            for at in range(0, len(own), ALIKE):  # `generated` goes on until the longest answer may have ended
                alike = [train[i] for i in own[at : at + ALIKE]]
                texts += generated(self.parent, self.tokenizer, self.task, alike)
            replace_text(path, json.dumps(texts))
        for i, text in zip(own, json.loads(path.read_text(encoding="utf-8")), strict=True):
            train[i] = answered(train[i], text, self.tokenizer)
        other.task = dataclasses.replace(self.task, train=train)
        other.labels = other._labels(other._trained_on(other.steps(self.tokens)), "-answers")
        return other

    def _digest(self, examples: list[int]) -> str:
        return hashlib.sha256(repr(examples).encode()).hexdigest()[:10]

    def _labels(self, examples: list[int], of: str = "") -> SoftLabels:
        """What the parent says of these examples; `home` keeps it."""
        folder = self.home / f"labels-{self.state['parent'].name}-{self._digest(examples)}{of}"
        if not folder.exists():
            task = dataclasses.replace(self.task, train=[self.task.train[i] for i in examples])
            with tempfile.TemporaryDirectory(dir=self.home) as place:
                soft_labels(self.parent, task).save(place)
                Path(place).rename(folder)
                Path(place).mkdir()
        return SoftLabels.load(folder)

    @functools.cached_property
    def moments(self):
        return all_moments(self.parent, self.task, self.base)

    def moments_for(self, r):
        """What `decompose` is given: None for a metric that needs no second moments, or others."""
        uses = METRICS[r.decompose.metric]
        return None if uses.squares or uses == METRICS["plain"] else self.moments[r.decompose.share]

    def steps(self, tokens: int) -> int:
        """Of healing, on batches of the base's size, that see so many tokens."""
        mean = statistics.fmean(len(e.input_ids) for e in self.task.train)
        return math.ceil(tokens / (mean * self.base.heal.batch_size))

    def weighted(self, r):
        """The last stage of row `r` that is on disk, and what it has made: the model as weighted bases."""
        after = "decompose" if r.learn.steps else "derivatives"
        with alone(self.home, "stages"):
            folders = self.disk.row(r, until=after)
        state = {"model": load_here(folders["model"] / "model")[0]}
        if "derivatives" in folders:
            state["derivatives"] = read_derivatives(folders["derivatives"])
        return after, state

    def row(self, r, clock, model=None, after="refine", until="heal"):
        """The model of row `r` behind the stage `until`, from `model`, as it is behind `after`, or from disk."""
        state = {"model": model}
        if model is None:
            after, state = self.weighted(r)
        state |= {"parent": self.parent, "teacher": self.labels}
        runner = InMemory(lambda row, *_: dataclasses.replace(self.disk.view(row, self.state), task=self.task), clock)
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


def choose(bench, own, method, ladder):
    """What a row says of its choice, by NLL on the validation split: `chosen` values of recipe keys, `heal` times its
    rate, `chosen_at` which size and length, and all `candidates`."""
    lists = {key: value for key, value in own.items() if isinstance(value, list) and key not in OWN}
    if lists and not ladder:
        raise ValueError(
            f"{method} lists candidates of {', '.join(lists)}: name in `choose` the size and tokens to choose them at"
        )
    options = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    factors, found = ladder["heal"] if ladder else [1], []
    if len(options) * len(factors) == 1:
        return {"chosen": options[0], "heal": factors[0], "candidates": []}
    size, steps = ladder["size"], bench.steps(ladder["trained"])
    for chosen in options:
        start = finite(started, bench, own | chosen, method, None if "dense" in own else size, steps)
        for factor in factors:
            end = start and finite(healed, bench, start, factor)
            nll = end[1]["validation_nll"]["healed"] if end else math.nan
            nll = round(nll, 4) if math.isfinite(nll) else None
            logging.warning("%s, %s, heal %g times: validation NLL %s", method, chosen, factor, nll)
            kl, lr = (round(start.far, 4), factor * start.lr) if start else (None, None)
            found.append({**chosen, "heal": factor, "kl": kl, "lr": lr, "validation_nll": nll})
    best = min(found, key=lambda c: math.inf if c["validation_nll"] is None else c["validation_nll"])
    if best["validation_nll"] is None:
        raise FloatingPointError(f"none of the rates of {method} leaves a finite loss: {found}")
    at = {key: ladder[key] for key in ("size", "trained")}
    return {"chosen": {key: best[key] for key in lists}, "heal": best["heal"], "chosen_at": at, "candidates": found}


def finite(verb, *args):
    """What `verb` returns, None where its loss does not stay finite: a rate that is too large is a result."""
    try:
        return verb(*args)
    except FloatingPointError as error:
        logging.warning("%s", error)
        return None


class Start(NamedTuple):
    """What healing starts from; far: nats to the parent, lr: what heal would take by itself, taken: steps by stage,
    blind: whether it heals as if nothing were rounded.
    """

    recipe: Recipe
    model: PreTrainedModel
    clock: dict
    far: float
    lr: float
    taken: dict
    blind: bool


def started(bench, own, method, size, steps):
    """The Start of a row before healing, which takes what other stages have left of `steps`."""
    clock, learned = {}, round(own.get("learned", 0) * steps)
    r = override(bench.base, {k: v for k, v in own.items() if k not in OWN}, method)
    r = override(r, {"learn.steps": learned, "heal.steps": steps - learned - r.refine.steps * (steps > 0)}, method)
    taken = {stage: getattr(r, stage).steps for stage in ("learn", "refine", "heal")}
    if bits := own.get("dense"):
        model = copy.deepcopy(bench.parent) if bits == 16 else dense(bench.weighted(r)[1]["model"], bits)
    else:
        r, model = r.at(size), None
        if first := own.get("first"):
            r = override(r, {"heal.steps": r.heal.steps - r.heal.steps // 2}, method)
            model = cut_before(bench, r, first, clock)
        elif count := own.get("dropped"):
            model = decompose(without_blocks(bench, count), bench.task, **options_of(r.decompose))
        with forms.only(own.get("forms", "all")):
            model = bench.row(r, clock, model, after="derivatives", until="refine" if steps else "prune")
    far = distance(model, bench.task, bench.labels, r.seed)
    if not math.isfinite(far):
        raise FloatingPointError(f"{method}: what healing would start from is not finite")
    torch.cuda.empty_cache()  # moments took half of what was free
    blind = own.get("blind", False)
    return Start(r, model, clock, far, r.heal.lr or rate_at(far, bool(quantized(model)) and not blind), taken, blind)


def cut_before(bench, r, size, clock):
    """The model that is cut a second time: cut to `size` in 16 bits, healed as long as `r` says, decomposed anew."""
    before = override(r, {"prune.bits": 16}, "first").at(size)
    model = bench.row(before, clock, until="refine")
    others = r.seed + 1  # batches, than the second time
    heal(model, bench.task, bench.labels, seed=others, **options_of(r.heal))
    for group in groups(model):
        group.to_dense(model)
    return decompose(model, bench.task, **options_of(r.decompose))


def without_blocks(bench, count):
    """The parent without those `count` blocks one after the other, of its later half, that the validation split misses
    least."""
    last = len(blocks(bench.parent)) - count
    found = {start: without(bench.parent, start, count) for start in range(last // 2, last + 1)}
    task = bench.task
    nll = {start: response_nll(model, task.validation, task.pad_id) for start, model in found.items()}
    best = min(nll, key=nll.get)
    logging.warning("without blocks from %d on: validation NLL %s", best, nll)
    return copy.deepcopy(found[best])


def without(model, start, count):
    """A model without some of its blocks that has its parameters in common with `model`."""
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    rest = blocks(made)
    del rest[start : start + count]
    for i, block in enumerate(rest):
        for m in block.modules():
            if hasattr(m, "layer_idx"):
                m.layer_idx = i
    config = made.config.get_text_config()
    config.num_hidden_layers = len(rest)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:start] + kinds[start + count :]
    return made


def answered(example, text, tokenizer):
    """A training example with another response, after the same tokens."""
    whole = tokenizer.decode(example.input_ids[example.start :], skip_special_tokens=True)
    lead = whole.removesuffix(example.response) if whole.endswith(example.response) else ""
    ids = tokenizer.encode(lead + text, add_special_tokens=False)
    ids = (*example.input_ids[: example.start], *ids, tokenizer.eos_token_id)
    return dataclasses.replace(example, response=text, input_ids=ids)


def dense(model, bits):
    """A model of weighted bases with layers that are dense again, in place, rounded to so many bits, its table to 8."""
    for group in (*groups(model), table_of(model)):
        if group is not None:
            group.to_dense(model, bits)
    round_table(model, 8)
    return model


def healed(bench, start, factor):
    """`(model, facts)` of what `started` has made, which stays as it is."""
    r, task, lr = start.recipe, bench.task, factor * start.lr
    model, clock = copy.deepcopy(start.model), dict(start.clock)
    before = after = response_nll(model, task.validation, task.pad_id)
    if r.heal.steps:
        with unrounded() if start.blind else contextlib.nullcontext():
            model = bench.row(override(r, {"heal.lr": lr}, "heal"), clock, model)
        after = response_nll(model, task.validation, task.pad_id)
    return model, {
        "validation_nll": {"unhealed": before, "healed": after},
        "lr": lr,
        "steps": start.taken,
        "seconds": clock,
        "device": str(model.device),
    }


@contextlib.contextmanager
def unrounded():
    """Within it, rounded weights train as if they were not, and end as the nearest of the same scales."""
    plain = mock.Mock(apply=lambda weight, scale, bits, dtype: weight.to(dtype))
    with mock.patch.object(straight_through, "_Rounding", plain):
        yield


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
