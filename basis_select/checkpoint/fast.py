"""A loaded model made ready to answer: its layers stacked, what decodes a token compiled, with `generate` as before."""

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..layers import kernels
from ..layers.stacking import stack
from ..system.machine import compile_options, fast_bf16
from .format import register

log = logging.getLogger(__name__)

ATTENTION = "basis_select"  # by which name transformers knows the one below


def ready(model: PreTrainedModel, compiled: bool = True) -> PreTrainedModel:
    """`model`, in place, in the form in which it answers fastest on its device; it can neither be saved nor trained.

    Where its device has no bfloat16 units it computes in float32. `compiled`: a step that decodes one token, with a
    cache of fixed size, is compiled, which takes minutes where it was never compiled before.
    """
    if model.dtype == torch.bfloat16 and not fast_bf16(model.device):
        nn.Module.float(model)  # transformers refuses it for any checkpoint with a quantizer
    if model.device.type == "cpu":
        kernels.load()
    stack(model)
    register(model)  # so that saving it is refused
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(ATTENTION)
    if compiled:
        _compile(model)
    return model


def _compile(model: PreTrainedModel) -> None:
    """Let `model` compute one token after others in a cache of fixed size by a compiled graph, all else as before."""
    plain = model.forward

    def alone(**inputs: Any) -> Any:
        return plain(**inputs)

    # torch.compile keeps its graphs by code object: with one of its own, no other model's are tried before it.
    alone.__code__ = alone.__code__.replace()
    options = {"guard_filter_fn": _of_inputs, "size_asserts": False}  # a thousand asserts a token
    options |= compile_options(model.device)
    step, known = torch.compile(alone, options=options), None  # and what `generate` calls it with

    @functools.wraps(plain)
    def forward(*args: Any, **inputs: Any) -> Any:
        nonlocal known
        ids, cache = inputs.get("input_ids"), next((x for x in inputs.values() if isinstance(x, StaticCache)), None)
        if args or ids is None or ids.shape[1] > 1 or cache is None or torch.is_grad_enabled():
            return plain(*args, **inputs)
        if known is None:
            known = inputs.keys()
            _of_any_length(cache, inputs)
        return step(**inputs) if inputs.keys() == known else plain(**inputs)

    model.forward = forward
    model.generation_config.update(cache_implementation="static", disable_compile=True)
    began = time.perf_counter()
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    log.warning("compiled in %.0f s", time.perf_counter() - began)


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which of torch.compile's checks are kept: those of shapes and of constants that a cache counts by.

    The model does not change and `forward` calls the step with inputs of one kind alone, while 550 checks for every
    layer would take up to 0.3 ms of each token.
    """
    kinds = ("TENSOR_MATCH", "SHAPE_ENV", "EQUALS_MATCH", "CONSTANT_MATCH")
    of_model = [g.orig_guard.source.is_unspecialized_nn_module() or isinstance(g.value, nn.Parameter) for g in guards]
    return [g.guard_type in kinds and not fixed for g, fixed in zip(guards, of_model, strict=True)]


def _of_any_length(cache: StaticCache, inputs: dict[str, Any]) -> None:
    """Let the graph that is compiled for these inputs hold for caches of other lengths."""
    mask = inputs.get("attention_mask")
    for x in (mask or {}).values() if isinstance(mask, dict) else [mask]:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, x.dim() - 1)
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


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
