"""Learn on task data which bases matter: only the weights s train, u and v are frozen."""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel

from .data.tasks import Task
from .layers.group import groups
from .linalg.scores import SCORES, ScoreName
from .options import BatchSize, Checkpointing, Natural, Positive, Share, Weight, checked
from .selection import Budget, Rule, cut
from .statistics.derivatives import derivatives
from .target import Target, target
from .training.collage import Precision
from .training.engine import train
from .training.precision import CastOnce
from .training.soft_labels import Teacher


@checked
def learn(
    model: PreTrainedModel,
    task: Task,
    teacher: Teacher | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    keep: float | None = None,
    mass: float | None = None,
    budget: Budget = "global",
    score: ScoreName = "energy",
    multiple_of: int = 16,
    reserve: int = 0,
    *,
    steps: Annotated[
        Natural, Field(description="Training steps of one weight per basis, while bases are pruned; 0: none.")
    ] = 60,
    batch_size: BatchSize = 16,
    lr: Annotated[Positive, Field(description="Highest learning rate, a relative step for every basis alike.")] = 2e-2,
    kl: Annotated[Weight, Field(description="Weight of the parent's predictions in the loss.")] = 1.0,
    rounds: Annotated[Natural, Field(description="Prunings, evenly spread over the steps.")] = 4,
    unpruned: Annotated[Share, Field(description="Share of the steps before the first pruning.")] = 0.0,
    square: Annotated[bool, Field(description="A basis counts by the square of its weight, as in Basel.")] = False,
    new: Annotated[
        Natural, Field(description="New bases per layer that train from the first step and are never pruned (Basel).")
    ] = 0,
    rest: Annotated[bool, Field(description="Train the embedding, norms and biases as well, as in Basel.")] = False,
    precision: Precision = "fp32",
    checkpointing: Checkpointing = False,
) -> PreTrainedModel:
    """Train the weight of every basis, `y = u((v x) * s) + b`, in place; returns the model.

    `s = scale * weight` with `weight` starting at 1, so `lr` is a relative step for every basis alike; `square` is
    Basel's `s = weight^2`. With `keep` or `mass` (these and the next four as in `prune`) bases are set aside while
    learning: `rounds` times, evenly spread over all steps but the first share `unpruned` of them, each leaving the
    same fraction of what is there, so that the weights left adapt to every cut and each step only costs what is alive.
    In the end all bases are there again, with the weight they last had and, in `survived`, how many cuts they
    outlived: `prune` gives any size from that. `new` adds new bases that train from the first step and are never
    pruned (Basel), `rest` trains everything that is not a basis as well: embeddings, norms, biases. `precision` and
    `checkpointing` as in training/engine.py; the weights of bases are fp32 in any.
    Loss: CE + `kl` * KL(teacher || model). Raises ValueError for a model without weighted bases, for more cuts than
    there are steps, for `square` where a weight is negative, and for both `keep` and `mass`.

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> model = bs.learn(model, task, teacher=parent, keep=0.5, steps=4, rounds=2)
        >>> model = bs.prune(model, keep=0.5)
    """
    found = groups(model)
    if not found:
        raise ValueError("there are no bases to learn the weights of: call decompose first")
    asked = None if not steps or (keep is None and mass is None) else target(keep=keep, mass=mass)
    if asked and not 1 <= rounds <= steps - int(unpruned * steps):
        raise ValueError(f"rounds={rounds} prunings do not fit into steps={steps} with unpruned={unpruned}")
    if asked and asked.name == "keep":
        try:
            cut(model, asked, Rule(budget, score, multiple_of, reserve), 1)
        except ValueError as error:  # now, not after the cuts before the last
            raise ValueError(f"learn: {asked}: {error}") from None
    generator = torch.Generator().manual_seed(seed)
    for group in found:
        if square and (group.s < 0).any():
            raise ValueError(f"{group.name} has a negative weight, which no square is: learn it with square=False")
        if square:
            group.leader.s.square()
        if new:
            group.add_new(new, generator)
    weights(model, rest)
    rule = Rule(budget, score, multiple_of, reserve)
    prunings = _Prunings(model, task, seed, steps, rounds, unpruned, asked, rule) if asked else None
    with CastOnce(teacher):
        train(
            model,
            task,
            name="learn",
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            folder=folder,
            teacher=teacher,
            kl=kl,
            precision=precision,
            checkpointing=checkpointing,
            beside=prunings,
        )
    if prunings:
        prunings.restore()
    model.requires_grad_(False)
    return model


def weights(model: PreTrainedModel, rest: bool = False) -> None:
    """What learn trains: the weights of bases, new bases and, with `rest`, everything that is not a basis."""
    model.requires_grad_(rest)
    for group in groups(model):
        for layer in group.layers:
            layer.u.weight.requires_grad_(False)
            if layer.new is not None:
                layer.new.requires_grad_(True)
        group.leader.v.weight.requires_grad_(False)
        group.leader.s.requires_grad_(True)


class _Prunings:
    """Sets bases aside while training, and brings them back afterwards.

    Of each group: `kept`, which bases of the full set are alive, and of the full set `last`, the learned weight with
    which a basis was set aside, and `survived`, the cuts that it outlived: what an interrupted learn needs to continue.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        seed: int,
        steps: int,
        rounds: int,
        unpruned: float,
        asked: Target,
        rule: Rule,
    ):
        self.model, self.task, self.seed, self.rule = model, task, seed, rule
        # A mass is of what is there at each cut.
        self.asked = asked if asked.name == "keep" else target(mass=asked.amount ** (1 / rounds))
        self.groups = groups(model)
        self.full = [group.factors() for group in self.groups]  # `take` copies what stays, so these are not touched
        weights = [group.leader.s for group in self.groups]
        self.kept = [torch.arange(len(s.scale), device=s.scale.device) for s in weights]
        self.last = [s.learned.detach().clone() for s in weights]
        self.survived = [torch.zeros_like(s.survived) for s in weights]
        first = int(unpruned * steps)
        self.at = {first + (steps - first) * k // rounds: rounds - k for k in range(rounds)}  # step: cuts still to come

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step not in self.at:
            return
        rule = self.rule
        if SCORES[rule.score].derivatives:
            rule = dataclasses.replace(rule, derivatives=derivatives(self.model, self.task, self.seed + step))
        for i, (group, index) in enumerate(cut(self.model, self.asked, rule, self.at[step])):
            index = torch.arange(group.rank) if index is None else index
            learned, index = group.leader.s.learned, index.to(self.kept[i].device)
            self.last[i][self.kept[i]] = learned.detach()
            self.kept[i] = self.kept[i][index]
            self.survived[i][self.kept[i]] += 1
            group.take(index)
            moments = optimizer.state.get(learned, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments:
                    moments[name] = moments[name][index]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`{key: tensor}` of what the optimizer and the weights do not say."""
        lists = {"kept": self.kept, "last": self.last, "survived": self.survived}
        return {f"{name}.{i}": x.clone() for name, tensors in lists.items() for i, x in enumerate(tensors)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Cut the bases of a model that has all of them as they were when this state was saved."""
        for i, group in enumerate(self.groups):
            for name, tensors in (("kept", self.kept), ("last", self.last), ("survived", self.survived)):
                tensors[i] = state[f"{name}.{i}"].to(tensors[i].device)
            group.take(self.kept[i])

    def restore(self) -> None:
        for group, full, kept, last, survived in zip(
            self.groups, self.full, self.kept, self.last, self.survived, strict=True
        ):
            us, v, (scale, _, _) = full
            last[kept] = group.leader.s.learned.detach()
            group.put((us, v, (scale, last, survived)))
