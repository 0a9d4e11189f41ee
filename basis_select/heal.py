"""Retrain the smaller model on task data, taught by its dense parent."""

import logging

import torch

from .bases import groups
from .training.data import Batches
from .training.engine import train
from .training.loss import task_loss
from .tune import trainable

log = logging.getLogger(__name__)
PROBES = 4  # batches on which the distance to the parent is measured


def heal(
    model,
    task,
    teacher=None,
    folder=None,
    seed=0,
    *,
    steps: int = 100,
    batch_size: int = 16,
    lr: float | None = None,
    kl: float = 1.0,
    embeddings: bool = False,
    precision: str = "fp32",
):
    """Train factors, norms, biases and layers left dense on response tokens, in place; returns the model.

    Loss: CE + `kl` * KL(teacher || model); `teacher` is the dense parent. Without `lr` it is `suitable_rate`. Embedding
    and dense head stay as they are unless `embeddings`. `precision` is "fp32" or a variant of training/collage.py:
    "plus" trains wholly in bfloat16, with 12 bytes a parameter instead of 16. Raises ValueError on bases that are
    still weighted, and without both `lr` and `teacher`.
    """
    if any(members[0][1].weighted for members in groups(model)):
        raise ValueError("these bases are still weighted: call prune before heal")
    if lr is None and steps:
        lr = suitable_rate(model, task, teacher, batch_size, seed)
    trainable(model, embeddings)
    train(
        model,
        task,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed + 1,  # other batches than learn, which has the same seed, has just seen
        folder=folder,
        teacher=teacher,
        kl=kl,
        precision=precision,
    )
    model.requires_grad_(False)
    return model


@torch.no_grad()
def suitable_rate(model, task, teacher, batch_size=16, seed=0):
    """A learning rate for how far `model` is from its parent: `1.3e-4 * KL^0.7`, between 1e-5 and 1e-3.

    KL(teacher || model) is in nats per response token, over the first batches of healing. A good start is harmed by
    what a broken one needs. The rule was fitted to searches over the rate, see eval/results/healing_rate.jsonl.
    """
    if teacher is None:
        raise ValueError("how fast to heal is read off the distance to the dense parent: pass a teacher or lr")
    batches = Batches(task.train, batch_size, PROBES, seed + 1, task.pad_id)
    distance = sum(float(task_loss(model, batches[i], teacher)[2]) for i in range(PROBES)) / PROBES
    rate = min(max(1.3e-4 * distance**0.7, 1e-5), 1e-3)
    log.info("KL to the parent %.3g nats per token: healing at a rate of %.2g", distance, rate)
    return rate
