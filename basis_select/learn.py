"""Learn on task data which bases matter: only the weights s train, u and v are frozen."""

import torch

from .derivatives import derivatives
from .layers.group import groups
from .linalg.scores import SCORES
from .prune import select
from .training.engine import train


def learn(
    model,
    task,
    teacher=None,
    folder=None,
    seed=0,
    keep=None,
    mass=None,
    budget="global",
    score="energy",
    multiple_of=16,
    reserve=0,
    *,
    steps: int = 60,
    batch_size: int = 16,
    lr: float = 2e-2,
    kl: float = 1.0,
    rounds: int = 4,
    unpruned: float = 0.0,
    square: bool = False,
    new: int = 0,
    rest: bool = False,
    precision: str = "fp32",
    checkpointing: bool = False,
):
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
    """
    found = groups(model)
    if not found:
        raise ValueError("there are no bases to learn the weights of: call decompose first")
    cut = {"keep": keep, "mass": mass, "budget": budget, "score": score, "multiple_of": multiple_of, "reserve": reserve}
    cuts = keep is not None or mass is not None
    if cuts and not 1 <= rounds <= steps - int(unpruned * steps):
        raise ValueError(f"rounds={rounds} prunings do not fit into steps={steps} with unpruned={unpruned}")
    generator = torch.Generator().manual_seed(seed)
    for group in found:
        if square and (group.s < 0).any():
            raise ValueError(f"{group.name} has a negative weight, which no square is: learn it with square=False")
        if square:
            group.leader.s.square()
        if new:
            group.add_new(new, generator)
    weights(model, rest)
    prunings = _Prunings(model, task, seed, steps, rounds, unpruned, cut) if cuts else None
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


def weights(model, rest=False):
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

    def __init__(self, model, task, seed, steps, rounds, unpruned, cut):
        self.model, self.task, self.seed, self.cut = model, task, seed, cut
        self.groups = groups(model)
        self.full = [group.factors() for group in self.groups]  # `take` copies what stays, so these are not touched
        weights = [group.leader.s for group in self.groups]
        self.kept = [torch.arange(len(s.scale), device=s.scale.device) for s in weights]
        self.last = [s.learned.detach().clone() for s in weights]
        self.survived = [torch.zeros_like(s.survived) for s in weights]
        first = int(unpruned * steps)
        self.at = {first + (steps - first) * k // rounds: rounds - k for k in range(rounds)}  # step: cuts still to come
        self.share = 1 / rounds

    def before_step(self, step, optimizer):
        if step not in self.at:
            return
        cut = {**self.cut, "cuts": self.at[step]}
        if cut["mass"] is not None:
            cut["mass"] **= self.share  # of what is there now
        if SCORES[cut["score"]].derivatives:
            cut["derivatives"] = derivatives(self.model, self.task, self.seed + step)
        for i, (group, index) in enumerate(select(self.model, **cut)):
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

    def state_dict(self):
        """`{key: tensor}` of what the optimizer and the weights do not say."""
        lists = {"kept": self.kept, "last": self.last, "survived": self.survived}
        return {f"{name}.{i}": x.clone() for name, tensors in lists.items() for i, x in enumerate(tensors)}

    def load_state_dict(self, state):
        """Cut the bases of a model that has all of them as they were when this state was saved."""
        for i, group in enumerate(self.groups):
            for name, tensors in (("kept", self.kept), ("last", self.last), ("survived", self.survived)):
                tensors[i] = state[f"{name}.{i}"].to(tensors[i].device)
            group.take(self.kept[i])

    def restore(self):
        for group, full, kept, last, survived in zip(
            self.groups, self.full, self.kept, self.last, self.survived, strict=True
        ):
            us, v, (scale, _, _) = full
            last[kept] = group.leader.s.learned.detach()
            group.put((us, v, (scale, last, survived)))
