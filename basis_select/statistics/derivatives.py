"""First and second derivatives of the task loss with respect to the weights of the bases."""

import torch
from transformers import PreTrainedModel

from ..data.tasks import Task
from ..layers.group import groups
from ..training.data import Batches, require_fit
from ..training.loss import frozen, task_loss

PROBES = 16


def derivatives(
    model: PreTrainedModel,
    task: Task,
    seed: int = 0,
    *,
    probes: int = PROBES,
    batch_size: int = 8,
    step: float = 1e-2,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`[(g, h), ...]`, (r,) each in float64 and one pair per group: dL/ds and the diagonal of d2L/ds2.

    L is the cross-entropy on response tokens. h is Hutchinson's estimate with symmetric perturbations,
    `h = mean_z z * (dL(s + step s z) - dL(s - step s z)) / (2 step s)`, z of independent signs for all layers at
    once; every one of the `probes` draws its own batch of the training split, over which g is averaged too. s may be
    negative, as learning can leave it; both are 0 where s is, since a relative step does not move it. In fp32
    throughout: in bf16 rounding would drown the difference. Raises ValueError, with the names of the layers, where s
    is not finite, and FloatingPointError where a loss or a derivative is not. Source: BSI (arXiv 2605.01627),
    reconstructed from its abstract.

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> found = bs.derivatives(model, task, probes=2)
        >>> model = bs.prune(model, keep=0.5, score="taylor", derivatives=found)
    """
    found = groups(model)
    if not found or not all(group.weighted for group in found):
        raise ValueError("there are no weighted bases to differentiate by: call decompose first")
    for group in found:
        if not torch.isfinite(group.s).all():
            raise ValueError(f"{group}: the weights of bases are not all finite")
    require_fit(model, task)
    generator, bases = torch.Generator().manual_seed(seed), [group.leader.s for group in found]
    weights, scales = [s.learned for s in bases], [s.scale for s in bases]
    # t_i stands for s_i (1 + t_i): its derivatives are s dL/ds and s^2 d2L/ds2, finite whatever scale and sign of s.
    first = [torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in weights]
    second = [torch.zeros_like(f) for f in first]
    try:
        with frozen(model, weights):
            for batch in Batches(task.train, batch_size, probes, seed, task.pad_id):
                signs = [torch.randint(2, w.shape, generator=generator).mul(2).sub(1).to(w) for w in weights]
                for side in (1, -1):
                    shifts = [1 + side * step * z for z in signs]
                    for s, scale, shift in zip(bases, scales, shifts, strict=True):
                        s.scale = scale * shift
                    loss = task_loss(model, batch, mixed=False)[0]
                    if not torch.isfinite(loss):
                        raise FloatingPointError(f"the loss is {loss.item()} when the bases are perturbed by {step:g}")
                    grads = torch.autograd.grad(loss, weights)
                    for i, (grad, w, shift) in enumerate(zip(grads, weights, shifts, strict=True)):
                        along = (grad * w.detach() / bases[i].power / shift).double()
                        first[i] += along / (2 * probes)
                        second[i] += side * signs[i] * along / (2 * step * probes)
    finally:
        for s, scale in zip(bases, scales, strict=True):
            s.scale = scale
    for group, g, h in zip(found, first, second, strict=True):
        if not (torch.isfinite(g).all() and torch.isfinite(h).all()):
            raise FloatingPointError(f"{group}: a derivative by the weights of bases is not finite")
    sizes = [torch.where(group.s == 0, torch.inf, group.s.detach().double()) for group in found]
    return [(g / s, h / s**2) for g, h, s in zip(first, second, sizes, strict=True)]
