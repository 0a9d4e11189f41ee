"""Where models come from: the hub, a folder, a PEFT adapter, a GGUF file, a wheel that ships one."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from . import ranks, tuned_on
from .checkpoint import files, hub
from .embedding import settle_ties
from .int8 import quantized
from .runtime import MANIFEST, load_export

log = logging.getLogger(__name__)


def load(source, dtype=None, sharded=False):
    """`(model, tokenizer)` from `source`, in eval mode.

    source: a hub id or local folder (ours or any other checkpoint), a folder with a PEFT adapter (merged into its
    base), an ONNX export (runtime.py), a `.gguf` file, or `wheel:NAME==VERSION#sha256=HEX`, a Python package that ships
    a GGUF file. dtype: "float32", "bfloat16" or "float16"; None keeps the saved one (float32 for GGUF). A checkpoint
    that `save` wrote, here or on the hub, is checked against its recorded hashes, and nothing loads unless every weight
    is there and finite. `sharded` spreads the parameters of a checkpoint folder over the ranks of torchrun, who must
    all call this (ranks.layout). Raises ValueError or FileNotFoundError with what is wrong and where.
    """
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype!r}; known are float32, bfloat16, float16")
    source, gguf = _resolve(source)
    if gguf:
        dense = {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
        return _load(source, dtype or "float32", **dense)
    path = hub.snapshot(source) or Path(source)
    if (path / MANIFEST).exists():
        return load_export(path, dtype)
    if (path / "adapter_config.json").exists():
        return _merge_adapter(path, dtype)
    saved = files.is_compressed(path) or (path / files.SIDECAR).exists()
    if saved:
        files.check(path)
        source = str(path)
    model, tokenizer = _load(source, dtype or "auto", distributed_config=ranks.layout() if sharded else None)
    if saved:
        _check_values(model, tokenizer, path, dtype)
        tuned_on.read(model, path)
    return model, tokenizer


def config_and_tokenizer(source):
    """`(config, tokenizer)` of what `load(source)` would give, without its weights."""
    source, gguf = _resolve(source)
    adapter = Path(source) / "adapter_config.json"
    if adapter.exists():
        return config_and_tokenizer(_base_of(adapter))
    more = {"gguf_file": gguf} if gguf else {}
    return AutoConfig.from_pretrained(source, **more), AutoTokenizer.from_pretrained(source, **more)


def _resolve(source):
    """`(hub id or folder, name of the GGUF file in it or None)`."""
    source = str(source)
    if source.startswith("wheel:"):
        source = _from_wheel(source)
    path = Path(source)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {path}")
        return str(path.parent), path.name
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{path} is a folder without a config.json: not a model")
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"there is no model folder at {source}")
    return source, None


def _load(source, dtype, **kwargs):
    tokenizer_kwargs = {k: v for k, v in kwargs.items() if k == "gguf_file"}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_kwargs)
    except RuntimeError as error:
        raise ValueError(f"{source} does not load: {' '.join(str(error).split())[:300]}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            first, *shapes = min(key if isinstance(key, tuple) else (key,) for key in info[what])
            first += " ({} in the file, {} in the model)".format(*map(list, shapes)) if shapes else ""
            raise ValueError(
                f"{source} does not fit its config.json: {len(info[what])} {what.replace('_', ' ')}, first {first}"
            )
    settle_ties(model)
    if tokenizer_kwargs:  # the weights are plain again: later saves must not claim otherwise
        model.config.quantization_config = None
        del model.config.quantization_config
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _check_values(model, tokenizer, path, dtype):
    """Raise ValueError unless every number is finite, none was rounded and every token has a row."""
    saved = {name: files.DTYPES.get(kind) for name, (_, kind) in files.stored(path).items()}
    whole = {*dict(model.named_buffers()), *(f"{name}.q" for name in quantized(model))}  # of any dtype
    for name, tensor in model.state_dict().items():
        here = ranks.local(tensor)
        if here.is_floating_point() and here.numel() and not torch.stack(here.aminmax()).isfinite().all():
            raise ValueError(f"{path} holds numbers that are not finite in {name}")
        kept = saved.get(name, here.dtype)
        if kept == here.dtype and name in whole:
            continue
        rounded = not dtype and kept and torch.promote_types(kept, here.dtype) != here.dtype
        if kept is None or not kept.is_floating_point or rounded:
            raise ValueError(f"{path} holds {name} as {kept}, its config.json asks for {model.dtype}")
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise ValueError(f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, the model knows {rows}")


def _merge_adapter(path, dtype):
    from peft import PeftModel

    model, tokenizer = load(_base_of(path / "adapter_config.json"), dtype)
    merged = PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
    if (path / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(path)
    return merged.eval(), tokenizer


def _base_of(adapter):
    base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} does not name its base model")
    return base


def _from_wheel(source):
    """Path of the GGUF file inside a wheel: downloaded once without its dependencies, checked, cached."""
    match = re.fullmatch(r"wheel:([A-Za-z0-9._-]+)==([A-Za-z0-9._]+)#sha256=([0-9a-f]{64})", source)
    if not match:
        raise ValueError(f"{source} should read wheel:NAME==VERSION#sha256=HEX, HEX being the wheel's sha256")
    name, version, digest = match.groups()
    cache = Path(os.environ.get("BASIS_SELECT_CACHE", Path(constants.HF_HOME) / "basis_select")) / digest[:16]
    found = sorted(cache.glob("*.gguf"))
    if found:
        return str(found[0])
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        log.warning("downloading %s==%s", name, version)
        done = subprocess.run([*command, "--dest", scratch, f"{name}=={version}"], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise FileNotFoundError(f"{name}=={version} could not be downloaded: {last}")
        actual = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if actual != digest:
            raise ValueError(f"{wheels[0].name} has sha256 {actual}, not {digest}: refused")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [n for n in wheel.namelist() if n.endswith(".gguf")]
            if not inside:
                raise ValueError(f"{wheels[0].name} ships no .gguf file")
            unpacked = Path(scratch) / "unpacked"
            for member in inside:
                (unpacked / Path(member).name).parent.mkdir(exist_ok=True)
                with wheel.open(member) as src, open(unpacked / Path(member).name, "wb") as dst:
                    while block := src.read(1 << 20):
                        dst.write(block)
        if not cache.exists():
            unpacked.rename(cache)
    return str(next(cache.glob("*.gguf")))
