"""Fine-tune the dense model on the task: the parent is a model that the task already runs well on."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from transformers import PreTrainedModel

from .data.tasks import Task
from .layers.embedding import LowRankEmbedding
from .layers.low_rank import LowRankLinear
from .layers.rounded import quantized
from .options import BatchSize, Checkpointing, Natural, Positive, checked
from .system import processes
from .training.collage import Precision
from .training.engine import train


@checked
def tune(
    model: PreTrainedModel,
    task: Task,
    folder: str | Path | None = None,
    seed: int = 0,
    *,
    steps: Annotated[
        Natural, Field(description="Training steps of the dense model on the task before anything else.")
    ] = 0,
    batch_size: BatchSize = 16,
    lr: Annotated[Positive, Field(description="Highest learning rate.")] = 1e-4,
    precision: Precision = "fp32",
    checkpointing: Checkpointing = False,
) -> PreTrainedModel:
    """Train everything but the embeddings on response tokens with cross-entropy, in place; returns the model.

    `precision` and `checkpointing` as in training/engine.py.

        >>> model = bs.tune(copy.deepcopy(parent), task, steps=2, batch_size=4)
    """
    trainable(model)
    options = {"steps": steps, "batch_size": batch_size, "lr": lr, "precision": precision}
    train(model, task, name="tune", seed=seed, folder=folder, checkpointing=checkpointing, **options)
    return model


def trainable(model: PreTrainedModel, embeddings: bool = False) -> None:
    """What tune and heal train: every parameter except, unless `embeddings`, the embedding and a dense output head."""
    if quantized(model):
        raise ValueError("int8 weights do not train: train the checkpoint that they were rounded from")
    processes.gather_no_more(model)
    model.requires_grad_(True)
    if embeddings:
        return
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(module, LowRankLinear | LowRankEmbedding):
            module.requires_grad_(False)
