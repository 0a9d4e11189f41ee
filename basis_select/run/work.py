"""What a stage works with in a process: it reads products, lets its verb work, and the first process writes."""

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.checks import is_rounded
from ..checkpoint.fast import ready
from ..checkpoint.files import save
from ..checkpoint.models import config_and_tokenizer, load
from ..checkpoint.targets import targets
from ..data.tasks import Task
from ..data.tuned_on import remember
from ..layers import kernels
from ..sizes import sizes
from ..system import processes
from ..system.machine import fast_bf16
from ..system.writing import replace_text
from ..training.loss import response_nll
from ..training.soft_labels import SoftLabels, Teacher
from .recipe import Recipe

FILES = {"evaluation": "evaluation.json", "speed": "speed.json", "derivatives": "derivatives.safetensors"}


class Work:
    """What a stage's `run` is given: it changes `model`, or puts another model, tokenizer or task in place of what is.

    options: the stage's, as for its key. given: for every product that the stage reads the folder of the stage that
    made it, which is then read once it is asked for, or the product itself. folder: where training leaves its state.
    sharded: the run is; spread: so is the stage's model. facts: what `run` has to say of what it did.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task | None,
        options: dict,
        given: dict,
        folder: Path | None = None,
        sharded: bool = False,
        spread: bool = False,
        group: dist.ProcessGroup | None = None,
    ):
        self.recipe, self.task, self.options, self.given, self.folder = recipe, task, options, given, folder
        self.sharded, self.spread, self.group = sharded, spread, group
        self.facts = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that the stage changes: the first product that it reads."""
        first = self._first()
        return self._load(first)[0] if isinstance(first, Path) else first

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return config_and_tokenizer(self._first() / "model")[1]

    @property
    def parent(self) -> PreTrainedModel:
        return self._read("parent", lambda folder: load_here(folder / "model")[0])

    @property
    def teacher(self) -> Teacher:
        """The dense parent as it teaches, or what it says of the examples that are seen."""
        holder = "teacher" if "teacher" in self.given else "parent"
        return self._read(holder, lambda folder: load_teacher(folder, self.recipe.teacher, self.sharded))

    @property
    def derivatives(self) -> list | None:
        """What `derivatives` returns, None where its stage was left out."""
        return self._read("derivatives", read_derivatives) if "derivatives" in self.given else None

    def moments(self) -> tuple | None:
        """Second moments that somebody else has, None where `decompose` has to find its own."""
        return self.given["moments"](self.recipe) if "moments" in self.given else None

    def fresh(self) -> PreTrainedModel:
        """Another copy of the model, of which nobody has used anything."""
        return load_here(self._first() / "model", None, self.spread)[0]

    def finals(self) -> dict:
        """The published models of all rows, by name."""
        return {name: self._to_time(folder) for name, folder in self.given.items()}

    def only(self, examples: list[int]) -> Task:
        """The task with these of its training examples."""
        return dataclasses.replace(self.task, train=[self.task.train[i] for i in examples])

    def _first(self) -> Any:
        return next(iter(self.given.values()))

    def _load(self, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if "final" in self.given:
            return self._load_final(folder)
        return load_here(folder / "model", None, self.spread)

    def _load_final(self, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """In fp32 where the device would only emulate the checkpoint's dtype: the values are the same."""
        native = self.recipe.dtype == "bfloat16" and fast_bf16(processes.device())
        return load_here(folder / "model", None if native else "float32")

    def _to_time(self, folder: Path) -> PreTrainedModel:
        """As `load(fast=True)` makes it, but not compiled, which would take longer than what is timed.

        What is rounded has kernels for 16 bits, even where the device has no such units.
        """
        rounded = is_rounded(folder / "model")
        model = (load_here(folder / "model") if rounded else self._load_final(folder))[0]
        if model.device.type == "cpu" and not kernels.try_load("it is timed without"):
            return model
        return ready(model, compiled=False)

    def _read(self, product: str, read: Callable[[Path], Any]) -> Any:
        found = self.given[product]
        return read(found) if isinstance(found, Path) else found


def write(work: Work, product: str, made: Any, folder: Path, alone: bool) -> dict:
    """Write what a stage has made into its folder; what there is to say of it. All processes call this unless `alone`.

    made: what its `run` returned, None if it has changed `work.model`.
    """
    if product == "teacher":
        made.save(folder)
    elif product == "derivatives":
        tensors = {f"{i:04}.{name}": d for i, pair in enumerate(made) for name, d in zip("gh", pair, strict=True)}
        save_file(tensors, folder / FILES[product])
    elif product in FILES:
        replace_text(folder / FILES[product], json.dumps(made, indent=1))
    else:
        return work.facts | _write_model(work, work.recipe.dtype if product == "final" else None, folder, alone)
    return work.facts


def _write_model(work: Work, dtype: str | None, folder: Path, alone: bool) -> dict:
    model, task, published = work.model, work.task, dtype is not None
    if task and not published:
        remember(model, task.train, task.validation)
    save(model, work.tokenizer, folder / "model", dtype)
    if not alone:
        processes.barrier()
    if work.spread:  # anew, because FSDP stays with the dtype in which a model was first used
        model, _ = load_here(folder / "model", None, True)
    if processes.index() and not work.spread:
        return {}
    facts = {"sizes": sizes(model, folder / "model")}
    if task and not published:
        facts = {"validation_nll": response_nll(model, task.validation, task.pad_id), **facts}
    return facts


def read_derivatives(folder: Path) -> list:
    """What `derivatives` returned when its stage was done."""
    tensors = load_file(folder / FILES["derivatives"])
    return [(tensors[f"{i:04}.g"], tensors[f"{i:04}.h"]) for i in range(len(tensors) // 2)]


def load_here(
    source: str | Path, dtype: str | None = None, shard: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load` onto the device where this process computes: every model that a stage runs comes so."""
    model, tokenizer = load(source, dtype, sharded=shard)
    return model if shard else model.to(processes.device()), tokenizer


def load_teacher(parent: Path, dtype: str, shard: bool) -> Teacher:
    """The dense parent as it teaches; int8: its linear layers' weights, a scale for every row, the rest bfloat16.

    A stage that has what it says in place of it: that.
    """
    if not (parent / "model").exists():
        return SoftLabels.load(parent)
    if dtype != "int8":
        return load_here(parent / "model", dtype, shard)[0]
    if shard:
        raise ValueError("teacher=int8 cannot be spread over processes: with --shard choose bfloat16")
    try:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis
    except ImportError:
        raise ValueError("teacher=int8 needs torchao: install it or choose bfloat16") from None
    model, _ = load_here(parent / "model", "bfloat16")
    layers = set(targets(model).values())
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, config, lambda module, name: module in layers)
    return model
