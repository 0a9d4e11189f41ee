"""Learn on task data which bases matter: only the weights s train, u and v are frozen."""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel, TrainerCallback

from .bases import add_new, groups, resize
from .derivatives import derivatives
from .linalg.budget import Budget
from .linalg.scores import SCORES, ScoreName
from .options import BatchSize, Checkpointing, Natural, Positive, Share, Weight, checked
from .prune import select, shrink
from .tasks import Task
from .training.collage import Precision
from .training.engine import train
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
    Loss: CE + `kl` * KL(teacher || model).

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> model = bs.learn(model, task, teacher=parent, keep=0.5, steps=4, rounds=2)
        >>> model = bs.prune(model, keep=0.5)
    """
    found = groups(model)
    if not found:
        raise ValueError("there are no bases to learn the weights of: call decompose first")
    cut = {"keep": keep, "mass": mass, "budget": budget, "score": score, "multiple_of": multiple_of, "reserve": reserve}
    cuts = keep is not None or mass is not None
    if cuts and not 1 <= rounds <= steps - int(unpruned * steps):
        raise ValueError(f"rounds={rounds} prunings do not fit into steps={steps} with unpruned={unpruned}")
    generator = torch.Generator().manual_seed(seed)
    for members in found:
        leader = members[0][1].leader
        if square and (leader.s < 0).any():
            raise ValueError(f"{members[0][0]} has a negative weight, which no square is: learn it with square=False")
        if square and leader.power == 1:
            leader.weight.data, leader.power = leader.s.detach().sqrt(), 2
            leader.scale = torch.ones_like(leader.scale)
        if new:
            add_new(members, new, generator)
    weights(model, rest)
    prunings = _Prunings(model, task, seed, steps, rounds, unpruned, cut) if cuts else None
    train(
        model,
        task,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        folder=folder,
        teacher=teacher,
        kl=kl,
        precision=precision,
        checkpointing=checkpointing,
        callbacks=[prunings] if prunings else [],
    )
    if prunings:
        prunings.restore()
    model.requires_grad_(False)
    return model


def weights(model, rest=False):
    """What learn trains: the weights of bases, new bases and, with `rest`, everything that is not a basis."""
    model.requires_grad_(rest)
    for members in groups(model):
        leader = members[0][1].leader
        for _, layer in members:
            layer.u.weight.requires_grad_(False)
            if layer.new is not None:
                layer.new.requires_grad_(True)
        leader.v.weight.requires_grad_(False)
        leader.weight.requires_grad_(True)


class _Prunings(TrainerCallback):
    """Sets bases aside while training, and brings them back afterwards.

    Leaders carry `kept`, which bases of the full set are alive, and of the full set `last`, the weight with which a
    basis was set aside, and `rounds`, the cuts it survived: what an interrupted learn needs to continue.
    """

    def __init__(self, model, task, seed, steps, rounds, unpruned, cut):
        self.model, self.task, self.seed, self.cut = model, task, seed, cut
        self.full = []  # views of all bases; `take` copies what stays, so these are not touched
        for members in groups(model):
            leader = members[0][1].leader
            self.full.append(([layer.u.weight.data for _, layer in members], leader.v.weight.data, leader.scale))
            leader.kept = torch.arange(leader.rank, device=leader.scale.device)
            leader.last = leader.weight.detach().clone()
            leader.rounds = torch.zeros_like(leader.kept, dtype=torch.int16)
        first = int(unpruned * steps)
        self.at = {first + (steps - first) * k // rounds: rounds - k for k in range(rounds)}  # step: cuts still to come
        self.share = 1 / rounds

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step not in self.at:
            return
        cut = {**self.cut, "cuts": self.at[state.global_step]}
        if cut["mass"] is not None:
            cut["mass"] **= self.share  # of what is there now
        if SCORES[cut["score"]].derivatives:
            cut["derivatives"] = derivatives(self.model, self.task, self.seed + state.global_step)
        chosen = select(self.model, **cut)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        for members, index in chosen:
            leader = members[0][1].leader
            index = torch.arange(leader.rank) if index is None else index
            index = index.to(leader.kept.device)
            leader.last[leader.kept] = leader.weight.detach()
            leader.kept = leader.kept[index]
            leader.rounds[leader.kept] += 1
            shrink(members, index)
            moments = optimizer.state.get(leader.weight, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments:
                    moments[name] = moments[name][index]

    def restore(self):
        for members, (u, v, scale) in zip(groups(self.model), self.full, strict=True):
            leader = members[0][1].leader
            leader.last[leader.kept] = leader.weight.detach()
            leader.weight.data, leader.survived, leader.scale = leader.last, leader.rounds, scale
            resize(leader.v, v)
            for (_, layer), weight in zip(members, u, strict=True):
                resize(layer.u, weight)
            del leader.kept, leader.last, leader.rounds
