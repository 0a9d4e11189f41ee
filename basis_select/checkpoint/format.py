"""The format: a normal Hugging Face folder whose config.json lists the factored layers.

    "quantization_config": {"quant_method": "basis_select", "format_version": 1,
                            "ranks": {module: r}, "groups": [[leader, follower, ...]], "weighted": 0, "new": 0}

Registered with transformers as a quantizer, so that after `import basis_select` from_pretrained builds the
factored layers before the weights are read. `groups` lists layers that share one `v`, stored under the first.
Where `weighted` is not 0 the bases still carry `scale` and `weight`, and it is the `power` of the weight; `new` is the
number of new bases beside them: such checkpoints come from decompose and learn. `embedding` says how the token
embedding is written as bases: {"name": module, "rank": r, "tied": bool, "scale": 1.0}. `int8` lists the linear layers,
factors among them, that are stored as int8 `q` with one `scale` a row.

Without the import transformers would only warn and fill these layers with random weights. So every checkpoint also
holds an empty tensor by the name of a dense weight: from_pretrained then raises, for the model has another shape there.
"""

import re

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..bases import LowRankLinear, add_new, groups, to_dense
from ..embedding import install, module_name, table_of, table_to_dense
from ..int8 import Int8Linear, quantized
from .schema import VERSION, require_description

METHOD = "basis_select"
HINT = "import_basis_select_before_loading"  # an empty tensor too: transformers' report of what does not fit shows it


@register_quantization_config(METHOD)
class BasisSelectConfig(QuantizationConfigMixin):
    def __init__(
        self, ranks=None, groups=None, weighted=0, new=0, embedding=None, int8=None, format_version=VERSION, **kwargs
    ):
        self.quant_method = METHOD
        self.format_version = format_version
        self.ranks = {} if ranks is None else ranks
        self.groups = [] if groups is None else groups
        self.weighted = weighted
        self.new = new
        self.embedding = embedding
        self.int8 = [] if int8 is None else int8
        require_description({**self.__dict__, **kwargs})


def describe(model):
    """Write what the model now is into its config, so that `save_pretrained` makes a checkpoint of ours."""
    found = groups(model)
    first = found[0][0][1].leader if found else None
    ranks = {name: layer.rank for members in found for name, layer in members}
    model.config.quantization_config = BasisSelectConfig(
        ranks=ranks,
        groups=[[name for name, _ in members] for members in found if len(members) > 1],
        weighted=first.power if first and first.weighted else 0,
        new=first.new.rank if first and first.new else 0,
        embedding=_describe_embedding(model),
        int8=quantized(model),
    )
    model.hf_quantizer = BasisSelectQuantizer(model.config.quantization_config)  # it adds `guards` to what is saved


def _describe_embedding(model):
    table, embedding = table_of(model), model.get_input_embeddings()
    if table is None:
        return None
    name = module_name(model, embedding)
    return {"name": name, "rank": table.rank, "tied": embedding.tied, "scale": embedding.scale}


def guards(model):
    """`{name: empty tensor}` of what a checkpoint of `model` holds beside its state: nothing if no layer is bases."""
    config, state = getattr(model.config, "quantization_config", None), model.state_dict()
    names = guard_names(config) if isinstance(config, BasisSelectConfig) else []
    # The `weight` of weighted bases can have the name: its shape is not the dense one either.
    return {name: torch.empty(0, dtype=model.dtype) for name in names if name not in state}


def guard_names(config):
    factored = config.ranks or ([config.embedding["name"]] if config.embedding else [])
    return [f"{min(factored)}.weight", HINT] if factored else []


def build(model, config):
    """Replace the listed nn.Linear layers by LowRankLinear of the listed ranks, weights uninitialised.

    Raises ValueError, naming the layer, if the model cannot have such layers.
    """
    leaders = _leaders(config)
    built = {}
    for name, rank in sorted(config.ranks.items(), key=lambda item: item[0] in leaders):
        linear = _listed(model, name, nn.Linear)
        leader = built.get(leaders.get(name))
        built[name] = LowRankLinear.like(linear, rank, weighted=bool(config.weighted), leader=leader)
        model.set_submodule(name, built[name])
    for members in groups(model):
        if config.weighted:
            members[0][1].leader.power = config.weighted
        if config.new:
            add_new(members, config.new)
    if config.embedding:
        _listed(model, config.embedding["name"], nn.Embedding)
        install(model, **config.embedding, weighted=bool(config.weighted))
    for name in config.int8:
        model.set_submodule(name, Int8Linear.like(_listed(model, name, nn.Linear)))


def _leaders(config):
    """`{follower: leader}` of all groups."""
    return {name: leader for leader, *followers in config.groups for name in followers}


def _listed(model, name, kind):
    """The module that config.json calls `name`."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"config.json lists the layer {name}, which {type(model).__name__} lacks") from None
    if not isinstance(module, kind):
        raise ValueError(f"config.json lists the layer {name}, which is no nn.{kind.__name__}")
    return module


@register_quantizer(METHOD)
class BasisSelectQuantizer(HfQuantizer):
    requires_calibration = True  # it only ever reads what decompose and prune have written

    def _process_model_before_weight_loading(self, model, **kwargs):
        build(model, self.quantization_config)
        known = {rf"^(.+\.)?{re.escape(name)}$" for name in guard_names(self.quantization_config)}
        model._keys_to_ignore_on_load_unexpected = known | set(model._keys_to_ignore_on_load_unexpected or ())

    def _process_model_after_weight_loading(self, model, **kwargs):
        # Tensors read from a file start where the file has them; matmul kernels round differently off the 64-byte
        # boundaries that allocations have, and a reloaded model must give the bits of the one that was saved.
        moved = {}
        for module in model.modules():
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

    def get_state_dict_and_metadata(self, model):
        return {**model.state_dict(), **guards(model)}, {}

    def _dequantize(self, model, dtype=None):
        for name in quantized(model):
            model.set_submodule(name, model.get_submodule(name).to_linear())
        for members in groups(model):
            to_dense(model, members)
        if table_of(model) is not None:
            table_to_dense(model)
        return model

    def is_serializable(self):
        return True

    is_trainable = property(lambda self: True)
    is_qat_trainable = property(lambda self: True)
    is_compileable = property(lambda self: True)
