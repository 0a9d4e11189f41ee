"""Fine-tune the dense model on the task: the parent is a model that the task already runs well on."""

import logging
import math
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel

from .data.tasks import Task
from .layers.embedding import LowRankEmbedding
from .layers.low_rank import LowRankLinear
from .layers.rounded import require_wide
from .options import BatchSize, Checkpointing, Natural, Positive, checked
from .system import processes
from .training.collage import Precision
from .training.engine import train, trained_value
from .training.loss import response_nll

log = logging.getLogger(__name__)


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
    patience: Annotated[
        Natural,
        Field(
            description="Stop when the loss on the validation split has not fallen for so many epochs, and keep the "
            "best weights; 0: train for all steps and keep the last."
        ),
    ] = 0,
    precision: Precision = "fp32",
    checkpointing: Checkpointing = False,
) -> PreTrainedModel:
    """Train everything but the embeddings on response tokens with cross-entropy, in place; returns the model.

    `patience` looks at the validation split before the first step, after every epoch, and at the end; it holds a copy
    of the best weights. `precision` and `checkpointing` as in training/engine.py. Raises ValueError for `patience` with
    a model that is spread over processes.

        >>> model = bs.tune(copy.deepcopy(parent), task, steps=2, batch_size=4)
    """
    require_wide(model, "tune")
    if patience and processes.is_sharded(model):
        raise ValueError("patience keeps whole weights: leave it out for a model that is spread over processes")
    trainable(model)
    best = _Best(model, task, -(-len(task.train) // batch_size), patience) if patience and steps else None
    options = {"steps": steps, "batch_size": batch_size, "lr": lr, "precision": precision}
    train(model, task, name="tune", seed=seed, folder=folder, checkpointing=checkpointing, beside=best, **options)
    if best:
        best.restore()
    return model


class _Best:
    """Goes along with a training, keeps the weights that the validation split likes best, and ends it in time.

    epoch: steps between looks. What a checkpoint holds of it: `nll` and `waited`, how many looks ago that was, and the
    weights themselves, in the precision in which they train.
    """

    def __init__(self, model: PreTrainedModel, task: Task, epoch: int, patience: int):
        self.model, self.task, self.epoch, self.patience = model, task, epoch, patience
        self.nll, self.waited, self.weights, self.looked = math.inf, 0, {}, -1

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        if step % self.epoch == 0 and step > self.looked:
            self._look(step, optimizer)
        return self.waited >= self.patience

    def _look(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        training = self.model.training
        nll = response_nll(self.model.eval(), self.task.validation, self.task.pad_id)
        self.model.train(training)
        self.looked, self.waited = step, self.waited + 1
        if nll < self.nll:
            self.nll, self.waited = nll, 0
            self.weights = {
                name: (p.detach() if optimizer is None else trained_value(p, optimizer)).clone()
                for name, p in self.model.named_parameters()
                if p.requires_grad
            }
        log.info("validation NLL %.4f after %d steps, the best is %.4f", nll, step, self.nll)

    def state_dict(self) -> dict[str, torch.Tensor]:
        numbers = {"nll": self.nll, "waited": self.waited, "looked": self.looked}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | self.weights

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.weights = dict(state)
        self.nll = self.weights.pop("nll").item()
        self.waited, self.looked = (int(self.weights.pop(name)) for name in ("waited", "looked"))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the trained model: those of the last step, if none were better."""
        if self.waited < self.patience:
            self._look(self.looked + self.epoch, None)
        for name, p in self.model.named_parameters():
            if name in self.weights:
                p.copy_(self.weights[name])


def trainable(model: PreTrainedModel, embeddings: bool = False) -> None:
    """What tune and heal train: every parameter except, unless `embeddings`, the embedding and a dense output head."""
    processes.gather_no_more(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if embeddings:
        return
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(module, LowRankLinear | LowRankEmbedding):
            module.requires_grad_(False)
