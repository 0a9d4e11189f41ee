"""What is known where a stage of a recipe begins: the same on disk, in a plan and in memory."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..checkpoint.targets import targets
from ..data.tasks import Task
from ..layers.embedding import module_name
from ..layers.group import Group
from . import room
from .recipe import SECTIONS, Recipe


def own(section: Any) -> dict:
    """The options of one section of a recipe, or all of it, as plain values."""
    return dataclasses.asdict(section)


def rebuilt(values: dict) -> Recipe:
    """The recipe of these plain values, as which it is sent: its sections' classes, made at run time, do not pickle."""
    return Recipe(**{name: SECTIONS[name](**value) if name in SECTIONS else value for name, value in values.items()})


@dataclass
class View:
    """One row of a recipe where a stage begins.

    source: what tells one state of the recipe's model from another. Before the model is loaded `task`, its examples as
    tokens, and `parent`, the dense model so far on the meta device, are None. `dense`: nothing is decomposed yet.
    """

    recipe: Recipe
    source: dict
    tokenizer: object = None
    task: Task | None = None
    parent: torch.nn.Module | None = None
    dense: bool = True

    @cached_property
    def layers(self) -> dict:
        """`{name: linear layer}` of those that are decomposed."""
        return targets(self.parent, required=False)

    @cached_property
    def groups(self) -> list[Group]:
        """The dense Group of every set of layers that will share an input basis."""
        return room.groups_of(self.recipe, self.parent, self.layers, self.task)

    @cached_property
    def keep(self) -> float:
        """The fraction of the targeted parameters that stays; 1 where that is an outcome."""
        return room.fraction(self.recipe, self.parent, self.groups)

    @cached_property
    def total(self) -> int:
        """Parameters of the dense parent."""
        return sum(p.numel() for p in self.parent.parameters())

    @cached_property
    def linears(self) -> int:
        """Parameters of the layers that are decomposed."""
        return sum(m.weight.numel() for m in self.layers.values())

    @cached_property
    def targeted(self) -> int:
        """Parameters that share the recipe's size: those of the layers, and of an embedding that joins them."""
        return self.linears + (0 if self.dense else room.shared_table(self.recipe, self.parent))

    @cached_property
    def published(self) -> float:
        """Parameters of the whole model that the row ends with."""
        if self.dense:
            return self.total
        return self.total - (1 - self.keep) * self.targeted - room.saved_elsewhere(self.recipe, self.parent)

    @property
    def cuts(self) -> dict:
        """How far `learn` prunes: to the smallest of the recipe's sizes. Nothing where the size is yet to be found."""
        r = self.recipe
        if not r.learn.rounds or r.prune.max_drop is not None or r.prune.latency is not None:
            return {}
        how = {k: getattr(r.prune, k) for k in ("budget", "score", "multiple_of")} | {"reserve": r.extend.rank}
        if r.prune.mass is not None:
            return {"mass": r.prune.mass, **how}
        rows = (r, *r.family().values())
        return {"keep": min(room.keep_of(row, self.parent, self.layers) for row in rows), **how}

    def bases(self, ranks: dict, cut: bool = False, **more: Any) -> dict:
        """What checkpoint/format.py needs to build the model of this row with these ranks, after pruning if `cut`."""
        r = self.recipe
        names = [[n for n in g.names if n in ranks] for g in self.groups if not room.is_table(g)]
        layers = {n: ranks[n] for group in names for n in group}
        found = {"ranks": layers, "groups": [g for g in names if len(g) > 1], **more}
        if r.decompose.embedding:
            table = self.parent.get_input_embeddings()
            name, rank = module_name(self.parent, table), min(table.weight.shape)
            if cut and r.prune.keep_embedding is not None:
                rank = room.rank_of_table(r, self.parent)
            elif cut:
                rank = ranks.get(name)
            if rank is not None:
                tied = self.parent.get_output_embeddings().weight is table.weight
                found["embedding"] = {"name": name, "rank": rank, "tied": tied}
        return found
