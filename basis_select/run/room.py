"""What a recipe's size means for a model: the fraction of the targeted parameters, and of every layer, that stays."""

import dataclasses
from pathlib import Path

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from ..bits import allowed, can_round, largest_share, require, room_for
from ..checkpoint.format import dense_on_meta
from ..checkpoint.models import config_and_tokenizer
from ..checkpoint.targets import targets
from ..data.tasks import Task, counted_as, load_task
from ..layers.embedding import module_name
from ..layers.group import Group
from ..linalg.budget import table_rank, uniform
from ..selection import Rule, even_ranks
from ..statistics.readers import dense_groups
from ..target import BYTES
from ..times import prices
from ..training.data import require_fit
from ..trim import trim, trimmed_away
from .recipe import Recipe


def check_budget(recipe: Recipe, source: str | Path, task: Task) -> None:
    """Raise ValueError if the model at `source` cannot take the task, or no choice of ranks meets the recipe's size."""
    config, tokenizer = config_and_tokenizer(source)
    model = dense_on_meta(config)
    require_fit(model, task)
    if recipe.trim.tokens != "all":
        model, _, task, _ = trimmed(recipe, model, tokenizer, task)
    fraction(recipe, model, groups_of(recipe, model, targets(model), task))


def in_tokens(r: Recipe, tokenizer: PreTrainedTokenizerBase, original: Task | None = None) -> Task:
    """The task of a recipe in the tokens of `tokenizer`; NLL is per token of the `original`, of an untrimmed one."""
    task = load_task(r.task, tokenizer, r.seed, **dataclasses.asdict(r.data))
    return counted_as(task, original) if original else task


def trimmed(
    r: Recipe, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, Task, dict]:
    """`(model, tokenizer, task, report)` behind `trim`, the model changed in place and on any device."""
    model, tokenizer, report = trim(model, tokenizer, task, **dataclasses.asdict(r.trim))
    return model, tokenizer, in_tokens(r, tokenizer, task), report


def require_decoder(config: PreTrainedConfig, source: str) -> None:
    """Raise ValueError if `config` is that of an encoder, whose tokens see those after them."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{source} is a {config.model_type} model, which is no decoder: name a causal language model")


def groups_of(r: Recipe, model: torch.nn.Module, layers: dict, task: Task) -> list[Group]:
    """Dense Groups of what will be bases that share a budget: the embedding too where it takes its part of theirs."""
    found = dense_groups(model, layers, task, r.decompose.share)
    return [*found, dense_table(model)] if shared_table(r, model) else found


def dense_table(model: torch.nn.Module) -> Group:
    """The dense token embedding as a Group."""
    table = model.get_input_embeddings()
    return Group((module_name(model, table),), (table,))


def is_table(group: Group) -> bool:
    return isinstance(group.layers[0], torch.nn.Embedding)


def keep_of(r: Recipe, model: torch.nn.Module, layers: dict) -> float:
    """The fraction of the parameters of `layers`, `{name: layer}` of a dense model on any device, that a row keeps."""
    if r.prune.bits == "auto":
        require(r.asked, Rule(r.prune.budget, r.prune.score, reserve=r.extend.rank + r.learn.new), r.dtype)
        return largest_share(model, layers, r.asked, r.dtype, bool(shared_table(r, model)))
    away = trimmed_away(model)
    total = sum(p.numel() for p in model.parameters()) + away
    targeted = sum(m.weight.numel() for m in layers.values())
    return r.asked.share(total, targeted + shared_table(r, model), r.dtype, saved_elsewhere(r, model) + away)


def shared_table(r: Recipe, model: torch.nn.Module) -> int:
    """Parameters of the embedding if it takes its part of the budget of the targeted layers, else 0."""
    joins = r.decompose.embedding and r.prune.keep_embedding is None
    return model.get_input_embeddings().weight.numel() if joins else 0


def bytes_of(r: Recipe, model: torch.nn.Module, parameters: float) -> float:
    """Bytes on disk of what a row publishes, a model of so many parameters."""
    return parameters * BYTES[r.dtype] if r.prune.bits == 16 else allowed(model, r.asked, r.dtype)


def rank_of_table(r: Recipe, model: torch.nn.Module) -> int:
    """How many bases of the embedding a row keeps where that is said apart."""
    return table_rank(r.prune.keep_embedding, dense_table(model).shape, r.prune.multiple_of)


def saved_elsewhere(r: Recipe, model: torch.nn.Module) -> int:
    """Parameters by which a row makes the embedding smaller."""
    if r.prune.keep_embedding is None:
        return 0
    shape = dense_table(model).shape
    return shape.dense_cost - shape.deployed(rank_of_table(r, model))


def fraction(r: Recipe, model: torch.nn.Module, groups: list[Group]) -> float:
    """The fraction of the targeted parameters that stays; 1 where it is an outcome. ValueError if it cannot be met."""
    if r.asked.name in ("mass", "max_drop"):
        return 1.0
    if r.asked.name == "latency":
        return fraction_in_time(r, model, groups)
    keep = keep_of(r, model, {name: layer for g in groups if not is_table(g) for name, layer in g.items()})
    if r.prune.bits == "auto":
        own, table = [g for g in groups if not is_table(g)], r.decompose.embedding
        room_for(model, own, r.asked, r.prune.multiple_of, r.dtype, table or can_round(model), table)
        return keep
    ranks_for(r, groups, keep)
    return keep


def fraction_in_time(r: Recipe, model: torch.nn.Module, groups: list[Group]) -> float:
    """The fraction of the targeted parameters that stays where time is the budget, shared evenly."""
    more = [] if r.prune.keep_embedding is None else [(dense_table(model).shape, rank_of_table(r, model))]
    shapes, reserve = [g.shape for g in groups], r.extend.rank + r.learn.new
    choices, free = prices(r.prune.costs, r.asked, shapes, reserve, more)
    ranks = uniform(shapes, [s.full_rank for s in shapes], choices, free, unit="seconds")
    kept = [s.dense_cost if k is None else (k + reserve) * s.basis_cost for s, k in zip(shapes, ranks, strict=True)]
    return sum(kept) / sum(s.dense_cost for s in shapes)


def ranks_for(r: Recipe, groups: list[Group], keep: float) -> dict[str, int]:
    """`{layer: rank}` of what `keep` leaves, the same share of every layer, without those that stay dense."""
    more = r.extend.rank + r.learn.new
    later = more * sum(g.shape.basis_cost for g in groups if not is_table(g))
    room = int(keep * sum(g.shape.dense_cost for g in groups)) - later
    try:
        found = even_ranks([g.shape for g in groups], room, r.prune.multiple_of)
    except ValueError as error:
        beside = f" with extend.rank={r.extend.rank}" if r.extend.rank else ""
        raise ValueError(f"prune.{r.asked}{beside}: {error}") from None
    kept = [(g, rank) for g, rank in zip(groups, found, strict=True) if rank is not None]
    return {n: rank if is_table(g) else rank + more for g, rank in kept for n in g.names}
