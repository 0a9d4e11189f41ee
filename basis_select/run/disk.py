"""Stages on disk: each reads the folders of others and leaves one, `stages/NAME-KEY`.

KEY is a digest of the stage's options and of everything upstream. A folder appears by rename when it is whole, so
whatever is there is done: a killed run continues with the same command, a changed option repeats only what depends on
it, and compared rows share the stages that they have in common. State passes between stages only through disk, which
makes a resumed run bit-identical to an undisturbed one.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, set_seed

from ..checkpoint.checks import weight_hash
from ..checkpoint.format import dense_on_meta
from ..checkpoint.models import config_and_tokenizer
from ..data.tasks import Task
from ..system import processes
from ..system.machine import environment, forget_peak_memory, peak_memory
from ..system.reading import read_lines
from ..system.writing import replace_text, settle
from .directory import fingerprint, require_disk
from .recipe import Recipe
from .room import in_tokens, require_decoder
from .stages import COPIES, ONE, SPREAD, STAGES, TIME, Stage, key, walk
from .terminal import Progress, Silent
from .view import View, own, rebuilt
from .work import Work, write

KEPT = ("training", "metrics.jsonl")  # of a stage that was killed: from these its training continues


class OnDisk:
    """The stages of a recipe and its rows, in `folder`; a state of a row is a dict of folders of finished stages.

    shard: spread parent and model over all processes where a stage can. more: products that stages may use instead of
    computing their own, none of which changes what they make: `moments`, a function of a row's recipe.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, shard: bool = False, progress: Silent | Progress | None = None, **more: Any
    ):
        self.recipe, self.folder, self.shard, self.more = recipe, Path(folder), shard and processes.count() > 1, more
        self.progress = progress or Silent()
        self.views, self.parents, self.tasks, self.keys = {}, {}, {}, {}

    def row(self, recipe: Recipe | None = None, dense: bool = False, until: str | None = None) -> dict:
        """The state of a row, of the recipe itself if none is named, behind the stage `until` or behind all."""
        return walk(recipe or self.recipe, self, dense=dense, until=until)

    def parent(self) -> dict:
        """The state of the parent's row, before it is published."""
        return walk(self.recipe, self, dense=True, until="decompose")

    def view(self, row: Recipe, state: dict, dense: bool = False) -> View:
        at = id(row), state.get("parent"), state.get("tokenizer"), dense
        if at not in self.views:
            tokenizer, task = self.tokens(state.get("tokenizer"))
            parent = self.on_meta(state["parent"]) if "parent" in state else None
            self.views[at] = View(row, self.source, tokenizer, task, parent, dense)
        return self.views[at]

    def do(self, stage: Stage, view: View, options: dict, read: dict) -> Path:
        """The folder of a finished stage; it is done now, unless it is there already."""
        data = self.data_key(view.task) if read else None
        target = self.folder / "stages" / key(stage, options, [folder.name for folder in read.values()], data)
        if target.exists():
            self.progress.reuse(stage, target.name)
            return target
        self.progress.begin(stage, target.name, view)
        require_disk(target.parent, read.values())
        partial = target.with_name(f".{target.name}")
        _prepare(partial)
        forget_peak_memory()
        began = time.monotonic()
        facts = {"stage": stage.name, "options": options, "upstream": [folder.name for folder in read.values()]}
        facts |= {"made_with": environment(), **self._perform(stage, view, options, read, partial)}
        facts |= {"seconds": round(time.monotonic() - began, 2), "peak_memory_bytes": peak_memory()}
        if (partial / "model").exists():
            facts["weights_sha256"] = weight_hash(partial / "model")
        replace_text(partial / "stage.json", json.dumps(facts, indent=1))
        shutil.rmtree(partial / "training", ignore_errors=True)
        settle(partial)
        partial.rename(target)
        _collect_metrics(self.folder)
        self.progress.end(stage, facts)
        return target

    def time(self, states: dict) -> Path:
        """The folder with the speed of all rows, `{name: state}`, that of the parent first."""
        view = self.view(self.recipe, next(iter(states.values())), dense=True)
        return self.do(TIME, view, {}, {name: state["final"] for name, state in states.items()})

    def _perform(self, stage: Stage, view: View, options: dict, read: dict, out: Path) -> dict:
        where = stage.processes(view.recipe, self.shard)
        row, given = own(view.recipe), {**read, **self.more}
        arguments = (*STAGES, TIME).index(stage), row, options, given, out, self.shard, where
        if where == ONE:
            return perform(view.task, *arguments)
        sendable = dataclasses.replace(view.task, score=None)  # functions of its own cannot be sent
        return processes.everywhere(perform, sendable, *arguments)

    def tokens(self, folder: Path | None) -> tuple:
        """`(tokenizer, task)` of the stage that made the tokenizer; no stage, neither."""
        if folder not in self.tasks:
            tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False) if folder else None
            original = next((task for _, task in self.tasks.values() if task), None)
            self.tasks[folder] = tokenizer, in_tokens(self.recipe, tokenizer, original) if folder else None
        return self.tasks[folder]

    def on_meta(self, folder: Path) -> PreTrainedModel:
        """The dense parent in the folder of a stage, without its weights."""
        if folder not in self.parents:
            self.parents[folder] = dense_on_meta(config_and_tokenizer(folder / "model")[0])
        return self.parents[folder]

    def data_key(self, task: Task) -> str:
        """`data_key`, computed once for a task."""
        if id(task) not in self.keys:
            self.keys[id(task)] = data_key(self.recipe, task)
        return self.keys[id(task)]

    @cached_property
    def source(self) -> dict:
        """What tells one state of the model from another: contents of local files, the revision of one on the hub.

        Raises ValueError if it is an encoder.
        """
        model = self.recipe.model
        config, _ = config_and_tokenizer(model)
        require_decoder(config, model)
        return {"model": model, "revision": getattr(config, "_commit_hash", None), "files": fingerprint(model)}


def data_key(recipe: Recipe, task: Task) -> str:
    """A digest of the examples themselves, however their source was edited, and of how they are scored."""
    splits = task.train, task.validation, task.test
    examples = [[(e.prompt, e.response, e.answer, e.input_ids, e.start, e.spelled) for e in split] for split in splits]
    data = [recipe.task, recipe.seed, own(recipe.data), examples, task.stops]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def perform(
    task: Task | None, place: int, row: dict, options: dict, given: dict, out: Path, sharded: bool, where: str
) -> dict:
    """Do stage number `place` in this process, and write what it makes into `out`; facts of it.

    row: the plain values of a recipe. Arguments are pickled and sent to all processes unless `where` is ONE.
    """
    recipe = rebuilt(row)
    set_seed(recipe.seed)
    stage, spread = (*STAGES, TIME)[place], sharded and where == SPREAD
    group = processes.everyone() if where == COPIES else None
    work = Work(recipe, task, options, given, out, sharded, spread, group)
    return write(work, stage.makes[0], stage.run(work), out, alone=where == ONE)


def _prepare(partial: Path) -> None:
    """An empty folder but for what training left there to be continued."""
    partial.mkdir(exist_ok=True)
    for path in partial.iterdir():
        if path.is_dir() and path.name not in KEPT:
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()


def _collect_metrics(folder: Path) -> None:
    lines = []
    for path in sorted(folder.glob("stages/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime):
        lines += [json.dumps({"stage": path.parent.name, **row}) for row in read_lines(path)]
    replace_text(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))
