"""A loaded model made ready to answer: its layers stacked, what decodes a token compiled, with `generate` as before."""

import functools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import RecompileError
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..layers import kernels
from ..layers.stacking import stack
from ..system.machine import compile_options, fast_bf16
from .format import register

log = logging.getLogger(__name__)

ATTENTION = "basis_select"  # by which name transformers knows the one below


def ready(model: PreTrainedModel, compiled: bool = True) -> PreTrainedModel:
    """`model`, in place, in the form in which it answers fastest on its device; it can neither be saved nor trained.

    Where its device has no bfloat16 units it computes in float32. `compiled`: what decodes one token and what
    reads one prompt, with a cache of fixed size, are compiled, which takes minutes where they never were before.
    """
    if model.dtype == torch.bfloat16 and not fast_bf16(model.device):
        nn.Module.float(model)  # transformers refuses it for any checkpoint with a quantizer
    if model.device.type == "cpu":
        kernels.load()
    stack(model)
    # transformers takes device and dtype from the first parameter, six times a token: without this one it would look
    # through 50 modules for it.
    model.where = nn.Parameter(torch.empty(0, dtype=model.dtype, device=model.device), requires_grad=False)
    register(model)  # so that saving it is refused
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(ATTENTION)
    if compiled:
        _compile(model)
    return model


def _compile(model: PreTrainedModel) -> None:
    """Let `model` compute by compiled graphs in a cache of fixed size: one token after others, and a single prompt."""
    plain = model.forward
    token, prompt = _Graph(plain, model.device), _Graph(plain, model.device)
    # Whether they are compiled: elsewhere attention would compute the free places of a cache, too (`_mask`).
    prompts = model.device.type == "cpu" and model.dtype == torch.float32
    empty = None  # keys and values of no token, by layer

    @functools.wraps(plain)
    def forward(*args: Any, **inputs: Any) -> Any:
        nonlocal empty
        ids, cache = inputs.get("input_ids"), next((x for x in inputs.values() if isinstance(x, StaticCache)), None)
        if args or ids is None or cache is None or torch.is_grad_enabled():
            return plain(*args, **inputs)
        if ids.shape[1] == 1:
            return token(cache, inputs)
        # Where a layer keeps a part of the prompt, or a state, no graph is one for all lengths.
        if not prompts or len(ids) > 1 or any(type(layer) is not StaticLayer for layer in cache.layers):
            return plain(**inputs)
        if empty is None:
            found = plain(**inputs)
            empty = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.layers]
            return found
        for layer, states in zip(cache.layers, empty, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(*states)  # within a graph it would be of one size
        return prompt(cache, inputs)

    model.forward = forward
    if model.device.type == "cpu":  # elsewhere how many tokens there are is known later than they are asked for
        model.prepare_inputs_for_generation = _prepared(model.prepare_inputs_for_generation)
    model.generation_config.update(cache_implementation="static", disable_compile=True)
    began = time.perf_counter()
    _answer(model, 4, 3)  # shows what a cache holds
    _answer(model, 4, 4)  # and what differs in a cache of another length
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            _answer(model, 5, 6)
    except RecompileError:
        prompts = False  # each length would be compiled anew, while its first answer waits
    log.warning("compiled in %.0f s", time.perf_counter() - began)


def _answer(model: PreTrainedModel, prompt: int, tokens: int) -> None:
    ids = torch.zeros(1, prompt, dtype=torch.long, device=model.device)
    exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(ids, attention_mask=torch.ones_like(ids), **exactly)


class _Graph:
    """`plain` compiled for inputs of the names it is first called with; for others it stays as it is."""

    def __init__(self, plain: Callable, device: torch.device) -> None:
        def alone(_cache: StaticCache, **inputs: Any) -> Any:
            _compare_sizes(_cache)
            return plain(**inputs)

        # torch.compile keeps its graphs by code object: with one of its own, no other model's are tried before it.
        alone.__code__ = alone.__code__.replace()
        options = {"guard_filter_fn": _of_inputs, "size_asserts": False}  # a thousand asserts a token
        self.plain, self.names = plain, None
        self.compiled = torch.compile(alone, options=options | compile_options(device))

    def __call__(self, cache: StaticCache, inputs: dict[str, Any]) -> Any:
        if self.names is None:
            self.names = inputs.keys()
            _of_any_length(cache, inputs)
        return self.compiled(cache, **inputs) if inputs.keys() == self.names else self.plain(**inputs)


def _prepared(stock: Callable) -> Callable:
    """`stock`, a model's `prepare_inputs_for_generation`, in a fraction of its time for one token after others.

    It still prepares the first such token in every cache. Where all that it gives is what is made here, those after it
    are made here: layers that keep every token let each see all before it, however many they are.
    """
    forms = weakref.WeakKeyDictionary()  # by cache: names of what is given, of what is made, and of its mask

    def made(ids: torch.Tensor, given: dict[str, Any], names: Sequence[str], kind: Sequence[str]) -> dict | None:
        cache, seen = given["cache"], given.get("attention_mask")
        used = _used(len(ids), cache.get_seq_length(), attention_mask=None if seen is None else seen.bool())
        if used is None:
            return None
        mask = _padded(used, cache.layers[0].keys.shape[2])
        last = {"input_ids": ids[:, -1:], "position_ids": given["position_ids"][:, -1:]}
        own = {name: x.clone(memory_format=torch.contiguous_format) for name, x in last.items()}
        own["attention_mask"] = {kind[0]: mask} if kind else mask
        return {name: own[name] if name in own else given.get(name) for name in names}

    @functools.wraps(stock)
    def prepare(input_ids: torch.Tensor, **given: Any) -> dict[str, Any]:
        cache, one = given.get("cache"), 1 in (given.get("next_sequence_length"), input_ids.shape[1])
        known = isinstance(cache, StaticCache) and given.get("position_ids") is not None
        if not (known and one) or given.get("is_first_iteration"):
            return stock(input_ids, **given)
        form = forms.get(cache)
        if form and form[0] == given.keys() and (inputs := made(input_ids, given, *form[1:])):
            return inputs
        inputs = stock(input_ids, **given)
        if form is None:
            mask = inputs.get("attention_mask")
            form = given.keys(), list(inputs), list(mask)[:1] if isinstance(mask, dict) else []
            keeps_all = all(type(layer) is StaticLayer for layer in cache.layers)
            forms[cache] = form if keeps_all and _same(inputs, made(input_ids, given, *form[1:])) else ()
        return inputs

    return prepare


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs of a model are the same to a graph: dicts of the same, equal tensors, or one object."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(x, other[name]) for name, x in one.items())
    if torch.is_tensor(one) and torch.is_tensor(other):
        kinds = [(x.dtype, x.device, x.stride()) for x in (one, other)]
        return kinds[0] == kinds[1] and torch.equal(one, other)
    return one is other


def _compare_sizes(cache: StaticCache) -> None:
    """Let torch.compile see that layers are of one length: each would be an input of its own, at 7 us a token."""
    states = [x for layer in cache.layers if type(layer) is StaticLayer for x in (layer.keys, layer.values)]
    all(x.shape[2] == states[0].shape[2] for x in states)


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which of torch.compile's checks are kept: those of shapes and of constants that a cache counts by.

    The model does not change and `forward` calls the step with inputs of one kind alone, while 550 checks for every
    layer would take up to 0.3 ms of each token.
    """
    kinds = ("TENSOR_MATCH", "SHAPE_ENV", "EQUALS_MATCH", "CONSTANT_MATCH")
    of_model = [g.orig_guard.source.is_unspecialized_nn_module() or isinstance(g.value, nn.Parameter) for g in guards]
    return [g.guard_type in kinds and not fixed for g, fixed in zip(guards, of_model, strict=True)]


def _of_any_length(cache: StaticCache, inputs: dict[str, Any]) -> None:
    """Let the graph that is compiled for these inputs hold for caches of other lengths, and for prompts."""
    given = [x for value in inputs.values() for x in (value.values() if isinstance(value, dict) else [value])]
    for x in given:
        for dim in range(x.dim() if torch.is_tensor(x) else 0):
            if x.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(x, dim)
    for layer in cache.layers:
        for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):  # recurrent layers have none
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, 2)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by our kernel where it is the faster one, of one token or in float32, else by transformers' "sdpa".

    query: (batch, heads, tokens, d), key and value: (batch, key heads, keys, d); result: (batch, tokens, heads, d).
    """
    tokens, size = query.shape[2:]
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        known = tokens == 1 or (getattr(module, "is_causal", True) if causal is None else causal)
    else:
        known = attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    known &= size == key.shape[3] == value.shape[3] and kwargs.get("position_bias") is None
    if not (known and (tokens == 1 or query.dtype == torch.float32)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None and tokens > 1:  # the first ones, whose keys may lie in a larger cache
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    scale = kwargs.get("scaling")
    scale = size**-0.5 if scale is None else scale
    return torch.ops.basis_select.attention(query, key, value, attention_mask, scale), None


def _mask(*, batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask and, in float32, one for a prompt in a larger cache, too: graphs take it as an input."""
    if q_length == 1 and not torch.compiler.is_compiling() and (used := _used(batch_size, **kwargs)) is not None:
        return _padded(used, kv_length)
    if kwargs.get("dtype") == torch.float32 and q_length != kv_length:
        kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
    return None if mask is None else mask.clone()  # torch.compile would check what it is a part of


def _used(
    batch_size: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """(batch, keys up to its own): those that one token has; None where that is not known at once."""
    if mask_function is not causal_mask_function or kv_offset:
        return None
    keys = int(q_offset) + 1
    if attention_mask is None:
        return torch.ones(batch_size, keys, dtype=torch.bool)
    return attention_mask if attention_mask.shape[1] == keys else None


def _padded(used: torch.Tensor, length: int) -> torch.Tensor:
    """(batch, 1, 1, length): the mask of one token that sees what is `used`, in a cache of this length."""
    return F.pad(used[:, None, None], (0, length - used.shape[1]))


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
