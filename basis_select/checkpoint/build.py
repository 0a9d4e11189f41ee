"""What a checkpoint's description (format.py) makes of a stock model: layers of the kinds and ranks that it lists.

Nothing here, nor what it imports, may import transformers: transformers' own import asks for format.py.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from ..layers.embedding import TableEmbedding, install, install_rounded
from ..layers.group import Group, groups
from ..layers.learning import LearningLinear
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear
from ..layers.split import split
from .earlier import Version2Linear, forget_costs

if TYPE_CHECKING:
    from .format import BasisSelectConfig


def build(model: nn.Module, config: "BasisSelectConfig") -> None:
    """Replace the listed nn.Linear layers by LowRankLinear of the listed ranks, weights uninitialised.

    Raises ValueError, naming the layer, if the model cannot have such layers.
    """
    leaders = _leaders(config)
    built, kind = {}, LearningLinear if config.weighted else LowRankLinear
    for name, rank in sorted(config.ranks.items(), key=lambda item: item[0] in leaders):
        linear = _listed(model, name, nn.Linear)
        leader = built.get(leaders.get(name))
        built[name] = kind.like(linear, rank, leader=leader)
        if config.format_version == 1:
            forget_costs(built[name])
        model.set_submodule(name, built[name])
    for group in groups(model):
        if config.weighted:
            group.leader.s.power = config.weighted
        if config.new:
            group.add_new(config.new)
    if config.embedding:
        _listed(model, config.embedding["name"], nn.Embedding)
        install(model, **config.embedding, weighted=bool(config.weighted))
    heads, table = getattr(config, "heads", {}), getattr(config, "table", None)  # version 1 has neither
    for group in groups(model):
        if group.name in heads:
            _split(group, heads[group.name])
    for name, width in config.rounded.items():
        kind = Version2Linear if config.format_version == 2 and width < 8 else RoundedLinear
        model.set_submodule(name, kind.like(_listed(model, name, nn.Linear), width))
    if table:
        _listed(model, table["name"], nn.Embedding)
        install_rounded(model, **table)


def _split(group: Group, head: int) -> None:
    """The factors of a group in two parts, neither rounded yet."""
    group.leader.v = split(group.leader.v, head, (16, 16), lambda part, bits: part, 0)
    for layer in group.layers:
        layer.u = split(layer.u, head, (16, 16), lambda part, bits: part, 1)


def _leaders(config: "BasisSelectConfig") -> dict[str, str]:
    """`{follower: leader}` of all groups."""
    return {name: leader for leader, *followers in config.groups for name in followers}


def _listed(model: nn.Module, name: str, kind: type[nn.Module]) -> nn.Module:
    """The module that config.json calls `name`."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"config.json lists the layer {name}, which {type(model).__name__} lacks") from None
    if not isinstance(module, kind):
        raise ValueError(f"config.json lists the layer {name}, which is no nn.{kind.__name__}")
    return module


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Within it, dense layers without values in the place of ours.

    Architectures initialise what no file holds module by module, and reach for the `weight` of linear layers below,
    some to overwrite it unasked.
    """
    kinds = LowRankLinear | TableEmbedding | RoundedLinear
    ours = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    outer = {name: m for name, m in ours.items() if not any(name.startswith(f"{above}.") for above in ours)}
    for name, module in outer.items():
        if isinstance(module, TableEmbedding):
            dense = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        else:
            dense = nn.Linear(module.in_features, module.out_features, device="meta")
        model.set_submodule(name, dense)
    try:
        yield
    finally:
        for name, module in outer.items():
            model.set_submodule(name, module)
