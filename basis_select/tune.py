"""Fine-tune the dense model on the task: the parent is a model that the task already runs well on."""

from . import processes
from .bases import LowRankLinear
from .embedding import LowRankEmbedding
from .int8 import quantized
from .training.engine import train


def tune(
    model,
    task,
    folder=None,
    seed=0,
    *,
    steps: int = 0,
    batch_size: int = 16,
    lr: float = 1e-4,
    precision: str = "fp32",
    checkpointing: bool = False,
):
    """Train everything but the embeddings on response tokens with cross-entropy, in place; returns the model.

    `precision` and `checkpointing` as in training/engine.py.
    """
    trainable(model)
    options = {"steps": steps, "batch_size": batch_size, "lr": lr, "precision": precision}
    train(model, task, name="tune", seed=seed, folder=folder, checkpointing=checkpointing, **options)
    return model


def trainable(model, embeddings=False):
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
