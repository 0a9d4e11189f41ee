"""Save, load and check checkpoints. Nothing is half-written, nothing is loaded unchecked."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .. import ranks
from ..bases import groups
from ..int8 import quantized
from .format import METHOD, describe

log = logging.getLogger(__name__)
SIDECAR = "basis_select.json"  # sha256 of every weight file, and what was saved
WEIGHTS = (".safetensors", ".onnx", ".data", ".xml", ".bin")  # the last four are those of exports


def save(model, tokenizer, folder, dtype=None, max_shard_size="5GB"):
    """Write a checkpoint to `folder`: all of it or, if anything fails, none of it.

    `dtype` ("bfloat16", "float32") casts the weights on the way out; the model in memory is not touched. On several
    ranks all call this and the first writes. Raises FileExistsError if `folder` holds anything.
    """
    if ranks.rank():
        if ranks.is_sharded(model):
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch, is_main_process=False)  # hands over this rank's part
        return Path(folder)
    if groups(model) or quantized(model):
        describe(model)
    with whole(folder) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        twins = model.all_tied_weights_keys if ranks.is_sharded(model) else {}  # gathering writes tied tensors twice
        if dtype is not None or twins:
            _rewrite(partial, dtype, twins)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return Path(folder)


@contextlib.contextmanager
def whole(folder):
    """A folder to fill with a checkpoint; it becomes `folder`, hashes added, if the block ends without an error.

    Raises FileExistsError if `folder` holds anything.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        files = {p.name: sha256(p) for p in sorted(partial.iterdir()) if p.suffix in WEIGHTS}
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


def _rewrite(folder, dtype, without):
    """Cast a saved checkpoint (unless `dtype` is None) and drop the tensors named in `without`, shard by shard.

    (save_pretrained takes a state dict, but neither sees tied tensors in a cast one nor uses it for a model that was
    loaded with a quantizer, ours included.)
    """
    size = 0
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
        for name, tensor in tensors.items():
            if dtype is not None and tensor.is_floating_point():
                tensors[name] = tensor.to(getattr(torch, dtype))
            size += tensors[name].nbytes
        save_file(tensors, path, metadata={"format": "pt"})
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["metadata"]["total_size"] = size
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in without}
        path.write_text(json.dumps(index, indent=2))


def check(folder):
    """Raise ValueError, naming the file, unless every weight file is whole and has the recorded sha256."""
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors file")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if not (folder / SIDECAR).exists():
        log.warning("%s has no %s: its hashes cannot be checked", folder, SIDECAR)
        return
    recorded = check_hashes(folder)
    for path in weights:
        if path.name not in recorded:
            raise ValueError(f"{path} was not part of this checkpoint when it was saved")


def check_hashes(folder):
    """The recorded `{file: sha256}`; raises ValueError unless every file is there and has its hash."""
    recorded = json.loads((folder / SIDECAR).read_text())["sha256"]
    for name, digest in recorded.items():
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing")
        if sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is not the file that was saved: its sha256 differs")
    return recorded


def is_compressed(folder):
    """Whether this folder's config.json says that it is one of ours."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return False
    return (json.loads(path.read_text()).get("quantization_config") or {}).get("quant_method") == METHOD


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_hash(folder):
    """One digest for all weight files of a checkpoint."""
    digests = [f"{p.name} {sha256(p)}" for p in sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def probe_logits(model):
    """Logits (2, 16, vocabulary) on fixed token ids: what `verify` compares."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids.to(model.device)).logits.cpu()


def verify(folder, model=None):
    """Reload `folder` in a fresh process and compare logits with `model` (default: loaded here).

    Returns `{"bit_equal": bool, "max_difference": float}`. Raises ValueError if the checkpoint is damaged or
    gives non-finite logits. A model in memory must have the dtype that was saved for equality to be meant.
    """
    from ..models import load

    if model is None:
        model = load(folder)[0]
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "logits.safetensors")
        code = "import sys; from basis_select.checkpoint.files import _dump; _dump(*sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, str(folder), out], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{folder} does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}")
        there = load_file(out)["logits"]
    here = probe_logits(model)
    if not torch.isfinite(there).all():
        raise ValueError(f"{folder} gives non-finite logits")
    return {
        "bit_equal": torch.equal(here, there),
        "max_difference": (here.double() - there.double()).abs().max().item(),
    }


def _dump(folder, out):
    from ..models import load

    save_file({"logits": probe_logits(load(folder)[0])}, out)
