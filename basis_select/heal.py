"""Retrain the smaller model on task data, taught by its dense parent."""

import logging
import random
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel

from .checkpoint.targets import is_plain
from .data.tasks import Task
from .layers.embedding import RoundedEmbedding
from .layers.group import groups, table_of
from .layers.rounded import quantized, require_wide
from .layers.straight_through import training
from .options import BatchSize, Checkpointing, Natural, Positive, Weight, checked
from .system import processes
from .training.collage import Precision
from .training.data import Batches, require_fit
from .training.engine import train
from .training.loss import task_loss
from .training.precision import CastOnce
from .training.soft_labels import Teacher
from .training.spread import spread
from .tune import trainable

log = logging.getLogger(__name__)
PROBES = 64  # examples on which the distance to the parent is measured
LORA_RATE = 10  # adapters start at zero and are scaled by 1: they need about ten times the rate of the weights
ROUNDED_RATE = 3  # and weights that train with their rounding three times the rate of others


@checked
def heal(
    model: PreTrainedModel,
    task: Task,
    teacher: Teacher | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    sharded: bool = False,
    *,
    steps: Annotated[Natural, Field(description="Training steps of the pruned model; 0: none.")] = 100,
    batch_size: BatchSize = 16,
    lr: Annotated[
        Positive | None,
        Field(
            description="Highest learning rate; without one it follows the distance to the parent: the rate that a "
            "badly damaged model needs would harm a good one."
        ),
    ] = None,
    kl: Annotated[Weight, Field(description="Weight of the parent's predictions in the loss.")] = 1.0,
    embeddings: Annotated[bool, Field(description="Train the embedding and the head too.")] = False,
    precision: Precision = "fp32",
    checkpointing: Checkpointing = False,
    lora: Annotated[
        Natural, Field(description="Train only adapters of this rank, merged in the end; 0: train the factors.")
    ] = 0,
) -> PreTrainedModel:
    """Train factors, norms, biases and layers left dense on response tokens, in place; returns the model.

    Loss: CE + `kl` * KL(teacher || model); `teacher` is the dense parent or its `soft_labels`. Without `lr` it is
    `suitable_rate`. A dense embedding and head stay as they are unless `embeddings`. `precision` and `checkpointing` as
    in training/engine.py: "plus" trains wholly in bfloat16, with 12 bytes a parameter instead of 16. `lora` > 0 trains
    only adapters of that rank on the factors and on layers left dense (peft), and merges them in the end: no rank
    changes, and gradients and states are those of the adapters alone. `sharded` spreads what trains of a model that is
    whole in every process of torchrun over them (training/spread.py). Raises ValueError on bases that are still
    weighted, without both `lr` and `teacher`, and with `lora` on what is sharded.

        >>> model = bs.prune(bs.decompose(copy.deepcopy(parent), task, examples=16), keep=0.5)
        >>> model = bs.heal(model, task, teacher=parent, steps=2, batch_size=4)
    """
    require_fit(model, task)
    processes.join()
    if any(group.weighted for group in groups(model)):
        raise ValueError("these bases are still weighted: call prune before heal")
    if lora and (sharded or processes.is_sharded(model)):
        raise ValueError("a model that is spread over processes cannot take in adapters: load it whole, or pass lora=0")
    if lora:
        require_wide(model, "lora")
    if embeddings and isinstance(model.get_input_embeddings(), RoundedEmbedding):
        raise ValueError("a rounded token embedding does not train: leave out embeddings=True")
    if quantized(model) and processes.is_sharded(model):
        raise ValueError("rounded weights do not train in a model that was loaded sharded: load it whole")
    if lr is None and steps:
        if precision != "fp32" and processes.is_sharded(model):
            raise ValueError("FSDP cannot measure a model in fp32 and then train it in another precision: pass lr")
        lr = suitable_rate(model, task, teacher, seed) * (LORA_RATE if lora else 1)
    with (spread if sharded else training)(model) as trained, CastOnce(teacher):
        if lora:
            add_adapters(trained, lora)
        else:
            trainable(trained, embeddings)
        train(
            trained,
            task,
            name="heal",
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed + 1,  # other batches than learn, which has the same seed, has just seen
            folder=folder,
            teacher=teacher,
            kl=kl,
            precision=precision,
            checkpointing=checkpointing,
        )
        if lora:
            _merge_adapters(trained)
    model.requires_grad_(False)
    return model


def add_adapters(model: PreTrainedModel, rank: int) -> None:
    """LoRA on every linear layer but the head and the bases of the embedding; nothing else trains."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    table = table_of(model)
    left = {model.get_output_embeddings(), *(table.leader.children() if table else ())}
    names = [name for name, m in model.named_modules() if is_plain(m) and m not in left]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)


def _merge_adapters(model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def suitable_rate(model: PreTrainedModel, task: Task, teacher: Teacher | None, seed: int = 0) -> float:
    """`rate_at` of how far `model` is from its parent now."""
    if teacher is None:
        raise ValueError("heal derives the learning rate from the distance to the dense parent: pass a teacher or lr")
    far = distance(model, task, teacher, seed)
    rate = rate_at(far, bool(quantized(model)))
    log.info("KL to the parent %.3g nats per token: healing at a rate of %.2g", far, rate)
    return processes.agreed(lambda: rate)


def rate_at(far: float, rounded: bool) -> float:
    """A learning rate for a model `far` nats from its parent: `1e-4 * far^0.7`, between 1e-5 and 1e-3.

    A good start is harmed by what a broken one needs. If its weights are `rounded`, so that many a small step leaves
    what they are rounded to as it was, three times that. docs/results.md has what that costs on validation splits.

        >>> rate_at(1.0, rounded=False)
        0.0001
    """
    rate = min(max(1e-4 * max(far, 0.0) ** 0.7, 1e-5), 1e-3)  # rounding can leave a KL of zero below it
    return ROUNDED_RATE * rate if rounded else rate


def probes(task: Task, seed: int) -> list[int]:
    """Indices of the training examples that `distance` looks at."""
    return random.Random(seed).sample(range(len(task.train)), min(PROBES, len(task.train)))


@torch.no_grad()
def distance(model: PreTrainedModel, task: Task, teacher: Teacher, seed: int = 0) -> float:
    """KL(teacher || model) in nats per response token of PROBES training examples."""
    examples = [task.train[i] for i in probes(task, seed)]
    batches = Batches(examples, 16, -(-len(examples) // 16), seed, task.pad_id)
    with CastOnce(model), CastOnce(teacher):
        found = [(float(task_loss(model, b, teacher)[2]), int((b["targets"] >= 0).sum())) for b in batches]
    kl, tokens = torch.tensor(found).T
    return float((kl * tokens).sum() / tokens.sum())
