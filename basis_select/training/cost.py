"""What a training step computes and keeps in memory: the step itself, run on tensors that have no data."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..checkpoint.build import build
from ..checkpoint.format import BasisSelectConfig
from ..checkpoint.targets import targets
from ..layers.learning import Weights
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear
from ..layers.straight_through import in_training
from .collage import CollageAdamW
from .engine import checkpoint_layers
from .loss import activation_gradients, overwritable, response_logits, task_loss
from .precision import CastOnce, autocast

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts only the GPU's
_FORMULAS = FlopCounterMode(
    display=False,
    custom_mapping={
        _CPU_ATTENTION: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)
        ),
    },
).flop_registry


@dataclass(frozen=True)
class Cost:
    """Of one step: `flops` of products, the output head's apart; `held`, bytes of weights, a teacher's too, and of
    optimizer states, `states` those of the states alone; `gradients`, bytes; `passing`, bytes beyond `held` at the
    worst moment: activations, logits, gradients; `block`, bytes of the largest decoder layer's weights, which a process
    needs whole when all is sharded.
    """

    flops: int
    head_flops: int
    held: int
    states: int
    gradients: int
    passing: int
    block: int


class Flops(TorchDispatchMode):
    """Counts in `flops` those of the products and of the attention that run in this context."""

    flops = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.flops += _flops(function, args, kwargs or {}, out)
        return out


def _flops(function: Callable, args: tuple, kwargs: dict, out: Any) -> int:
    formula = _FORMULAS.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **bases: Any) -> PreTrainedModel:
    """A model of `config`, with factored layers if any are given; the weights of bases are fp32 as in training."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if bases:
        build(model, BasisSelectConfig(**bases))
    for module in model.modules():
        if isinstance(module, Weights):
            module.scale = module.scale.float()
            module.learned = torch.nn.Parameter(module.learned.float())
    return model


def training_step(
    config: PreTrainedConfig,
    shape: tuple[int, int, int],
    trains: Callable[[nn.Module], object],
    taught: bool = False,
    precision: str = "fp32",
    checkpointing: bool = False,
    teacher: str = "float32",
    soft_labels: int = 0,
    bases: dict | None = None,
    rounded: bool = False,
) -> Cost:
    """The Cost of one step of training/engine.py on a batch of `shape`, (rows, length, response tokens).

    trains: function that sets what of a model requires gradients; bases: a dict, how checkpoint/format.py describes the
    factored layers, none if dense; rounded: whether all weights of targeted layers train as those of 4 bits; teacher:
    the dtype of the dense parent, if `taught` by one and not by `soft_labels`, so many for a token.
    """
    with FakeTensorMode():
        model = _model(config, torch.float32 if precision == "fp32" else torch.bfloat16, **(bases or {}))
        if rounded:
            in_training(_rounded(model))
        trains(model)
        if checkpointing:
            checkpoint_layers(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        batch = _batch(*shape)
        parent = _teacher(config, teacher, soft_labels, batch) if taught else None
        whole = isinstance(parent, torch.nn.Module)
        states = _states(parameters, precision)  # those of the first step; the second is the one that counts
        watch = _Watch(model, [*model.parameters(), *(parent.parameters() if whole else ()), *states])
        held = watch.now
        with watch, CastOnce(parent):
            task_loss(model, batch, parent)[0].backward()
            gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        cost = watch.cost(held, gradients, sum(x.nbytes for x in states))
        if whole and teacher == "int8":  # of every weight a byte less, of every row a scale more
            saved = sum(m.weight.numel() - 2 * m.out_features for m in targets(parent).values())
            cost = replace(cost, held=held - saved)
    return cost


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with 4 bits for every weight of its targeted layers, in place."""
    layers = targets(model, required=False)
    for name, module in list(model.named_modules()):
        factor = isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankLinear)
        if name in layers or (factor and isinstance(module, nn.Linear)):
            model.set_submodule(name, RoundedLinear.like(module, 4))
    return model


def _teacher(config: PreTrainedConfig, dtype: str, soft_labels: int, batch: dict) -> Callable:
    """The dense parent, or what it says of a batch."""
    if soft_labels:
        said = torch.zeros(len(batch["positions"]), soft_labels)
        return lambda _: (said, said.long())
    return _model(config, torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)).requires_grad_(False)


def _states(parameters: list[nn.Parameter], precision: str) -> list[torch.Tensor]:
    """The tensors that the optimizer keeps. What a step needs beside them is a few MB at a time."""
    if precision == "fp32":
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    else:
        optimizer = CollageAdamW(parameters, variant=precision)
        for p in parameters:
            optimizer.state_of(p)
    return [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]


def moments_step(config: PreTrainedConfig, shape: tuple[int, int, int]) -> Cost:
    """The Cost of one batch of moments.second_moments without the moments: two backward passes to activations."""
    with FakeTensorMode():
        model = _model(config)
        watch = _Watch(model, model.parameters())
        held = watch.now
        with watch, activation_gradients(model), CastOnce(model):
            with autocast(model):
                logits = response_logits(model, _batch(*shape))
            p = overwritable(logits)
            logits.backward(p, retain_graph=True)
            logits.backward(p)
    return watch.cost(held)


def forward_pass(model: PreTrainedModel, **inputs: Any) -> Cost:
    """The Cost of one forward pass of `model` without gradients, run for real; `passing` is what it adds to weights
    and buffers at the worst moment, a cache included.
    """
    watch = _Watch(model, [*model.parameters(), *model.buffers()])
    held = watch.now
    with torch.no_grad(), watch:
        model(**inputs)
    return watch.cost(held)


def _batch(rows: int, length: int, responses: int) -> dict:
    positions = torch.zeros(responses, dtype=torch.long)
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "positions": positions,
        "targets": positions.clone(),
        "responses": responses,
    }


def _largest_block(model: nn.Module) -> int:
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    blocks = max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()))
    return max(sum(p.nbytes for p in block.parameters()) for block in blocks)


class _Watch(TorchDispatchMode):
    """FLOPs of products; bytes of all storages alive, `now` and at the `peak`: of `tensors` and of what is made here.

    torch's own counter tells modules apart, but by hooks that keep alive what would be freed.
    """

    def __init__(self, model: PreTrainedModel, tensors: Iterable[torch.Tensor]):
        super().__init__()
        self.vocabulary, self.block = model.get_input_embeddings().num_embeddings, _largest_block(model)
        self.flops = self.head_flops = 0
        self.alive, self.now, self.peak = set(), 0, 0
        self._see(tensors)

    def cost(self, held: int, gradients: int = 0, states: int = 0) -> Cost:
        return Cost(self.flops, self.head_flops, held, states, gradients, self.peak - held, self.block)

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        flops = _flops(function, args, kwargs or {}, out)
        if flops and any(self.vocabulary in x.shape for x in args if torch.is_tensor(x)):
            self.head_flops += flops
        else:
            self.flops += flops
        self._see(x for x in tree_leaves(out) if torch.is_tensor(x))
        return out

    def _see(self, tensors: Iterable[torch.Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                weakref.finalize(storage, self._gone, key, size).atexit = False
                self.now += size
                self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size
