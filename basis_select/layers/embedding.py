"""The token embedding, and the head tied to it, as bases: `E = u diag(s) v`, u: (vocabulary, r), v: (r, d), or rounded.

The table is one LowRankLinear, d -> r -> vocabulary, or one RoundedLinear, d -> vocabulary. A tied head is that layer,
the embedding looks up its rows, so both stay one set of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .learning import LearningLinear
from .low_rank import LowRankLinear
from .rounded import RoundedLinear
from .straight_through import RoundingLinear

if TYPE_CHECKING:  # importing transformers imports the format, and with it this module
    from transformers import PreTrainedModel


class TableEmbedding(nn.Module):
    """Drop-in for nn.Embedding over a `table`, registered here unless it is `tied`: then the head owns it.

    `scale` multiplies what is looked up, for models whose embedding module does so (Gemma); 1 for all others.
    """

    def __init__(self, table: LowRankLinear | RoundedLinear, tied: bool, scale: float = 1.0):
        super().__init__()
        if tied:
            self._table = (table,)  # a tuple, so that nn.Module does not register it as a child
        else:
            self.table = table
        self.scale = scale
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features

    tied = property(lambda self: not hasattr(self, "table"))
    bases = property(lambda self: self._table[0] if self.tied else self.table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.rows(ids)
        return y if self.scale == 1 else y * torch.tensor(self.scale, dtype=y.dtype, device=y.device)


class LowRankEmbedding(TableEmbedding):
    """The table is a LowRankLinear."""

    weight = property(lambda self: self.bases.dense_weight(), doc="The dense table (vocabulary, d), made on demand.")

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        bases = self.bases
        plain = nn.Linear | RoundedLinear  # the weights alone are read here
        if not isinstance(bases.u, plain) or not isinstance(bases.v, plain):
            raise ValueError("adapters of the token embedding would train its head alone: target r'.*layers.*\\.(u|v)'")
        u, v = bases.u, bases.v
        if next(u.parameters()).is_meta and not ids.is_meta:
            raise ValueError("the token embedding and the head tied to it cannot be offloaded: name a device for both")
        z = u.rows(ids) if isinstance(u, RoundedLinear | RoundingLinear) else F.embedding(ids, u.weight)
        z = z * bases.s() if isinstance(bases, LearningLinear) else z
        return F.linear(z, (v.rounded_weight() if isinstance(v, RoundingLinear) else v.weight).T)


class RoundedEmbedding(TableEmbedding):
    """The table is a RoundedLinear."""

    weight = property(lambda self: self.bases.weight, doc="The table (vocabulary, d), made on demand.")

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bases.rows(ids)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head's weight is the very parameter of the token embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [m._parameters.get("weight") if isinstance(m, nn.Module) else None for m in (head, embedding)]
    return weights[0] is not None and weights[0] is weights[1]


def settle_ties(model: PreTrainedModel) -> None:
    """Let the config, and transformers' list of tied tensors, say of heads and embeddings what their tensors do."""
    from transformers import PreTrainedModel

    for part in model.modules():
        has_head = isinstance(part, PreTrainedModel) and part._tied_weights_keys and part.get_output_embeddings()
        if has_head and getattr(part.config, "tie_word_embeddings", False) != is_tied(part):
            part.config.tie_word_embeddings = is_tied(part)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def require_apart(model: PreTrainedModel) -> None:
    """Raise ValueError unless the embedding, and a head tied to it, can be other modules.

    It has to look up rows and do no more than scale them. And no more may be tied than these two: transformers ties all
    that an architecture lists or, where the config says so for the two of them, nothing.
    """
    embedding = model.get_input_embeddings()
    if type(embedding).forward is not nn.Embedding.forward and not hasattr(embedding, "embed_scale"):
        raise ValueError(
            f"the embedding is a {type(embedding).__name__}: only an nn.Embedding can be bases or have few bits"
        )
    others = [
        name for name in model.all_tied_weights_keys if model.get_parameter_or_buffer(name) is not embedding.weight
    ]
    if is_tied(model) and others:
        raise ValueError(f"the token embedding cannot change, because {type(model).__name__} ties {others[0]} as well")


def lookup_scale(embedding: nn.Module) -> float:
    """What an embedding that `require_apart` lets through multiplies its rows by."""
    return float(getattr(embedding, "embed_scale", 1.0))


def install(
    model: PreTrainedModel, name: str, rank: int, tied: bool, scale: float = 1.0, weighted: bool = False
) -> LowRankLinear:
    """Replace the embedding `name`, and the head if `tied`, by a table of `rank` bases, uninitialised; returns it."""
    embedding = model.get_submodule(name)
    more = {"device": embedding.weight.device, "dtype": embedding.weight.dtype}
    kind = LearningLinear if weighted else LowRankLinear
    table = kind(embedding.embedding_dim, embedding.num_embeddings, rank, head_bias(model, tied) is not None, **more)
    _put(model, name, LowRankEmbedding(table, tied, scale))
    return table


def install_rounded(model: PreTrainedModel, name: str, bits: int, tied: bool, scale: float = 1.0) -> None:
    """Replace the embedding `name`, and the head if `tied`, by a rounded table, uninitialised."""
    like = model.get_submodule(name).weight
    bias = head_bias(model, tied) is not None
    table = RoundedLinear(like.shape[1], like.shape[0], bias, bits, like.device, like.dtype)
    _put(model, name, RoundedEmbedding(table, tied, scale))


def head_bias(model: PreTrainedModel, tied: bool) -> nn.Parameter | None:
    """The bias of a head that is `tied` to the embedding and dense, which its table takes over; None without one."""
    return model.get_output_embeddings().bias if tied else None


def _put(model: PreTrainedModel, name: str, embedding: TableEmbedding) -> None:
    model.set_submodule(name, embedding)
    if embedding.tied:  # by the modules themselves: transformers would look for a `weight` on both
        table = embedding.bases
        model.set_submodule(module_name(model, model.get_output_embeddings()), table)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        # Both ends of the model read the table, so where FSDP shards, it belongs to the model as a whole.
        ends = name, module_name(model, table)
        model._fsdp_plan = {n: style for n, style in getattr(model, "_fsdp_plan", {}).items() if n not in ends}


@torch.no_grad()
def round_table(model: PreTrainedModel, bits: int) -> None:
    """Round the dense embedding, and the head tied to it, to so many bits, in place."""
    embedding = model.get_input_embeddings()
    scale, weight = lookup_scale(embedding), embedding.weight
    settle_ties(model)
    bias = head_bias(model, is_tied(model))
    like = nn.Linear(*reversed(weight.shape), bias is not None, device="meta", dtype=weight.dtype)
    like.weight, like.bias = nn.Parameter(weight.detach(), requires_grad=False), bias
    table = RoundedEmbedding(RoundedLinear.rounded(like, bits), is_tied(model), scale)
    _put(model, module_name(model, embedding), table)


def set_table(model: PreTrainedModel, table: LowRankLinear) -> None:
    """Give an embedding of bases, and the head tied to it, another table."""
    embedding = model.get_input_embeddings()
    if embedding.tied:
        model.set_submodule(module_name(model, embedding.bases), table)
        embedding._table = (table,)
    else:
        embedding.table = table


@torch.no_grad()
def table_to_dense(model: PreTrainedModel) -> None:
    """Put the equivalent nn.Embedding back, and the head tied to it (no smaller, any tool reads it)."""
    embedding = model.get_input_embeddings()
    if embedding.scale != 1:
        raise ValueError("an embedding that scales what it looks up cannot be written as an nn.Embedding")
    dense = nn.Embedding.from_pretrained(embedding.weight, freeze=True)
    name = module_name(model, embedding)
    if embedding.tied:
        bias = getattr(embedding.bases, "u", embedding.bases).bias
        head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias is not None, device="meta")
        head.weight, head.bias = dense.weight, bias
        model.set_submodule(module_name(model, embedding.bases), head)
        model.config.tie_word_embeddings = True
    model.set_submodule(name, dense)


def module_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)
