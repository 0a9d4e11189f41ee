"""AdamW wholly in bfloat16: what one bfloat16 number cannot hold is carried in a second one.

COLLAGE (arXiv 2405.03637): a parameter is an unevaluated sum hi + lo of two bfloat16 numbers, about 16 bits in all,
and so is the second moment in the variant "plus". The model computes with hi. Bytes per parameter with its gradient
and all states: plain and stochastic 8, light and kahan 10, plus 12, master 16.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, get_args

import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

# After the 1,000 steps of tests/test_collage.py optimi's Kahan AdamW is 0.072 of the way from float64, and 0.156 with a
# weight decay of 0.1; ours 0.008. torchao rounds at random as well as ours (0.243, ours 0.251), but its AdamW compiles
# for 12 s a shape, and a step then takes 1.7 times as long on a CPU. Neither library has Collage's variants.
Variant = Literal["plus", "light", "kahan", "stochastic", "plain", "master"]
VARIANTS = get_args(Variant)
Precision = Annotated[
    Literal["fp32", Variant],
    Field(
        description="fp32 computes products in bfloat16 where the processor has them. plus and light train wholly in "
        "bfloat16 by Collage, with 12 and 10 bytes a parameter instead of 16. The others are there to compare with."
    ),
]
CHUNK = 2**17  # elements updated together, whose fp32 temporaries stay in a processor's cache


class CollageAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 parameters; parameters of any other dtype get ordinary AdamW, 1-D basis weights for example.

    variant: "plus" and "light" are COLLAGE's. For comparison: "kahan" (compensated sums), "stochastic" (updates rounded
    up or down at random, right on average), "plain" (rounded to nearest: small updates vanish) and "master" (moments
    and a copy of the parameters in fp32). Weight decay is decoupled and part of the one update that is added, so that
    it is not lost by itself. Limit: an update below about 2^-17 of its parameter is lost even so.

    What is kept between steps is bfloat16 (of "master" not: fp32). The step itself is torch's fused AdamW in fp32, a
    chunk at a time: theta = hi + lo moves to theta', and hi <- bf16(theta'), lo <- bf16(theta' - hi), likewise the
    second moment in "plus"; what is stored as one number is rounded once. "kahan" steps with lo alone, in fp32, rounds
    it, and moves what fits from it to hi in bfloat16. beta1 and beta2 are exact numbers, applied in fp32. The paper's
    Grow and Mul compute in bfloat16 instead, with five times as many passes over memory and beta2 split as well, since
    0.999 rounds to 1 there. A second moment that is stored as one number, without "plus", still hardly decays: 0.999 of
    it rounds to itself.

    Set `measure` before a step and `quality` holds afterwards, over all parameters: `descent_quality`,
    <applied, intended> / |intended|^2, which is 1 when nothing is lost (the paper's EDQ over |intended|), and
    `lost_updates`, the share of elements that should have moved and did not.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Variant = "plus",
    ):
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; known are {', '.join(VARIANTS)}")
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= b < 1 for b in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not good:
                raise ValueError(f"{name}={value} is out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.variant, self.measure, self.quality = variant, False, None

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sums = [] if self.measure else None
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                self.state_of(p)["step"] += 1
            for pieces in _chunks(moving, self.state):
                first = pieces[0][0]
                variant, step = self._variant(first), self.state[first]["step"]
                tensors = {
                    name: [_local(self.state[p][name])[rows] for p, rows in pieces]
                    for name in self.state[first]
                    if name != "step"
                }
                x = [_local(p)[rows] for p, rows in pieces]
                g = [_local(p.grad)[rows] for p, rows in pieces]
                before = _values(x, tensors) if self.measure else None
                intended = _update(x, g, tensors, variant, step, self.measure, **_hyperparameters(group))
                if self.measure:
                    sums.append(_lost(before, _values(x, tensors), intended))
        if self.measure:
            self.quality = _quality(sums)
        return loss

    def _variant(self, p: torch.nn.Parameter) -> str:
        return self.variant if p.dtype == torch.bfloat16 else "plain"

    def state_of(self, p: torch.nn.Parameter) -> dict[str, Any]:
        """What is kept for a parameter from step to step; made if it is not there yet."""
        state = self.state[p]
        if not state:
            variant = self._variant(p)
            wide = torch.float32 if variant == "master" else p.dtype
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
            if variant in ("plus", "light", "kahan"):
                state["low"] = torch.zeros_like(p)
            if variant == "plus":
                state["exp_avg_sq_low"] = torch.zeros_like(p)
            if variant == "master":
                state["master"] = p.detach().to(torch.float32, copy=True)
        return state

    def value(self, p: torch.nn.Parameter) -> torch.Tensor:
        """A parameter with all that is carried for it, in fp32."""
        state = self.state.get(p, {})
        return state["master"].clone() if "master" in state else p.detach().float() + state.get("low", 0)

    def load_state_dict(self, state_dict: dict) -> None:
        """As any optimizer's, but fp32 states of bfloat16 parameters stay fp32 (torch casts them to the parameter)."""
        super().load_state_dict(state_dict)
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(value):
                    self.state[p][name] = value.to(p.device, copy=True)


def join(x: list[torch.Tensor], low: list[torch.Tensor]) -> list[torch.Tensor]:
    """The numbers that pairs of bfloat16 stand for, lists of tensors, in fp32: exact to 2^-25, a pair only to 2^-17."""
    values = _wide(x)
    torch._foreach_add_(values, _wide(low))
    return values


def split(values: list[torch.Tensor], x: list[torch.Tensor], low: list[torch.Tensor]) -> None:
    """`(x, low) <- values`, lists of tensors, in place: the nearest bfloat16 and the nearest of what is left of it.

    What is left replaces `values`.
    """
    torch._foreach_copy_(x, values)
    torch._foreach_sub_(values, _wide(x))
    torch._foreach_copy_(low, values)


def _update(
    x: list[torch.Tensor],
    g: list[torch.Tensor],
    state: dict[str, list[torch.Tensor]],
    variant: str,
    step: int,
    measure: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> list[torch.Tensor] | None:
    """One step of AdamW on lists of tensors, in place; returns the update that was meant, if to `measure`."""
    m, v = _wide(state["exp_avg"]), _wide(state["exp_avg_sq"])
    if variant == "plus":
        v = join(state["exp_avg_sq"], state["exp_avg_sq_low"])
    if variant in ("plus", "light"):
        theta = join(x, state["low"])
    elif variant == "kahan":
        theta = _wide(state["low"])
    else:
        theta = state["master"] if variant == "master" else _wide(x)
    before = [t.clone() for t in theta] if measure else None
    if variant == "kahan":  # what is pending moves, and decays as x would
        torch._foreach_add_(theta, _wide(x), alpha=-lr * weight_decay)
        weight_decay = 0.0
    steps = list(torch.full((len(x),), step - 1.0, device=x[0].device))
    options = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": weight_decay, "eps": eps}
    adamw(theta, _wide(g), m, v, [], steps, fused=True, amsgrad=False, maximize=False, **options)
    update = torch._foreach_sub(theta, before) if measure else None
    torch._foreach_copy_(state["exp_avg"], m)
    if variant == "plus":
        split(v, state["exp_avg_sq"], state["exp_avg_sq_low"])
    else:
        torch._foreach_copy_(state["exp_avg_sq"], v)
    if variant in ("plus", "light"):
        split(theta, x, state["low"])
    elif variant == "kahan":
        torch._foreach_copy_(state["low"], theta)
        total = torch._foreach_add(x, state["low"])
        torch._foreach_sub_(state["low"], torch._foreach_sub(total, x))
        torch._foreach_copy_(x, total)
    else:
        torch._foreach_copy_(x, [_round_at_random(t) for t in theta] if variant == "stochastic" else theta)
    return update


def _wide(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """In fp32, or as they are if that is no less."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _round_at_random(x: torch.Tensor) -> torch.Tensor:
    """fp32 to bfloat16, up or down with the probability that keeps the mean: noise below the 16 bits that are cut."""
    noise = torch.randint_like(x, 2**16, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def _hyperparameters(group: dict) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    return {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}


def _local(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, as rows: every operation here is element by element."""
    return torch.atleast_1d(x.to_local() if isinstance(x, DTensor) else x)


def _chunks(parameters: Iterable[torch.nn.Parameter], state: dict) -> Iterator[list[tuple[torch.nn.Parameter, slice]]]:
    """`[(parameter, slice of its rows), ...]` of one dtype, device and age, about CHUNK elements together."""
    by_kind = {}
    for p in parameters:
        by_kind.setdefault((p.dtype, p.device, state[p]["step"]), []).append(p)
    for (_, device, _), alike in by_kind.items():
        most = CHUNK if device.type == "cpu" else 64 * CHUNK  # on a GPU every operation costs a launch
        chunk, size = [], 0
        for p in alike:
            local = _local(p)
            width = local[:1].numel()
            height = max(1, most // max(1, width))
            for start in range(0, len(local), height):
                rows = slice(start, min(start + height, len(local)))
                if chunk and size + (rows.stop - start) * width > most:
                    yield chunk
                    chunk, size = [], 0
                chunk.append((p, rows))
                size += (rows.stop - start) * width
        if chunk:
            yield chunk


def _values(x: list[torch.Tensor], state: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Parameters as the sums that they stand for, fp32 (fp64 for fp32 parameters)."""
    if "master" in state:
        return [t.clone() for t in state["master"]]
    wide = [t.to(torch.float32 if t.dtype == torch.bfloat16 else torch.float64, copy=True) for t in x]
    return [t + low for t, low in zip(wide, state["low"], strict=True)] if "low" in state else wide


def _lost(before: list[torch.Tensor], after: list[torch.Tensor], intended: list[torch.Tensor]) -> torch.Tensor:
    """`(<applied, intended>, |intended|^2, elements lost, elements to move)` summed over lists of tensors."""
    sums = torch.zeros(4, dtype=torch.float64, device=before[0].device)
    for old, new, meant in zip(before, after, intended, strict=True):
        applied, meant = (new - old).double(), meant.double()
        moves = meant != 0
        lost = (moves & (applied == 0)).sum()
        sums += torch.stack([(applied * meant).sum(), meant.square().sum(), lost.double(), moves.sum().double()])
    return sums


def _quality(sums: list[torch.Tensor]) -> dict[str, float]:
    total = torch.stack([s.cpu() for s in sums]).sum(0) if sums else torch.zeros(4, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    along, square, lost, moves = total.tolist()
    return {
        "descent_quality": along / square if square else 1.0,
        "lost_updates": lost / moves if moves else 0.0,
    }
