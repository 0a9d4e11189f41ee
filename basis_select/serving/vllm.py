"""The plugin by which vLLM serves our checkpoints as they are stored: `vllm serve FOLDER`.

vLLM finds it by the entry point `vllm.general_plugins` and calls `register` in each of its processes. Its own models
build their layers and read the file; layers that config.json describes get a method of ours, which takes their tensors
as they are stored and computes with what parts.py makes of them. No architecture is named here: which layers are fused
vLLM says itself (`packed_modules_mapping`), and its own loaders say which rows and columns are this device's.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ..checkpoint import checks
from ..checkpoint.format import HINT, METHOD, BasisSelectConfig
from ..checkpoint.snapshot import snapshot
from ..layers import kernels
from ..layers.rounded import RoundedLinear, replace
from ..layers.stacking import FixedLinear
from .parts import Names, Stored, fuse, latent, table

SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # what vLLM calls layers in a fused one, where it does not number them


def register() -> None:
    """Tell vLLM of the format; twice is as good as once."""
    register_quantization_config(METHOD)(ServedConfig)


class ServedConfig(QuantizationConfig):
    """What config.json says of a checkpoint, and what one process has read of its weights."""

    _ignore_unexpected_suffixes = (*QuantizationConfig._ignore_unexpected_suffixes, HINT)

    def __init__(self, config: BasisSelectConfig):
        super().__init__()
        if config.weighted:
            raise ValueError("these bases are still weighted, as decompose and learn leave them: serve what prune made")
        self.config, self.names = config, Names(config)
        self.folder, self.states = None, None
        self.built = set()  # layers that have a method of ours
        self.tensors, self.vs = {}, {}  # by names of layers
        self.table, self.embedding = None, None  # what the file calls the token embedding's table; the module

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedConfig":
        return cls(BasisSelectConfig(**config))

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        if revision and not Path(model_name).is_dir():
            raise ValueError(
                f"{model_name} is served as it is on its main branch: download the revision {revision} and serve "
                "the folder"
            )
        self.folder = Path(snapshot(model_name) or model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.names = Names(self.config, lambda name: hf_to_vllm_mapper.map_name(name) or name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes `layer` of vLLM's model: None, or its own method, for one that is stored as usual."""
        if self.states is None:
            self.states = checks.check(self.folder)
        if isinstance(layer, VocabParallelEmbedding):
            head, found = isinstance(layer, ParallelLMHead), self.names.table
            if found and (found["tied"] if head else prefix in ("", found["name"])):
                self.built.add(found["name"])
                if owns := head == found["tied"]:
                    self.table = prefix if head else f"{found['name']}.table"
                return TableMethod(self, owns)
            layers = [prefix]
        elif isinstance(layer, LinearBase):
            parent, _, leaf = prefix.rpartition(".")
            layers = [f"{parent}.{name}".lstrip(".") for name in self.packed_modules_mapping.get(leaf, [leaf])]
        else:
            return None
        if self.names.layers.isdisjoint(layers):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        self.built.update(layers)
        return PartsMethod(self, layers)

    def require_all_built(self) -> None:
        """Raise ValueError for a layer of config.json that vLLM's model builds in a way of its own."""
        needed = self.names.layers | ({self.names.table["name"]} if self.names.table else set())
        if (left := sorted(needed - self.built)) and get_pp_group().world_size == 1:
            raise ValueError(
                f"vLLM's model of this architecture has no place for bases or bits in {left[0]}: "
                "serve the dense export (basis-select export FOLDER --to dense OUT)"
            )

    def require_unchanged(self) -> None:
        """Raise ValueError if a file was replaced or changed since its hash was checked."""
        checks.require_unchanged(self.states)
        self.states = {}

    def v(self, leader: str, inputs: int) -> nn.Module:
        """The `v` that a layer owns: one module for all that read it."""
        if leader not in self.vs:
            names = [name for name in self.names.of(leader) if name.startswith("v")]
            self.vs[leader] = _by_kernels(latent(self.names, leader, self.read(leader, names), inputs))
        return self.vs[leader]

    def take(
        self, layer: str, name: str, stored: Stored | None, loaded: torch.Tensor, reader: "Reader", shard: Any
    ) -> None:
        """Keep a tensor of a layer of the checkpoint, of which `stored` says what it should be, None that it has none.

        Raises ValueError, naming it, for one that does not belong there; the guard against programs that do not know
        the format does, and is left.
        """
        if not self.tensors:
            self.require_all_built()
        if stored is None and name == "weight" and layer in self.names.guards and not loaded.numel():
            return
        if stored is None:
            raise ValueError(
                f"{self.folder} holds {layer}.{name} of shape {[*loaded.shape]}, config.json has no place for it"
            )
        try:
            self.tensors.setdefault(layer, {})[name] = reader.part(stored, loaded, shard)
        except ValueError as error:
            raise ValueError(f"{layer}.{name}: {error}") from None

    def read(self, layer: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Hand over what was kept of a layer. Raises ValueError for a tensor that the file did not have."""
        found = self.tensors.get(layer, {})
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{self.folder} holds no {layer}.{missing[0]}")
        return {name: found.pop(name) for name in names}


class Reader:
    """Which rows and columns of its tensors are this device's part of a layer, as vLLM's own loader of it has them."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, all_inputs: int, dtype: torch.dtype):
        self.layer, self.inputs, self.outputs, self.all_inputs, self.dtype = layer, inputs, outputs, all_inputs, dtype
        self.device = torch.empty(0).device  # on which vLLM builds the model

    def part(self, stored: Stored, loaded: torch.Tensor, shard: Any) -> torch.Tensor:
        """This device's part of a tensor of the file. Raises ValueError for one of another shape or kind."""
        shape = stored.shape(loaded.shape[0], self.all_inputs)
        dtype = stored.dtype(loaded.dtype if loaded.is_floating_point() else self.dtype)
        if loaded.shape != shape or loaded.dtype != dtype:
            raise ValueError(f"it is {loaded.dtype} of shape {[*loaded.shape]}, config.json says {dtype} of {[*shape]}")
        rows = torch.arange(loaded.shape[0]) if stored.rows else self._indices(loaded.shape[0], self.outputs, 0, shard)
        columns = self._indices(self.all_inputs, self.inputs, 1, None)
        part = stored.part(loaded, rows, range(int(columns[0]), int(columns[-1]) + 1))
        return part.to(self.device, stored.dtype(self.dtype))

    def _indices(self, count: int, places: int, dim: int, shard: Any) -> torch.Tensor:
        """Which of so many rows (dim 0) or columns (1) vLLM puts into the `places` of this device: their numbers."""
        found = nn.Parameter(torch.full((places,), -1), requires_grad=False)
        setattr(found, ("output_dim", "input_dim")[dim], 0)
        self.layer.weight_loader(found, torch.arange(count), *([] if shard is None else [shard]))
        return found[found >= 0]


class PartsMethod(LinearMethodBase):
    """Computes one layer of vLLM's model, which is one or several `layers` of the checkpoint."""

    def __init__(self, served: ServedConfig, layers: list[str]):
        self.served, self.layers = served, layers
        self.biased, self.reduces = set(), False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        self.reader = Reader(layer, input_size_per_partition, sum(output_partition_sizes), input_size, params_dtype)
        stored = {name: about for each in self.layers for name, about in self.served.names.of(each).items()}
        for name in dict.fromkeys(("weight", *stored, "u.bias", "u.head.bias")):
            dtype = stored[name].dtype(params_dtype) if name in stored else params_dtype
            _place(layer, name, dtype, functools.partial(self.take, layer, name))

    def take(self, layer: nn.Module, name: str, param: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        """What vLLM calls with every tensor of `layer` in the file. shard: which of `layers` it is of."""
        if isinstance(shard, tuple):
            raise ValueError(
                f"vLLM expects {' and '.join(self.layers)} in one tensor, but config.json lists them as separate layers"
            )
        owner, served = self.layers[SHARDS.get(shard, shard)], self.served
        if name.endswith("bias"):
            if layer.bias is None:
                raise ValueError(f"the file holds {owner}.{name}, vLLM's layer has no bias")
            self.biased.add(owner)
            layer.bias.weight_loader(layer.bias, loaded, *([] if shard is None else [shard]))
            return
        served.take(owner, name, served.names.of(owner).get(name), loaded, self.reader, shard)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        served, names, inputs = self.served, self.served.names, self.reader.inputs
        served.require_unchanged()
        factored = [each for each in self.layers if each in names.ranks]
        if layer.bias is not None and (without := set(factored) - self.biased):
            raise ValueError(f"{min(without)} has no bias in the file, vLLM's layer has one")
        vs = {names.leader(each): served.v(names.leader(each), inputs) for each in factored}
        own = {each: served.read(each, [n for n in names.of(each) if not n.startswith("v")]) for each in self.layers}
        _displace(layer, _by_kernels(fuse(names, self.layers, own, vs, inputs)))
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and layer.reduce_results and factored:
            self.reduces, layer.reduce_results = True, False

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        z = layer.bases.latents(x)
        if self.reduces:  # of so many numbers as there are bases: fewer than vLLM would add up after `u`
            z = [tensor_model_parallel_all_reduce(each) for each in z]
            bias = None if layer.skip_bias_add else layer.bias
        y = layer.bases.outputs(x, z)
        return y if bias is None else y + bias


class TableMethod(LinearMethodBase):
    """Computes the token embedding, or the head tied to it, from a table of bases or of few bits.

    owns: whether the file has the table under the name of this layer, not of the other one.
    """

    def __init__(self, served: ServedConfig, owns: bool):
        self.served, self.owns = served, owns

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        reader = Reader(layer, input_size_per_partition, sum(output_partition_sizes), input_size, params_dtype)
        stored = self.served.names.of_table(self.served.table) if self.owns else {}
        above = "" if isinstance(layer, ParallelLMHead) else "table."
        _place(layer, "weight", params_dtype, functools.partial(self.take, "weight", False, reader))
        for name, about in stored.items():
            _place(layer, f"{above}{name}", about.dtype(params_dtype), functools.partial(self.take, name, True, reader))

    def take(self, name: str, listed: bool, reader: Reader, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """What vLLM calls with every tensor of the layer in the file."""
        served = self.served
        layer = served.table if listed else served.names.table["name"]
        served.take(layer, name, served.names.of_table(layer)[name] if listed else None, loaded, reader, None)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        served = self.served
        served.require_unchanged()
        if served.embedding is None:
            tensors = served.read(served.table, served.names.of_table(served.table))
            served.embedding = table(served.names, served.table, tensors, layer.embedding_dim)
            replace(served.embedding, RoundedLinear, lambda m: _as_stored(m) if m.bits == 8 else m)
        _displace(layer, served.embedding)

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return layer.bases.rows(ids)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = layer.bases.bases(x)
        return y if bias is None else y + bias


class Product(nn.Module):
    """`x W^T` by the kernel that vLLM has for it here."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.method = UnquantizedLinearMethod()
        self.method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self, x)


def _by_kernels(module: nn.Module) -> nn.Module:
    """The module with every nn.Linear in it computed by vLLM, and what is rounded by a kernel for it."""
    if type(module) is nn.Linear:
        return Product(module.weight)
    if isinstance(module, RoundedLinear):
        return _as_stored(module)
    replace(module, nn.Linear, lambda linear: Product(linear.weight))
    replace(module, RoundedLinear, _as_stored)
    return module


def _as_stored(layer: RoundedLinear) -> RoundedLinear:
    """What computes in place of `layer`: on a CPU, our kernel."""
    on_cpu = torch.empty(0).device.type == "cpu"
    fast = on_cpu and kernels.try_load("weights are restored at every use, which is slow")
    return FixedLinear.of(layer) if fast else layer


def _place(layer: nn.Module, name: str, dtype: torch.dtype, take: Callable[..., None]) -> None:
    """Let vLLM find a parameter `name` in a layer when it reads the file, and hand the tensor to `take`."""
    *above, leaf = name.split(".")
    for part in above:
        if not hasattr(layer, part):
            layer.add_module(part, nn.Module())
        layer = getattr(layer, part)
    param = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    param.weight_loader = take
    layer.register_parameter(leaf, param)


def _displace(layer: nn.Module, bases: nn.Module) -> None:
    """Put what computes in the place of the parameters that vLLM read the file by."""
    for name in ("weight", "q", "scale"):
        layer._parameters.pop(name, None)
    for name in ("u", "v", "table"):
        layer._modules.pop(name, None)
    layer.bases = bases
