"""Retrain the smaller model on task data, taught by its dense parent."""

from .bases import groups
from .training.engine import train
from .tune import trainable


def heal(
    model,
    task,
    teacher=None,
    folder=None,
    seed=0,
    *,
    steps: int = 100,
    batch_size: int = 16,
    lr: float = 3e-5,
    kl: float = 1.0,
    embeddings: bool = False,
):
    """Train factors, norms, biases and layers left dense on response tokens, in place; returns the model.

    A good start (the kronecker metric, learned weights) needs a gentle `lr`, a broken one (plain) about ten times as
    much. Loss: CE + `kl` * KL(teacher || model); `teacher` is the dense parent. Embedding and dense head stay as they
    are unless `embeddings`.
    """
    if any(members[0][1].weighted for members in groups(model)):
        raise ValueError("these bases are still weighted: call prune before heal")
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
    )
    model.requires_grad_(False)
    return model
