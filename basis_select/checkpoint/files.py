"""Save checkpoints, all or nothing."""

import contextlib
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import psutil
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ..data import tuned_on
from ..layers.group import groups
from ..layers.rounded import quantized
from ..system import processes
from ..system.reading import sha256
from ..target import Dtype
from .checks import SIDECAR
from .format import BasisSelectQuantizer, describe, guards, register
from .pieces import NAME, tokenizer_model


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: Dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a checkpoint to `folder`: all of it or, if anything fails, none of it.

    `dtype` ("bfloat16", "float32") casts the weights on the way out; the model in memory is not touched. On several
    processes all call this and the first writes. Raises FileExistsError if `folder` holds anything.

        >>> bs.save(parent, tokenizer, "smaller", dtype="bfloat16")
        PosixPath('smaller')
    """
    model = _saveable(model)
    if processes.index():
        if processes.is_sharded(model):
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch, is_main_process=False)  # hands over this process's part
        return Path(folder)
    with whole(folder) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        # Gathering writes tied tensors twice and leaves out what is beside the state.
        sharded = processes.is_sharded(model)
        twins = model.all_tied_weights_keys if sharded else {}
        more = revert_weight_conversion(model, guards(model)) if sharded else {}
        if dtype is not None or twins or more:
            _rewrite(partial, dtype, twins, more)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        tuned_on.write(model, partial)
    return Path(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all files of a tokenizer into `folder`, its tokenizer.model too where it has one."""
    tokenizer.save_pretrained(folder)
    if content := tokenizer_model(tokenizer):
        (folder / NAME).write_bytes(content)


def _saveable(model: torch.nn.Module) -> PreTrainedModel:
    """The model of transformers in what DDP or torch.compile made of it, described as it is."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, PreTrainedModel):
        hint = ": merge the adapters first (merge_and_unload)" if hasattr(model, "merge_and_unload") else ""
        raise ValueError(f"{type(model).__name__} is not a model of transformers and cannot be saved{hint}")
    if isinstance(getattr(model, "hf_quantizer", None), BasisSelectQuantizer) or groups(model) or quantized(model):
        register(model)
    elif getattr(model, "hf_quantizer", None) is None:
        describe(model)
    return model


@contextlib.contextmanager
def whole(folder: str | Path) -> Iterator[Path]:
    """A folder to fill with a checkpoint; it becomes `folder`, hashes added, if the block ends without an error.

    What a process that was killed has left of it is removed. Raises FileExistsError if `folder` holds anything.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = f".{folder.name}-{platform.node()}-"
    for left in folder.parent.glob(f"{glob.escape(own)}*"):
        process = left.name.removeprefix(own).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{own}{os.getpid()}-", dir=folder.parent))
    try:
        yield partial
        files = {p.relative_to(partial).as_posix(): sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / SIDECAR).write_text(json.dumps({"sha256": files}, indent=1))
        if folder.exists():
            folder.rmdir()
        os.chmod(partial, 0o755)  # temporary files and folders are made for their owner alone
        for path in partial.glob("*.*"):
            path.chmod(0o644 if path.is_file() else 0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _rewrite(folder: Path, dtype: Dtype | None, without: Container[str], more: Mapping[str, torch.Tensor]) -> None:
    """Cast a saved checkpoint (unless `dtype` is None), drop the tensors in `without` and add `more`, shard by shard.

    (save_pretrained takes a state dict, but neither sees tied tensors in a cast one nor uses it for a model that has a
    quantizer, ours included.)
    """
    size, first = 0, None
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
        if first is None:
            first = path.name
            tensors |= more
        for name, tensor in tensors.items():
            if dtype is not None and tensor.is_floating_point():
                tensors[name] = tensor.to(getattr(torch, dtype))
                if tensor.isfinite().all() and not tensors[name].isfinite().all():
                    raise ValueError(f"{name} has numbers that {dtype} cannot hold: save it in float32 or bfloat16")
            size += tensors[name].nbytes
        save_file(tensors, path, metadata={"format": "pt"})
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["metadata"]["total_size"] = size
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in without}
        index["weight_map"] |= dict.fromkeys(more, first)
        path.write_text(json.dumps(index, indent=2))
