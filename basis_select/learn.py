"""Learn on task data which bases matter: only the weights s train, u and v are frozen."""

from transformers import TrainerCallback

from .bases import groups
from .prune import select, shrink
from .training.engine import train


def learn(
    model,
    task,
    teacher=None,
    folder=None,
    seed=0,
    keep=None,
    budget="global",
    multiple_of=16,
    reserve=0,
    *,
    steps: int = 60,
    batch_size: int = 16,
    lr: float = 2e-2,
    kl: float = 1.0,
    rounds: int = 4,
):
    """Train the weight of every basis, `y = u((v x) * s) + b`, in place; returns the model.

    `s = scale * weight` with `weight` starting at 1, so `lr` is a relative step for every basis alike. With
    `keep` (as in `prune`) bases are removed while learning: `rounds` times, evenly spread and the first before
    step 1, each round cutting by the same factor, so that the weights left adapt to every cut and each
    step only costs what is still alive. Loss: CE + `kl` * KL(teacher || model).
    """
    if not groups(model):
        raise ValueError("there are no bases to learn the weights of: call decompose first")
    if keep is not None and not 1 <= rounds <= max(steps, 1):
        raise ValueError(f"rounds={rounds} prunings do not fit into steps={steps}")
    model.requires_grad_(False)
    for members in groups(model):
        members[0][1].leader.weight.requires_grad_(True)
    callbacks = [] if keep is None else [_Prunings(model, steps, rounds, keep, budget, multiple_of, reserve)]
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
        callbacks=callbacks,
    )
    model.requires_grad_(False)
    return model


class _Prunings(TrainerCallback):
    def __init__(self, model, steps, rounds, keep, *how):
        self.model, self.how = model, how
        # Step (0-based) -> what is kept of the dense model then; by mass: what is kept of the current one.
        factor = (lambda k: keep ** (1 / rounds)) if how[0] == "mass" else (lambda k: keep ** (k / rounds))
        self.at = {steps * (k - 1) // rounds: factor(k) for k in range(1, rounds + 1)}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step not in self.at:
            return
        chosen = select(self.model, self.at[state.global_step], *self.how)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        for members, index in chosen:
            if index is not None:
                weight = members[0][1].leader.weight
                shrink(members, index)
                moments = optimizer.state.get(weight, {})
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in moments:
                        moments[name] = moments[name][index]
