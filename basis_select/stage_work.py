"""What a stage does in every process: it reads checkpoints, works with the others, and the first of them writes.

Arguments are pickled and sent to all (processes.everywhere).
"""

import dataclasses

import torch
from transformers import set_seed

from . import processes
from .checkpoint.files import save
from .decompose import decompose, targets
from .heal import heal, probes, suitable_rate
from .learn import learn
from .models import load
from .sizes import sizes
from .training.loss import response_nll
from .training.soft_labels import SoftLabels, seen, soft_labels
from .tuned_on import remember


def examples_to_label(r, task, stage):
    """Indices of the training examples that "learn" or "heal" of a recipe wants soft labels of; none if it wants none.

    Healing draws other batches than learning, and looks at `probes` where it chooses its own rate.
    """
    options, healing = getattr(r, stage), stage == "heal"
    more = probes(task, r.seed) if healing and options.lr is None else ()
    if not r.soft_labels or not (options.kl or more):
        return []
    return sorted(seen(task, options.batch_size, options.steps, r.seed + healing) | set(more))


def sendable(task):
    return dataclasses.replace(task, score=None)  # functions of its own cannot be sent


def decompose_in_each(source, task, moments, out, options):
    model, tokenizer = load_here(source / "model")
    decompose(model, task, moments, processes.everyone(), **options)
    remember(model, task.train, task.validation)
    save(model, tokenizer, out / "model")
    return measured(model, task, out) if processes.index() == 0 else None


def label_in_each(parent, dtype, shard, task, top, out):
    soft_labels(load_teacher(parent, dtype, shard), task, top).save(out)


def train_in_each(verb, source, parent, task, out, options, shard):
    set_seed(options["seed"])
    teacher = [load_teacher(*parent, shard)] if parent else []
    # `learn` changes shapes while it trains, and adapters are added later: there every process has the whole model.
    shard = shard and verb is not learn and not options.get("lora")
    if shard and verb is heal and options["lr"] is None:
        # On a copy, because FSDP stays with the dtype in which a model was first used.
        options["lr"] = suitable_rate(load_here(source / "model", None, shard)[0], task, *teacher, options["seed"])
    model, tokenizer = load_here(source / "model", None, shard)
    verb(model, task, *teacher, folder=out, **options)
    save(model, tokenizer, out / "model")
    processes.barrier()
    if shard:  # for the same reason
        model, _ = load_here(out / "model", None, shard)
    return measured(model, task, out)


def load_teacher(parent, dtype, shard):
    """The dense parent as it teaches; int8: its linear layers' weights, a scale for every row, the rest bfloat16.

    A stage that has what it says in place of it: that.
    """
    if not (parent / "model").exists():
        return SoftLabels.load(parent)
    if dtype != "int8":
        return load_here(parent / "model", dtype, shard)[0]
    if shard:
        raise ValueError("teacher=int8 cannot be spread over processes: with --shard choose bfloat16")
    try:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis
    except ImportError:
        raise ValueError("teacher=int8 needs torchao: install it or choose bfloat16") from None
    model, _ = load_here(parent / "model", "bfloat16")
    layers = set(targets(model).values())
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, config, lambda module, name: module in layers)
    return model


def load_here(source, dtype=None, shard=False):
    """`load` onto the device where this process computes: so comes every model that a stage runs, not only rewrites."""
    model, tokenizer = load(source, dtype, sharded=shard)
    return model if shard else model.to(processes.device()), tokenizer


def measured(model, task, out):
    nll = response_nll(model, task.validation, task.pad_id)
    return {"validation_nll": nll, "sizes": sizes(model, out / "model")}
