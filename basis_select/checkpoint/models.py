"""Where models come from: the hub, a folder, a PEFT adapter, a GGUF file, a wheel that ships one."""

import contextlib
import functools
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data import tuned_on
from ..layers.embedding import settle_ties
from ..layers.rounded import quantized
from ..system import processes
from ..system.machine import cache
from ..system.reading import read_json, sha256
from ..target import BYTES, Dtype
from . import checks
from .bounds import require_bounds
from .cleaning import masked
from .fast import ready
from .format import in_files
from .runtime import MANIFEST, OnnxModel, load_export
from .snapshot import snapshot

log = logging.getLogger(__name__)

_GGUF = threading.Lock()  # what changes the package for a while is done by one thread at a time


def load(
    source: str | Path, dtype: Dtype | None = None, sharded: bool = False, fast: bool | str = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`(model, tokenizer)` from `source`, in eval mode.

    source: a hub id or local folder (ours or any other checkpoint), a folder with a PEFT adapter (merged into its
    base), an ONNX export (runtime.py), a `.gguf` file, or `wheel:NAME==VERSION#sha256=HEX`, a Python package that ships
    a GGUF file. dtype: "float32", "bfloat16" or "float16"; None keeps the saved one (float32 for GGUF). A checkpoint
    that `save` wrote, here or on the hub, is checked against its recorded hashes, and nothing loads unless every weight
    is there and finite. `sharded` spreads the parameters of a checkpoint folder over the processes of torchrun, which
    must all call this (processes.layout). `fast`, True or the name of a device, prepares the model for answering alone,
    on the CPU or there (fast.py): layers that read the same tensor are stacked, and what decodes a token or reads a
    prompt is compiled. Raises ValueError or FileNotFoundError with what is wrong and where.

        >>> parent, tokenizer = bs.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
    """
    if fast and sharded:
        raise ValueError("what is sharded cannot be loaded with fast=True, which prepares a model on one device")
    if fast:
        model, tokenizer = load(source, dtype)
        if isinstance(model, OnnxModel):
            raise ValueError(f"{source} is an ONNX export, which ONNX Runtime makes fast: load it without fast=True")
        return ready(model.to("cpu" if fast is True else fast)), tokenizer
    if dtype is not None and dtype not in BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(BYTES)}")
    source, gguf = _resolve(source)
    if gguf:
        dense = {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
        checks.require_files(source)
        if (Path(source) / checks.ADAPTER).exists():
            raise ValueError(f"an adapter lies beside the GGUF file in {source}: give the file a folder of its own")
        return _load(source, dtype or "float32", **dense)
    path = snapshot(source) or Path(source)
    if not path.is_dir():
        return _load(source, dtype or "auto")
    checks.require_files(path)
    if (path / MANIFEST).exists():
        return load_export(path, dtype)
    saved = checks.is_saved(path)
    with checks.checked(path) if saved else contextlib.nullcontext():
        if _is_adapter(path):
            return _merge_adapter(path, dtype)
        with _reading(path):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            require_bounds(path, config)
            if (path / "generation_config.json").exists():  # transformers would go on without a damaged one
                GenerationConfig(**read_json(path / "generation_config.json"))
        layout = processes.layout() if sharded else None
        model, tokenizer = _load(str(path), dtype or "auto", distributed_config=layout)
        if saved:
            _check_dtypes(model, path, dtype)
            tuned_on.read(model, path)
    return model, tokenizer


def config_and_tokenizer(source: str | Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """`(config, tokenizer)` of what `load(source)` would give, without its weights."""
    source, gguf = _resolve(source)
    path = Path(source)
    if path.is_dir():
        checks.require_files(path)
        if not gguf and _is_adapter(path):
            return config_and_tokenizer(_base_of(path))
    more = {"gguf_file": gguf} if gguf else {}
    with _reading(source), _gguf_once(gguf):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **more)
        return config, AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)


def _resolve(source: str | Path) -> tuple[str, str | None]:
    """`(hub id or folder, name of the GGUF file in it or None)`."""
    source = str(source)
    if source.startswith("wheel:"):
        source = from_wheel(source)
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


@contextlib.contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Whatever libraries raise over files that are damaged becomes one ValueError that names their folder."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:  # of the hub it names the address, which may hold a password
        if Path(source).exists() and masked(error) == str(error):
            raise
        raise OSError(f"{source} does not load: {masked(error)}") from None
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            text = "it needs code of its own (auto_map), which is never run"
        elif isinstance(error, ValueError) and str(source) in text:
            raise
        said = text if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"{source} does not load: {said}") from error


@contextlib.contextmanager
def _gguf_once(file: str | None) -> Iterator[None]:
    """Within it transformers reads a GGUF file, if there is one, once: not for config, tokenizer and weights anew. And
    it makes the table of names of tensors once, not for each module. These are two thirds of the time of loading one.
    """
    if not file or not find_spec("gguf"):  # transformers says so, where it is needed
        yield
        return
    import gguf  # not everyone has it

    with _GGUF:
        before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, function in before.items():
                setattr(gguf, name, functools.cache(function))
            yield
        finally:
            for name, function in before.items():
                setattr(gguf, name, function)


def _load(source: str, dtype: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer_kwargs = {k: v for k, v in kwargs.items() if k == "gguf_file"}
    with _reading(source), _gguf_once(kwargs.get("gguf_file")):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=False,
            **kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **tokenizer_kwargs)
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
    _check_finite(model, source)
    _check_tokens(model, tokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _check_finite(model: PreTrainedModel, source: str | Path) -> None:
    """Raise ValueError, naming the tensor, unless every number is finite."""
    for name, tensor in model.state_dict().items():
        here = processes.local(tensor)
        if here.is_floating_point() and here.numel() and not torch.stack(here.aminmax()).isfinite().all():
            raise ValueError(f"{source} holds numbers that are not finite in {name} ({here.dtype})")


def _check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """Raise ValueError, naming the token, unless the model has a row for every token that text can become."""
    rows = model.get_input_embeddings().num_embeddings
    # Gemma 3's tokenizer has one token for an image, which its models for text alone have no row for.
    other = {t for name, t in tokenizer.special_tokens_map.items() if name.startswith(("image", "audio", "video"))}
    # Qwen's class adds its unknown token to every vocabulary; no text becomes it unless tokenizer.json says so.
    other.add(tokenizer.unk_token)
    ids = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token not in other}
    if ids:
        token = max(ids, key=ids.get)
        raise ValueError(f"the tokenizer in {source} has {token!r} as token {ids[token]}, the model knows {rows}")


def _check_dtypes(model: PreTrainedModel, path: Path, dtype: Dtype | None) -> None:
    """Raise ValueError, naming the tensor, unless the model holds what was saved, not rounded."""
    saved = {name: checks.DTYPES.get(place.dtype) for name, place in checks.stored(path).items()}
    of_any = {*in_files(model, dict(model.named_buffers()))}
    of_any |= {f"{name}.{part}" for name in quantized(model) for part in ("q", "scale")}
    for name, tensor in in_files(model, model.state_dict()).items():
        kept = saved.get(name, tensor.dtype)
        if kept == tensor.dtype and name in of_any:
            continue
        rounded = not dtype and kept and torch.promote_types(kept, tensor.dtype) != tensor.dtype
        if kept is None or not kept.is_floating_point or rounded:
            raise ValueError(f"{path} holds {name} as {kept}, its config.json asks for {model.dtype}")


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter alone. Raises ValueError if it holds a model as well."""
    if not (path / checks.ADAPTER).exists():
        return False
    if any(path.glob("model*.safetensors")):
        raise ValueError(f"{path} holds a model and, by its {checks.ADAPTER}, an adapter: keep them apart")
    return True


def _merge_adapter(path: Path, dtype: Dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    weights = path / "adapter_model.safetensors"
    if not weights.exists():
        raise ValueError(f"{weights} is missing: adapters are read from safetensors alone")
    here = checks.stored(path)
    model, tokenizer = load(_base_of(path), dtype)
    with _reading(path):
        adapted = PeftModel.from_pretrained(model, path)
        fits = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
        for name in sorted(fits.keys() ^ here.keys()):
            raise ValueError(f"{weights} fits its base in part: {name} is {'missing' if name in fits else 'left over'}")
        merged = adapted.merge_and_unload(safe_merge=True).eval()
        if (path / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _check_finite(merged, path)
    _check_tokens(merged, tokenizer, path)
    return merged, tokenizer


def _base_of(path: Path, seen: tuple[Path, ...] = ()) -> str:
    """What an adapter names as its base."""
    adapter = path / checks.ADAPTER
    base = read_json(adapter).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter} does not name its base model")
    seen = (*seen, path.resolve())
    if Path(base).resolve() in seen:
        raise ValueError(f"{adapter} names itself as its base model, or an adapter of itself")
    if (Path(base) / checks.ADAPTER).exists():
        _base_of(Path(base), seen)  # so that a circle is found here
    return base


def from_wheel(source: str) -> str:
    """Path of the GGUF file inside a wheel: downloaded once without its dependencies, checked, cached."""
    match = re.fullmatch(r"wheel:([A-Za-z0-9._-]+)==([A-Za-z0-9._]+)#sha256=([0-9a-f]{64})", source)
    if not match:
        raise ValueError(f"{source} should read wheel:NAME==VERSION#sha256=HEX, HEX being the wheel's sha256")
    name, version, digest = match.groups()
    folder = cache() / digest[:16]
    found = sorted(folder.glob("*.gguf"))
    if found:
        return str(found[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        log.warning("downloading %s==%s", name, version)
        done = subprocess.run([*command, "--dest", scratch, f"{name}=={version}"], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise FileNotFoundError(f"{name}=={version} could not be downloaded: {last}")
        actual = sha256(wheels[0])
        if actual != digest:
            raise ValueError(f"{wheels[0].name} has sha256 {actual}, not {digest}: refused")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [n for n in wheel.namelist() if n.endswith(".gguf")]
            if not inside:
                raise ValueError(f"{wheels[0].name} ships no .gguf file")
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            for member in inside:
                with wheel.open(member) as src, open(unpacked / Path(member).name, "wb") as dst:
                    shutil.copyfileobj(src, dst)
        if not folder.exists():
            unpacked.rename(folder)
    return str(next(folder.glob("*.gguf")))
