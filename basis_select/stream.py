"""The decomposition of a model that does not fit into memory: from shards on disk to shards on disk.

    bs.decompose_checkpoint("llama-70b", "llama-70b-bases", metric="plain", keep=0.5)

Layers that share a basis are read, decomposed and written before the next are read. Their factors wait in files until
the shards are written from these, so no shard is ever held in memory and the disk needs room for the factors twice.
"""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from .checkpoint.build import build
from .checkpoint.checks import is_compressed
from .checkpoint.files import save_tokenizer, whole
from .checkpoint.format import BasisSelectConfig, describe, guards, in_files
from .checkpoint.models import config_and_tokenizer, load
from .checkpoint.targets import targets
from .data import tuned_on
from .data.tasks import Task
from .decompose import Examples, Metric, Sharing, factored, reached, require_range
from .layers.group import Group
from .linalg import metrics
from .linalg.metrics import METRICS
from .options import Fraction, checked
from .selection import rank_below
from .statistics.moments import Moments, moment_bytes, moment_room, passes, second_moments
from .statistics.readers import dense_groups
from .system.progress import progress
from .target import Dtype, Target, target
from .training.data import require_fit


@checked
@torch.no_grad()
def decompose_checkpoint(
    source: str | Path,
    folder: str | Path,
    task: Task | None = None,
    moments: Moments | None = None,
    *,
    metric: Metric = "kronecker",
    share: Sharing = True,
    examples: Examples = 256,
    keep: Fraction | None = None,
    dtype: Dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Decompose the checkpoint in the folder `source` into `folder`, all of it or none; returns `folder`.

    The files are those that `load(source, dtype)`, `decompose` and `save` would write, but no more than one group of
    layers is in memory. metric, share, examples: as in `decompose`. A metric that uses second moments takes them from
    `moments`, `(inputs, outputs, samples)` as from `second_moments` (any mappings will do, each is asked for one group
    at a time), or from `task`: then the dense model is loaded as well, and they are collected in passes as `decompose`
    does it. keep: of every group only its best bases, so many that they have fewer parameters than this fraction of
    the dense layers (with 1 the result is no larger than the source): what `prune` removes at such sizes need not be
    stored, but it can no longer leave such a layer dense. Raises ValueError or FileNotFoundError, with the file and the
    tensor and before anything is written, for a source that is not whole.

        >>> bs.decompose_checkpoint("parent", "bases", metric="plain", keep=0.5)
        PosixPath('bases')
    """
    source, uses = Path(source), METRICS[metric]
    measured = moments is None and bool(uses.inputs or uses.outputs)
    if measured and task is None:
        raise ValueError(f"metric {metric!r} needs second moments: pass a task or moments, or use metric 'plain'")
    asked = None if keep is None else target(keep=keep)
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"{source} is not a model folder: it has no config.json")
    if is_compressed(source):
        raise ValueError(f"{source} is decomposed already")
    config, tokenizer = config_and_tokenizer(source)
    files = _files(source)
    dtype = getattr(torch, dtype) if dtype else config.dtype or _read(files, next(iter(files))).dtype
    require_range(dtype)
    model = _skeleton(config, dtype, files)
    if (source / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source)
    _check(source, files, _tensors(model))
    groups = [group for group in dense_groups(model, targets(model), None, share) if reached(group, moments, uses)]
    parts = [groups]
    if measured:
        require_fit(model, task)
        parent = load(source, str(dtype).removeprefix("torch."))[0]
        parts = passes(groups, [moment_bytes(group.shape, uses) for group in groups], moment_room(parent.device, 0))
    ranks = {name: rank for group in groups for rank in [_rank(group, asked)] for name in group.names}
    build(model, BasisSelectConfig(ranks, [list(g.names) for g in groups if len(g.names) > 1], weighted=1))
    describe(model)
    tuned_on.read(model, source)
    if measured:
        tuned_on.remember(model, task.train, task.validation)
    with whole(folder) as partial:
        tensors = _tensors(model)
        waiting = partial / "waiting"
        waiting.mkdir()
        for part in parts:
            names, found = [group.names for group in part], moments
            if measured:
                found = second_moments(parent, names, task, examples, uses)
            for group in progress(part, "decompose", "group"):
                if not reached(group, found, uses):
                    raise ValueError(f"{', '.join(group.names)} is never reached by the task's data")
                factors = _factors(model, group, files, found, uses, ranks[group.name])
                _put(factors, waiting / group.name, files)
                del factors  # before the next group is read
            del found
        for name, tensor in tensors.items():
            if tensor.numel() and (stored := _read(files, name)).dtype != tensor.dtype:
                _put({name: stored.to(tensor.dtype)}, waiting / name, files)
        _write_shards(partial, tensors, files, max_shard_size, model.num_parameters())
        shutil.rmtree(waiting)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        tuned_on.write(model, partial)
    return Path(folder)


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype, files: dict[str, Path]) -> PreTrainedModel:
    """The model on the meta device, its head tied as the tensors in the files are, not as the config says."""
    # Of the ways to compute experts this one takes any dtype and looks at no values.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False, experts_implementation="batched_mm"
        )
    for names in model.all_tied_weights_keys.items():
        stored = [name for name in names if name in files]
        if len(stored) == 2 and not torch.equal(*(_read(files, name) for name in stored)):
            config.tie_word_embeddings = False
            return _skeleton(config, dtype, files)
    return model


def _files(source: Path) -> dict[str, Path]:
    """`{name of a tensor: file that holds it}`."""
    index = source / "model.safetensors.index.json"
    if index.exists():
        return {name: source / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    path = source / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{source} holds neither {path.name} nor {index.name}")
    with _opened(path, "any tensor") as file:
        return dict.fromkeys(file.keys(), path)


def _opened(path: Path, name: str) -> safe_open:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it should hold {name}")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file, {name} cannot be read: {error}") from None


def _check(source: Path, files: dict[str, Path], tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless every one of `tensors` is in its file, whole and of that shape. Only headers are read."""
    for name in tensors:
        if name not in files:
            raise ValueError(f"{source} holds no tensor {name}, which its config.json asks for")
    for path in dict.fromkeys(files.values()):
        names = [name for name in tensors if files[name] == path]
        with _opened(path, names[0] if names else "nothing that is needed") as file:
            held = set(file.keys())
            for name in names:
                if name not in held:
                    raise ValueError(f"{path} does not hold {name}, which the index says it does")
                shape, wanted = file.get_slice(name).get_shape(), list(tensors[name].shape)
                if shape != wanted:
                    raise ValueError(f"{path} holds {name} of shape {shape}, config.json asks for {wanted}")


def _read(files: dict[str, Path], name: str) -> torch.Tensor:
    """A tensor whose memory is the mapped file: its pages go when it does."""
    with safe_open(files[name], "pt") as file:
        return file.get_tensor(name)


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """`{name: tensor, on the meta device or empty}` of everything that a checkpoint of this model holds."""
    state, tied = in_files(model, model.state_dict()) | guards(model), model.all_tied_weights_keys
    names = sorted((name for name in state if name not in tied), key=dot_natural_key)  # as a loaded model is saved
    stored = revert_weight_conversion(model, {name: state[name] for name in names})
    return {name: tensor.clone() for name, tensor in stored.items()}  # not a view: its own size is what is asked for


def _rank(group: Group, asked: Target | None) -> int:
    if asked is None:
        return group.shape.full_rank
    rank = rank_below(group.shape, asked.amount)
    if rank < 1:
        raise ValueError(f"{asked} leaves no basis in {group.name}, {group.shape}")
    return rank


def _factors(
    model: PreTrainedModel,
    group: Group,
    files: dict[str, Path],
    moments: Moments | None,
    uses: metrics.Metric,
    rank: int,
) -> dict[str, torch.Tensor]:
    """`{name: tensor}` of what a checkpoint holds instead of the weights of a group, whose layers have no values."""
    dense = Group(group.names, [_linear(model, name, layer, files) for name, layer in group.items()])
    made = zip(group.names, factored(dense, moments, uses, rank), strict=True)
    state = {f"{name}.{key}": tensor for name, layer in made for key, tensor in layer.state_dict().items()}
    return revert_weight_conversion(model, in_files(model, state))


def _linear(model: PreTrainedModel, name: str, meta: nn.Module, files: dict[str, Path]) -> nn.Linear:
    """The nn.Linear of which `meta` is the shape, with its weights."""
    linear = nn.Linear(meta.in_features, meta.out_features, meta.bias is not None, device="meta")
    values = {}
    for part, like in meta.named_parameters():
        (stored,) = revert_weight_conversion(model, {f"{name}.{part}": like})
        values[part] = _read(files, stored).to(like.dtype)
    linear.load_state_dict(values, assign=True)
    return linear


def _put(tensors: dict[str, torch.Tensor], path: Path, files: dict[str, Path]) -> None:
    """Write tensors to a file where they wait until shards are written, and say so in `files`."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    files |= dict.fromkeys(tensors, path)


def _write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, Path], max_shard_size: str | int, parameters: int
) -> None:
    """Weights and index of a checkpoint of `tensors`, which are empty or in `files`.

    A shard is written from mapped files, so that it is never in memory as a whole.
    """
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        found = {name: _read(files, name) if tensors[name].numel() else tensors[name] for name in names}
        save_file(found, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
