"""Write a model in a form that other runtimes read: a stock dense checkpoint, an ONNX or OpenVINO graph, int8 weights.

transformers' own exporters trace the graphs, one for any number of tokens after any number of cached ones; layers stay
factored there, two products each. checkpoint/runtime.py runs what `onnx` writes; openvino_genai what `openvino` does.
"""

import contextlib
import copy
import dataclasses
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .checkpoint.files import save, whole
from .checkpoint.format import plain_config, stock
from .checkpoint.models import load
from .checkpoint.targets import targets
from .layers.embedding import TableEmbedding, is_tied
from .layers.group import groups
from .layers.low_rank import LowRankLinear
from .layers.rounded import RoundedLinear, quantized
from .layers.traced import for_graph

log = logging.getLogger(__name__)


def export(
    source: PreTrainedModel | str | Path,
    to: Literal["dense", "onnx", "openvino", "int8"],
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write `source`, a model or whatever `load` takes, to the new folder `out`: all of it or nothing; returns `out`.

    to: "dense", a checkpoint that transformers, vLLM and llama.cpp's converter read without this package, no smaller
    than the parent; "onnx" and "openvino", graphs in which rounded weights stay what they are and others are
    float32 and float16; "int8", a checkpoint of ours whose weights take half the bytes. `tokenizer` goes with a model;
    `load` finds that of other sources. Raises ValueError on an unknown format, on a model that it does not fit and
    without the packages of the `export` extra.

        >>> bs.export(parent, "dense", "for_vllm", tokenizer)
        PosixPath('for_vllm')
    """
    if to not in FORMATS:
        hint = ": export dense and give that to llama.cpp's convert_hf_to_gguf.py" if to == "gguf" else ""
        raise ValueError(f"cannot export to {to!r}; known are {', '.join(FORMATS)}{hint}")
    if isinstance(source, nn.Module):
        model = source
    else:
        model, tokenizer = load(source, "float32" if to in ("onnx", "openvino") else None)
    if to != "dense" and any(group.weighted for group in groups(model)):
        raise ValueError(f"these bases are still weighted: call prune before exporting to {to}")
    if to == "int8" and quantized(model):
        raise ValueError("the weights of this model are rounded already: export what they were rounded from to int8")
    FORMATS[to](model, tokenizer, Path(out))
    return Path(out)


def _dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    save(dense(model), tokenizer, out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    log.warning("%s is dense: %.1f MB, no smaller than the model was before it was cut", out, size / 1e6)


@torch.no_grad()
def dense(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model with the function of `model`, which stays as it is: products of factors, the embedding put back."""
    config, state = plain_config(model.config), {}
    for name, module in model.named_modules():
        if isinstance(module, TableEmbedding | RoundedLinear):
            state[f"{name}.weight"] = module.weight
        elif isinstance(module, LowRankLinear):
            state[f"{name}.weight"] = module.dense_weight()
            if module.u.bias is not None:
                state[f"{name}.bias"] = module.u.bias
    table = model.get_input_embeddings()
    config.tie_word_embeddings = table.tied if isinstance(table, TableEmbedding) else is_tied(model)
    made = stock(model, config)
    names = made.state_dict().keys()
    state = {name: tensor for name, tensor in {**model.state_dict(), **state}.items() if name in names}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def _onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        from transformers.exporters import OnnxConfig, OnnxExporter
    except ImportError:
        raise ValueError("ONNX needs the export extra: pip install 'basis-select[export]'") from None
    with whole(out) as partial:
        exported = _trace(for_graph(model, "onnx"), OnnxExporter, OnnxConfig())
        for node in exported.program.graph.all_nodes():
            node.metadata_props.clear()  # lines of code with their folders, longer than the rest of the graph
        exported.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _openvino(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    try:
        import openvino
        from openvino_tokenizers import convert_tokenizer
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter
    except ImportError:
        raise ValueError("OpenVINO needs the export extra: pip install 'basis-select[export]'") from None
    with whole(out) as partial:
        exported = _trace(for_graph(model, "openvino"), OpenVINOExporter, OpenVINOConfig(compress_to_fp16=True))
        _to_4_bits(exported.program)
        exported.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
            for name, graph in zip(
                ("openvino_tokenizer", "openvino_detokenizer"),
                convert_tokenizer(tokenizer, with_detokenizer=True),
                strict=True,
            ):
                openvino.save_model(graph, partial / f"{name}.xml")


def _to_4_bits(graph: Any) -> None:
    """Store in 4 bits the int8 constants of three dimensions of an openvino.Model, in place: torch has no such type."""
    from openvino import Type, opset13

    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == Type.i8 and node.get_data().ndim == 3:
            node.output(0).replace(opset13.constant(node.get_data(), Type.i4).output(0))


def _trace(model: PreTrainedModel, exporter: type, config: Any) -> Any:
    """One graph of ids, mask, positions and cache -> logits and cache; all lengths and the batch are free."""
    # In 16 bits transformers' OpenVINO exporter hides the weights of nn.Linear, which an embedding of bases reads.
    if model.dtype != torch.float32:
        raise ValueError(f"graphs are traced in float32 and this model is {model.dtype}: load it as float32")
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.arange(8).view(2, 4) % model.get_input_embeddings().num_embeddings
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # padding, or the mask is left out of the graph
    with _quiet():
        stages = decompose_for_generation(
            model.eval(),
            {"input_ids": ids, "attention_mask": mask},
            generation_config=GenerationConfig(do_sample=False, pad_token_id=0),
            multi_token_decode=True,
        )
        part, inputs = stages["decode"]
        part.config = plain_config(model.config)
        free = get_auto_dynamic_shapes({name: x for name, x in inputs.items() if not isinstance(x, bool)})
        exported = exporter().export(part, inputs, dataclasses.replace(config, dynamic_shapes=free))
    exported.generation_config = model.generation_config
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters report every step, and say of each version newer than theirs that it is newer."""
    ours, theirs = transformers_logging.get_verbosity(), logging.getLogger("torch.onnx")
    level = theirs.level
    transformers_logging.set_verbosity_error()
    theirs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(ours)
        theirs.setLevel(level)


def _int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    save(to_int8(copy.deepcopy(model)), tokenizer, out)


def to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Round factors, and linear layers left dense but a tied head, to int8, in place; returns the model."""
    layers = targets(model, required=False)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            layers.update({f"{name}.{part}": child for part, child in module.named_children()})
    for name, linear in layers.items():
        model.set_submodule(name, RoundedLinear.rounded(linear, 8))
    return model


FORMATS = {"dense": _dense, "onnx": _onnx, "openvino": _openvino, "int8": _int8}
