"""The format: a normal Hugging Face folder whose config.json lists the factored layers.

    "quantization_config": {"quant_method": "basis_select", "format_version": 3,
                            "ranks": {module: r}, "groups": [[leader, follower, ...]], "weighted": 0, "new": 0}

Registered with transformers as a quantizer: after `import basis_select` from_pretrained builds the factored layers
(build.py) before the weights are read. `groups` lists layers that share one `v`, stored under the first.
Where `weighted` is not 0 the bases still carry `scale` and `weight`, and it is the `power` of the weight; `new` is the
number of new bases beside them: such checkpoints come from decompose and learn. `embedding` says how the token
embedding is written as bases: {"name": module, "rank": r, "tied": bool, "scale": 1.0}; `table` that it is rounded, with
"bits" in place of "rank". `bits`, {module: 8, 4, 3 or 2}, lists the linear layers, factors among them, that are
stored as whole numbers `q`, of 8 bits with a `scale`, of fewer with their scales in the same tensor
(layers/rounded.py). `heads`, {leader: bases}, says of which layers the factors are in two parts, the first of so many
bases: `v.head`, `v.tail`, `u.head`, `u.tail`.

earlier.py says what versions 1 and 2 hold instead.

Without the import transformers would only warn and fill these layers with random weights. So every checkpoint also
holds an empty tensor by the name of a dense weight: from_pretrained then raises, for the model has another shape there.
"""

import collections
import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.embedding import (
    LowRankEmbedding,
    RoundedEmbedding,
    TableEmbedding,
    module_name,
    settle_ties,
    table_to_dense,
)
from ..layers.group import Group, groups
from ..layers.learning import LearningLinear
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import quantized
from ..layers.split import SplitRows
from ..layers.stacking import is_stacked
from .build import build, stand_ins
from .earlier import hold_in_16_bits
from .schema import VERSION, require_description

METHOD = "basis_select"
REMEDIES = {  # by what the names of tensors hold
    "lora_": "merge the adapters first (merge_and_unload)",
    ".base_layer.": "merge the adapters first (merge_and_unload)",
    ".modules_to_save.": "merge the adapters first (merge_and_unload)",
    "_orig_mod.": "compile the whole model, or its layers in place (layer.compile())",
}
WEIGHTS = {"s.scale": "scale", "s.learned": "weight", "s.survived": "survived"}  # of bases: in a model, in a file
HINT = "import_basis_select_before_loading"  # an empty tensor too: transformers' report of what does not fit shows it


@register_quantization_config(METHOD)
class BasisSelectConfig(QuantizationConfigMixin):
    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        groups: list[list[str]] | None = None,
        weighted: int = 0,
        new: int = 0,
        embedding: dict | None = None,
        bits: dict[str, int] | None = None,
        heads: dict[str, int] | None = None,
        table: dict | None = None,
        int8: list[str] | None = None,
        format_version: int = VERSION,
        **kwargs: Any,
    ):
        self.quant_method = METHOD
        self.format_version = format_version
        self.ranks = {} if ranks is None else ranks
        self.groups = [] if groups is None else groups
        self.weighted = weighted
        self.new = new
        self.embedding = embedding
        if format_version == 1:
            self.int8 = [] if int8 is None else int8
        else:
            self.bits = {} if bits is None else bits
            self.heads = {} if heads is None else heads
            self.table = table
        require_description({**self.__dict__, **kwargs})

    @property
    def rounded(self) -> dict[str, int]:
        """`{module: bits}` of the linear layers that are rounded, of either version."""
        return dict.fromkeys(self.int8, 8) if self.format_version == 1 else self.bits


def require_loadable(model: PreTrainedModel) -> None:
    """Raise ValueError if AutoModelForCausalLM, which reads checkpoints, does not know this kind of model."""
    config = model.config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise ValueError(
            f"a checkpoint of {type(model).__name__} could not be loaded again: AutoModelForCausalLM does not know its "
            f"{type(config).__name__}"
        )


def unstorable(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[str]:
    """Those of `layers`, `{name: module}`, whose factors transformers would store but not read again.

    It makes one tensor of theirs and others', or stores them under a name that it takes for another.
    """
    shapes = {f"{name}.u.weight": (layers[name].out_features, layers[name].in_features) for name in layers}

    def stored(names: Iterable[str]) -> list[str]:
        return [*revert_weight_conversion(model, {name: torch.empty(shapes[name], device="meta") for name in names})]

    conversions = get_model_conversion_mapping(model)
    kinds = [[c for c in conversions if isinstance(c, kind)] for kind in (WeightRenaming, WeightConverter)]
    if sorted(rename_source_key(place, *kinds)[0] for place in stored(shapes)) == sorted(shapes):
        return []
    places = {name: stored([name]) for name in shapes}
    uses = collections.Counter(place for found in places.values() for place in found)
    return [
        name.removesuffix(".u.weight")
        for name, found in places.items()
        if any(uses[place] > 1 or rename_source_key(place, *kinds)[0] != name for place in found)
    ]


def register(model: PreTrainedModel) -> None:
    """Let `save_pretrained` of `model` describe what it then is, whoever calls it."""
    model.hf_quantizer = BasisSelectQuantizer(BasisSelectConfig())


def describe(model: PreTrainedModel) -> None:
    """Write what the modules of `model` are now into its config, and which of its tensors are tied.

    Raises ValueError, naming the tensor, unless a model made from that config has the very tensors of this one.
    """
    settle_ties(model)
    model.config.quantization_config = found = description(model)
    if found is None:
        del model.config.quantization_config
    _require_described(model, found)


def description(model: PreTrainedModel) -> BasisSelectConfig | None:
    """The BasisSelectConfig of the modules that there are, None if all are dense."""
    found, table, bits = groups(model), model.get_input_embeddings(), quantized(model)
    if not found and not isinstance(table, LowRankEmbedding) and not bits:
        return None
    first = found[0] if found else None
    for group in found:
        _require_alike(group, first)
    return BasisSelectConfig(
        ranks={name: layer.rank for group in found for name, layer in group.items()},
        groups=[list(group.names) for group in found if len(group.names) > 1],
        weighted=first.leader.s.power if first and first.weighted else 0,
        new=first.new_rank if first else 0,
        embedding=_describe_table(model, table, rank=table.bases.rank) if isinstance(table, LowRankEmbedding) else None,
        bits={
            name: width
            for name, width in bits.items()
            if model.get_submodule(name) is not getattr(table, "bases", None)
        },
        heads={g.name: g.leader.v.head.out_features for g in found if isinstance(g.leader.v, SplitRows)},
        table=_describe_table(model, table, bits=table.bases.bits) if isinstance(table, RoundedEmbedding) else None,
    )


def _require_alike(group: Group, first: Group) -> None:
    """All bases are weighted or none, and all have as many new ones: the format says it once for the whole model."""
    for name, layer in group.items():
        if _kind(layer) != _kind(first.leader):
            raise ValueError(
                f"{name} differs from the other layers of bases in whether they are weighted or have new bases: "
                "run learn and prune on the whole model, not on single layers"
            )


def _kind(layer: LowRankLinear) -> tuple[int, int]:
    """The power of a layer's weights, 0 if it has none, and how many new bases are beside them."""
    if not isinstance(layer, LearningLinear):
        return 0, 0
    return layer.leader.s.power, layer.new.rank if layer.new else 0


def _describe_table(model: PreTrainedModel, table: TableEmbedding, **more: int) -> dict:
    return {"name": module_name(model, table), **more, "tied": table.tied, "scale": table.scale}


def _require_described(model: PreTrainedModel, found: BasisSelectConfig | None) -> None:
    if is_stacked(model):
        raise ValueError("a model loaded with fast=True only answers: to save it, load it without fast=True")
    here = model.state_dict()
    for part, remedy in REMEDIES.items():
        if wrong := next((name for name in here if part in name), None):
            raise ValueError(f"{wrong} is no tensor of a {type(model).__name__}: {remedy}")
    made = stock(model, plain_config(model.config))
    if found is not None:
        build(made, found)
    there = made.state_dict()
    for name in [*there, *here]:
        shapes = ["absent" if name not in state else str(list(state[name].shape)) for state in (here, there)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[0]} in this {type(model).__name__} and {shapes[1]} in one made from its config, so "
                "nothing could load what is saved: change the config with the module, or put the module back"
            )


def stock(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A dense model of `config`, of the class and the dtype of `model`, on the meta device."""
    with torch.device("meta"):
        return type(model)._from_config(config, dtype=model.dtype)


def dense_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A dense model of `config` without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(plain_config(config), trust_remote_code=False)


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says nothing of factors: else transformers would look for a quantizer."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def in_files(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, tensors by their names in `model`, by the names that they have in checkpoints."""
    names = {f"{layer}.{here}": f"{layer}.{there}" for layer in _weighted(model) for here, there in WEIGHTS.items()}
    return {names.get(name, name): tensor for name, tensor in state.items()}


def _weighted(model: nn.Module) -> list[str]:
    """Names of the layers that own weights of bases."""
    return [n for n, m in model.named_modules() if isinstance(m, LearningLinear) and m.leader is m]


def guards(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """`{name: empty tensor}` of what a checkpoint of `model` holds beside its state: nothing if no layer is bases."""
    found, state = description(model), in_files(model, model.state_dict())
    # The `weight` of weighted bases can have the name: its shape is not the dense one either.
    names = _guard_names(model, found) if found else []
    return {name: torch.empty(0, dtype=model.dtype) for name in names if name not in state}


def factored_weights(config: BasisSelectConfig) -> list[str]:
    """Names that the weights of the layers written as bases would have if these were dense."""
    names = config.ranks or ([config.embedding["name"]] if config.embedding else config.rounded)
    return [f"{name}.weight" for name in sorted(names)]


def _guard_names(model: PreTrainedModel, config: BasisSelectConfig) -> list[str]:
    weights = factored_weights(config)
    # Not one that transformers stores under another name or as a part of another tensor.
    kept = (name for name in weights if [*revert_weight_conversion(model, {name: torch.empty(0)})] == [name])
    return [*itertools.islice(kept, 1), HINT] if weights else []


@register_quantizer(METHOD)
class BasisSelectQuantizer(HfQuantizer):
    requires_calibration = True  # it only ever reads what decompose and prune have written
    renamings = ()  # of the tensors of this load alone

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build(model, self.quantization_config)
        layers = "|".join(map(re.escape, _weighted(model)))
        names = WEIGHTS.items() if layers else ()
        self.renamings = [WeightRenaming(rf"^({layers})\.{there}$", rf"\1.{here}") for here, there in names]
        known = {rf"^(.+\.)?{re.escape(name)}$" for name in _guard_names(model, self.quantization_config)}
        model._keys_to_ignore_on_load_unexpected = known | set(model._keys_to_ignore_on_load_unexpected or ())

        def initialize_weights() -> None:
            with stand_ins(model):
                type(model).initialize_weights(model)

        model.initialize_weights = initialize_weights  # of this load alone
        self.shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}

    def update_weight_conversions(self, weight_conversions: list, *model: PreTrainedModel) -> list:
        # Newer versions of transformers hand over the model.
        return [*super().update_weight_conversions(weight_conversions, *model), *self.renamings]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.initialize_weights
        for name, tensor in sorted(model.state_dict().items()):  # transformers before 5.24 takes those of any shape
            if tensor.numel() and list(tensor.shape) != self.shapes[name]:
                shapes = f"{list(tensor.shape)} in the file, {self.shapes[name]} in the model"
                raise ValueError(f"the weights do not fit config.json: mismatched keys, first {name} ({shapes})")
        # They are no part of what transformers would revert: `in_files` does it for models that were never loaded too.
        model._weight_conversions = [c for c in model._weight_conversions if c not in self.renamings]
        # Tensors read from a file start where the file has them; matmul kernels round differently off the 64-byte
        # boundaries that allocations have, and a reloaded model must give the bits of the one that was saved.
        moved = {}
        for module in model.modules():
            # Some architectures compute otherwise, with other rounding, where transformers says so.
            vars(getattr(module, "config", None) or module).pop("_is_quantized", None)
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is None or tensor.device.type != "cpu" or not tensor.data_ptr() % 64:
                        continue
                    if isinstance(tensor, nn.Parameter):
                        tensor.data = tensor.data.clone()
                    else:  # a view of the whole file, which would stay in memory with it
                        if tensor not in moved:
                            moved[tensor] = tensor.clone()
                        kind[name] = moved[tensor]
        hold_in_16_bits(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict]:
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers then writes the adapter alone
            return model.state_dict(), {}
        describe(model)
        return {**in_files(model, model.state_dict()), **guards(model)}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if isinstance(model.get_input_embeddings(), TableEmbedding):
            table_to_dense(model)
        for group in groups(model):
            group.to_dense(model)
        for name in quantized(model):
            model.set_submodule(name, model.get_submodule(name).to_linear())
        return model

    def is_serializable(self) -> bool:
        return True

    is_trainable = property(lambda self: True)
    is_qat_trainable = property(lambda self: True)
    is_compileable = property(lambda self: True)
