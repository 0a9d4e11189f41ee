"""How the rows of runtimes.py are made: a dense model and results made from it, in every runtime, all called alike."""

import ctypes
import functools
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import nncf
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from llama_cpp_check import convert
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import StaticCache

from basis_select import export, load
from basis_select.checkpoint.runtime import OnnxModel

GROUP = 64  # weights that share one scale in nncf's int4: it divides every side of SmolLM2


@llama_cpp.llama_log_callback
def _quiet(level, text, data):
    """llama.cpp writes a thousand lines about every context."""


class OpenVino:
    """An OpenVINO export with the call of a transformers model; its cache stays inside."""

    def __init__(self, graph, threads):
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if threads == 1:  # in bfloat16 one thread ends in a division by zero (openvinotoolkit/openvino#33300)
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self.request = openvino.compile_model(graph, "CPU", options).create_infer_request()

    def __call__(self, input_ids, cache=None):
        past = cache or 0
        if past == 0:
            self.request.reset_state()
        batch, end = len(input_ids), past + input_ids.shape[1]
        found = self.request.infer(
            {
                "input_ids": input_ids.numpy(),
                "attention_mask": np.ones((batch, end), np.int64),
                "position_ids": np.arange(past, end)[None].repeat(batch, 0),
                "beam_idx": np.arange(batch, dtype=np.int32),
            }
        )
        return SimpleNamespace(logits=torch.from_numpy(found["logits"].copy()), cache=end)


class LlamaCpp:
    """A GGUF file in llama.cpp with the call of a transformers model; its cache stays inside, one for a batch size."""

    def __init__(self, path, threads, longest):
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        self.threads, self.longest = threads, longest
        self.context = functools.cache(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def context(self, batch):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = self.longest * batch, batch
        options.n_batch = options.n_ubatch = self.longest * batch
        options.n_threads = options.n_threads_batch = self.threads
        return llama_cpp.llama_init_from_model(self.model, options)

    def __call__(self, input_ids, cache=None):
        (rows, columns), past = input_ids.shape, cache or 0
        context = self.context(rows)
        if past == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(rows * columns, 0, 1)
        batch.n_tokens = rows * columns
        for i, token in enumerate(input_ids.flatten().tolist()):
            batch.token[i], batch.pos[i] = token, past + i % columns
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i // columns, True
        failed = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp cannot decode {rows} x {columns} tokens: {failed}")
        shape = rows, columns, self.vocabulary
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=shape).copy()
        return SimpleNamespace(logits=torch.from_numpy(logits), cache=past + columns)


class Fast:
    """A transformers model with a cache of fixed size: a prompt and `tokens` after it, as `generate` makes it.

    step: what computes one token after others.
    """

    def __init__(self, model, step, tokens):
        self.model, self.step, self.tokens = model, step, tokens

    def __call__(self, input_ids, cache=None):
        past, cache = cache or (0, StaticCache(self.model.config, input_ids.shape[1] + self.tokens))
        rows, end = len(input_ids), past + input_ids.shape[1]
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            cache=cache,
            attention_mask=None,
            position_ids=torch.arange(past, end)[None].repeat(rows, 1),
            use_cache=True,
            logits_to_keep=0 if past == 0 else 1,
            is_first_iteration=past == 0,
        )
        call = self.step if past else self.model
        return SimpleNamespace(logits=call(**inputs, return_dict=True).logits, cache=(end, cache))


def eager(source, a, dtype=None):
    model = load(source, dtype)[0]
    return model, sum(p.nbytes for p in model.parameters())


def fast(source, a):
    model = load(source, fast=True)[0]
    return Fast(model, model, a.tokens), size_of(source, "*.safetensors")


def torch_ao(source, a, config):
    """As torchao's pages have it: linear layers of a bfloat16 model rounded, the step of one token compiled.

    Its int4 kernel wants multiples of 16 outputs, which a head of trimmed tokens may not have.
    """
    model = load(source, "bfloat16")[0]
    quantize_(model, config, lambda m, _: isinstance(m, torch.nn.Linear) and m.out_features % 16 == 0)
    size = sum(_bytes_of(p) for p in model.parameters())
    return Fast(model, torch.compile(model.forward, dynamic=False), a.tokens), size


def _bytes_of(weight):
    """Of a plain tensor, or of those that one of torchao's consists of."""
    names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
    return sum(getattr(weight, name).nbytes for name in names) if names else weight.nbytes


def onnx_runtime(source, a, bits=None):
    out = exported(source, "onnx", a.folder)
    if bits:
        dense, out = out, out.with_name(f"{out.name}-int{bits}")
        if not out.exists():
            shutil.copytree(dense, out)
            for path in out.glob("*.onnx*"):
                path.unlink()
            graph = next(dense.glob("*.onnx"))
            quantizer = MatMulNBitsQuantizer(onnx.load(graph), bits=bits, block_size=32, is_symmetric=True)
            quantizer.process()
            quantizer.model.save_model_to_file(str(out / graph.name), use_external_data_format=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = a.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others have the cores in their turn
    return OnnxModel(out, options).eval(), size_of(out, "*.onnx*")


def open_vino(source, a, mode=None):
    graph = exported(source, "openvino", a.folder) / "openvino_model.xml"
    if mode:
        whole, graph = graph, graph.with_name(f"{mode}.xml")
        if not graph.exists():
            more = {} if mode == "INT8_ASYM" else {"group_size": GROUP, "ratio": 1.0}
            model = openvino.Core().read_model(whole)
            openvino.save_model(nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **more), graph)
    return OpenVino(graph, a.threads), size_of(graph.parent, f"{graph.stem}.*")


def llama(source, a, kind):
    whole, out = (a.folder / f"{name_of(source)}-{kind}.gguf" for kind in ("f16", kind))
    if not whole.exists():
        convert(a.llama_cpp, source, whole, "f16", "smollm")
    if not out.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), a.threads
        llama_cpp.llama_model_quantize(bytes(whole), bytes(out), ctypes.byref(options))
    return LlamaCpp(out, a.threads, max(a.longest, 16 + a.tokens)), out.stat().st_size


DENSE = {
    "eager float32": (eager, "float32"),
    "load(fast=True)": (fast,),
    "torchao int8": (torch_ao, Int8WeightOnlyConfig()),
    "torchao int4": (torch_ao, PrototypeInt4WeightOnlyConfig(group_size=GROUP)),
    "ONNX Runtime float32": (onnx_runtime,),
    "ONNX Runtime int8": (onnx_runtime, 8),
    "ONNX Runtime int4": (onnx_runtime, 4),
    "OpenVINO float16": (open_vino,),
    "OpenVINO int8": (open_vino, "INT8_ASYM"),
    "OpenVINO int4": (open_vino, "INT4_SYM"),
    "llama.cpp Q8_0": (llama, "Q8_0"),
    "llama.cpp Q4_K_M": (llama, "Q4_K_M"),
    "llama.cpp Q4_0": (llama, "Q4_0"),
}
RESULT = {
    "eager as stored": (eager,),
    "load(fast=True)": (fast,),
    "ONNX Runtime": (onnx_runtime,),
    "OpenVINO": (open_vino,),
}


def rows_of(a):
    """`{name of a row: (source, how to make it)}`."""
    found = {f"dense, {name}": (a.dense, *how) for name, how in DENSE.items()}
    for source in a.results:
        size = size_of(source, "*.safetensors") / 1e6
        found |= {f"{size:.0f} MB, {name}": (source, *how) for name, how in RESULT.items()}
    return {name: how for name, how in found.items() if re.search(a.rows, name)}


def name_of(source):
    return "-".join(Path(source).resolve().parts[-2:])  # of two runs' folders, "final" alone would name both


def exported(source, to, folder):
    out = folder / f"{name_of(source)}-{to}"
    return out if out.exists() else export(source, to, out)


def size_of(folder, pattern):
    return sum(path.stat().st_size for path in Path(folder).glob(pattern))
