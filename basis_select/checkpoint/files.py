"""Save, load and check checkpoints. Nothing is half-written, nothing is loaded unchecked."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .. import ranks, tuned_on
from ..bases import groups
from ..int8 import quantized
from .format import METHOD, BasisSelectQuantizer, describe, guards, register, require_version

SIDECAR = "basis_select.json"  # sha256 of every file that was saved
INDEX = "model.safetensors.index.json"
DTYPES = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
AGAIN = "load it with transformers after `import basis_select` and save it with basis_select.save"


def save(model, tokenizer, folder, dtype=None, max_shard_size="5GB"):
    """Write a checkpoint to `folder`: all of it or, if anything fails, none of it.

    `dtype` ("bfloat16", "float32") casts the weights on the way out; the model in memory is not touched. On several
    ranks all call this and the first writes. Raises FileExistsError if `folder` holds anything.
    """
    model = _saveable(model)
    if ranks.rank():
        if ranks.is_sharded(model):
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch, is_main_process=False)  # hands over this rank's part
        return Path(folder)
    with whole(folder) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        # Gathering writes tied tensors twice and leaves out what is beside the state.
        sharded = ranks.is_sharded(model)
        twins = model.all_tied_weights_keys if sharded else {}
        more = revert_weight_conversion(model, guards(model)) if sharded else {}
        if dtype is not None or twins or more:
            _rewrite(partial, dtype, twins, more)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        tuned_on.write(model, partial)
    return Path(folder)


def _saveable(model):
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
        files = {p.name: sha256(p) for p in sorted(partial.iterdir()) if p.is_file()}
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


def _rewrite(folder, dtype, without, more):
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


def check(folder):
    """Raise ValueError, naming the file and the tensor, unless this is the checkpoint that was saved, whole.

    Every file must have its recorded sha256, every tensor be where the index says, and no pickle be among them.
    """
    folder = Path(folder)
    if is_compressed(folder):
        require_version(read_json(folder / "config.json")["quantization_config"].get("format_version"))
    recorded = _recorded(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise ValueError(f"{path} may be a pickle, which is never loaded: remove it, safetensors hold the weights")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in recorded:
            raise ValueError(f"{path} was not part of this checkpoint when it was saved")
    places = stored(folder)
    _check_hashes(folder, recorded)
    _check_index(folder, {name: path.name for name, (path, _) in places.items()})


def check_hashes(folder):
    """Raise ValueError, naming the file, unless every file that was saved is there and has its sha256."""
    _check_hashes(folder, _recorded(folder))


def _check_hashes(folder, recorded):
    for name, digest in recorded.items():
        path = folder / name
        if sha256(path) != digest:
            meant = "" if path.suffix == ".safetensors" else f"; if the change is meant, {AGAIN}"
            raise ValueError(f"{path} is not the file that was saved: its sha256 differs{meant}")


def stored(folder):
    """`{name of a tensor: (file that holds it, safetensors' name of its dtype)}`, from the headers alone."""
    weights = sorted(Path(folder).glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors file")
    found = {}
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                here = {name: (path, file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        if twice := sorted(found.keys() & here.keys()):
            raise ValueError(f"{twice[0]} is in both {found[twice[0]][0]} and {path.name}")
        found |= here
    return found


def _recorded(folder):
    """`{file name: sha256}` of what was saved, and is there."""
    path = folder / SIDECAR
    if not path.exists():
        raise ValueError(f"{folder} has no {SIDECAR}, so its weights cannot be checked: {AGAIN}")
    recorded = read_json(path).get("sha256")
    if not isinstance(recorded, dict) or not recorded:
        raise ValueError(f"{path} lists no hashes")
    for name in recorded:
        if Path(name).name != name:
            raise ValueError(f"{path} names {name!r}, which is no file of this folder")
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing")
    return recorded


def _check_index(folder, places):
    path = folder / INDEX
    if not path.exists():
        if set(places.values()) != {"model.safetensors"}:
            raise ValueError(f"{path} is missing: the weights are in several files")
        return
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(f"{path} has no weight_map")
    for name in sorted(index.keys() | places.keys()):
        if index.get(name) != places.get(name):
            said, found = index.get(name, "no file"), places.get(name, "no file")
            raise ValueError(f"{path} says that {name} is in {said}, it is in {found}")


def read_json(path):
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, it should hold an object")
    return content


def _once(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"it names {next(key for key in keys if keys.count(key) > 1)} twice")
    return dict(pairs)


def is_compressed(folder):
    """Whether this folder's config.json says that it is one of ours."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return False
    return (read_json(path).get("quantization_config") or {}).get("quant_method") == METHOD


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_hash(folder):
    """One digest for all weight files of a checkpoint, from the recorded hash of each."""
    recorded = _recorded(Path(folder))
    digests = [f"{name} {recorded[name]}" for name in sorted(recorded) if name.endswith(".safetensors")]
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
