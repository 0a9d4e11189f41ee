"""How transformers reads and writes a checkpoint of ours (format.py): it takes us for a quantizer.

So after `import basis_select` from_pretrained builds the factored layers before the weights are read, and
`save_pretrained` describes what the model then is.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantizer

from ..layers.embedding import TableEmbedding, table_to_dense
from ..layers.group import groups
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear, quantized
from .earlier import hold_in_16_bits
from .format import METHOD, WEIGHTS, BasisSelectConfig, build, describe, guard_names, guards, in_files, weighted_layers


def register(model: PreTrainedModel) -> None:
    """Let `save_pretrained` of `model` describe what it then is, whoever calls it."""
    model.hf_quantizer = BasisSelectQuantizer(BasisSelectConfig())


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
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


@register_quantizer(METHOD)
class BasisSelectQuantizer(HfQuantizer):
    requires_calibration = True  # it only ever reads what decompose and prune have written
    renamings = ()  # of the tensors of this load alone

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build(model, self.quantization_config)
        layers = "|".join(map(re.escape, weighted_layers(model)))
        names = WEIGHTS.items() if layers else ()
        self.renamings = [WeightRenaming(rf"^({layers})\.{there}$", rf"\1.{here}") for here, there in names]
        known = {rf"^(.+\.)?{re.escape(name)}$" for name in guard_names(model, self.quantization_config)}
        model._keys_to_ignore_on_load_unexpected = known | set(model._keys_to_ignore_on_load_unexpected or ())

        def initialize_weights() -> None:
            with _stand_ins(model):
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
