"""What a recipe's size means for a model: the fraction of the targeted parameters, and of every layer, that stays."""

import dataclasses

from transformers import MODEL_FOR_MASKED_LM_MAPPING

from ..checkpoint.format import dense_on_meta
from ..decompose import same_input, targets
from ..embedding import module_name
from ..evaluation.profile import prices
from ..linalg.budget import keep_for, linear_prices, table_rank, uniform
from ..models import config_and_tokenizer
from ..moments import MAX_MOMENT
from ..training.data import require_fit


def check_budget(recipe, source, task):
    """Raise ValueError if the model at `source` cannot take the task, or no choice of ranks meets the recipe's size."""
    model = dense_on_meta(config_and_tokenizer(source)[0])
    require_fit(model, task)
    shapes = shapes_of(recipe, model, targets(model), task)
    fraction(recipe, model, shapes)


def require_decoder(config, source):
    """Raise ValueError if `config` is that of an encoder, whose tokens see those after them."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{source} is a {config.model_type} model, which is no decoder: name a causal language model")


def shapes_of(r, model, layers, task):
    members = same_input(model, layers, task) if r.decompose.share else [[n] for n in layers]
    found = [Shape(tuple(g), layers[g[0]].in_features, tuple(layers[n].out_features for n in g)) for g in members]
    if shared_table(r, model):
        table = model.get_input_embeddings()
        vocabulary, d = table.weight.shape
        found.append(Shape((module_name(model, table),), d, (vocabulary,), is_table=True))
    return found


def keep_of(r, model, targeted):
    """The fraction of the `targeted` parameters of a dense model, on any device, that a row of a recipe keeps."""
    total = sum(p.numel() for p in model.parameters())
    shared = targeted + shared_table(r, model)
    return keep_for(total, shared, r.dtype, r.prune.keep, r.prune.size, saved_elsewhere(r, model))


def shared_table(r, model):
    """Parameters of the embedding if it takes its part of the budget of the targeted layers, else 0."""
    joins = r.decompose.embedding and r.prune.keep_embedding is None
    return model.get_input_embeddings().weight.numel() if joins else 0


def saved_elsewhere(r, model):
    """Parameters by which a row makes the embedding smaller."""
    if r.prune.keep_embedding is None:
        return 0
    table = model.get_input_embeddings().weight
    return table_rank(r.prune.keep_embedding, *table.shape, r.prune.multiple_of)[1]


def fraction(r, model, shapes):
    """The fraction of the targeted parameters that stays; 1 where it is an outcome. ValueError if it cannot be met."""
    if r.prune.mass is not None or r.prune.max_drop is not None:
        return 1.0
    if r.prune.latency is not None:
        return fraction_in_time(r, model, shapes)
    keep = keep_of(r, model, sum(g.dense_cost for g in shapes if not g.is_table))
    ranks_for(r, shapes, keep)
    return keep


def fraction_in_time(r, model, shapes):
    """The fraction of the targeted parameters that stays where time is the budget, shared evenly."""
    more = []
    if r.prune.keep_embedding is not None:
        vocabulary, d = model.get_input_embeddings().weight.shape
        more = [((d, (vocabulary,)), table_rank(r.prune.keep_embedding, vocabulary, d, r.prune.multiple_of)[0])]
    reserve = r.extend.rank + r.learn.new
    choices, free = prices(r.prune.costs, r.prune.latency, [(g.reads, g.writes) for g in shapes], reserve, more)
    ranks = uniform([g.rank for g in shapes], [g.share for g in shapes], choices, free, unit="seconds")
    kept = [g.dense_cost if k is None else (k + reserve) * g.basis_cost for g, k in zip(shapes, ranks, strict=True)]
    return sum(kept) / sum(g.dense_cost for g in shapes)


def ranks_for(r, shapes, keep):
    """`{layer: rank}` of what `keep` leaves, the same share of every layer, without those that stay dense."""
    more = r.extend.rank + r.learn.new
    room = int(keep * sum(g.dense_cost for g in shapes)) - more * sum(g.basis_cost for g in shapes if not g.is_table)
    try:
        lines = [linear_prices(g.rank, g.basis_cost, g.dense_cost, r.prune.multiple_of) for g in shapes]
        found = uniform([g.rank for g in shapes], [g.share for g in shapes], lines, room)
    except ValueError as error:
        how = f"prune.keep={r.prune.keep}" if r.prune.size is None else f"prune.size={r.prune.size}"
        raise ValueError(f"{how} with extend.rank={r.extend.rank}: {error}") from None
    kept = [(g, rank) for g, rank in zip(shapes, found, strict=True) if rank is not None]
    return {n: rank if g.is_table else rank + more for g, rank in kept for n in g.names}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Layers that will share one input basis, or the embedding where it takes its part of their budget."""

    names: tuple
    reads: int
    writes: tuple
    is_table: bool = False

    rank = property(lambda self: min(self.reads, sum(self.writes)))
    basis_cost = property(lambda self: self.reads + sum(self.writes))
    dense_cost = property(lambda self: self.reads * sum(self.writes))
    share = property(lambda self: self.basis_cost / self.dense_cost)

    @property
    def square(self):
        """Entries of the output moment."""
        whole = sum(self.writes)
        return whole**2 if whole <= MAX_MOMENT else sum(w * w for w in self.writes if w <= MAX_MOMENT)
