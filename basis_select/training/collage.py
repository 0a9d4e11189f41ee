"""AdamW wholly in bfloat16: what one bfloat16 number cannot hold is carried in a second one.

COLLAGE (arXiv 2405.03637): a parameter is an unevaluated sum hi + lo of two bfloat16 numbers, about 16 bits in all,
and so is the second moment in the variant "plus". The model computes with hi. Bytes per parameter with its gradient
and all states: plain and stochastic 8, light and kahan 10, plus 12, master 16.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

VARIANTS = ("plus", "light", "kahan", "stochastic", "plain", "master")
CHUNK = 2**18  # elements updated together: the temporaries stay in a processor's cache, half again as fast as 2**22


class CollageAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 parameters; parameters of any other dtype get ordinary AdamW, 1-D basis weights for example.

    variant: "plus" and "light" are COLLAGE's. For comparison: "kahan" (compensated sums), "stochastic" (updates rounded
    up or down at random, right on average), "plain" (rounded to nearest: small updates vanish) and "master" (moments
    and a copy of the parameters in fp32). Weight decay is decoupled and part of the one update that is added, so that
    it is not lost by itself. With "plus", beta2 is a sum of two numbers as well: 0.999 alone rounds to 1, and the
    second moment would never decay. Limit: an update below about 2^-17 of its parameter is lost even so.

    Set `measure` before a step and `quality` holds afterwards, over all parameters: `descent_quality`,
    <applied, intended> / |intended|^2, which is 1 when nothing is lost (the paper's EDQ over |intended|), and
    `lost_updates`, the share of elements that should have moved and did not.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, variant="plus"):
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
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sums = [] if self.measure else None
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                self._state(p)["step"] += 1
            for parameters in _chunks(moving, self.state):
                variant = self._variant(parameters[0])
                states = [self.state[p] for p in parameters]
                tensors = {name: [_local(s[name]) for s in states] for name in states[0] if name != "step"}
                x, g = [_local(p) for p in parameters], [_local(p.grad) for p in parameters]
                before = _values(x, tensors) if self.measure else None
                intended = _update(x, g, tensors, variant, states[0]["step"], **_hyperparameters(group))
                if self.measure:
                    sums.append(_lost(before, _values(x, tensors), intended))
        if self.measure:
            self.quality = _quality(sums)
        return loss

    def _variant(self, p):
        return self.variant if p.dtype == torch.bfloat16 else "plain"

    def _state(self, p):
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

    def value(self, p):
        """A parameter with all that is carried for it, in fp32."""
        state = self.state.get(p, {})
        return state["master"].clone() if "master" in state else p.detach().float() + state.get("low", 0)

    def load_state_dict(self, state_dict):
        """As any optimizer's, but fp32 states of bfloat16 parameters stay fp32 (torch casts them to the parameter)."""
        super().load_state_dict(state_dict)
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(value):
                    self.state[p][name] = value.to(p.device, copy=True)


def grow(x, low, a):
    """`(x, low) <- (x, low) + a`, lists of tensors of one dtype, in place; exact up to the rounding of `low`."""
    u = torch._foreach_add(x, a)
    rest = torch._foreach_sub(a, torch._foreach_sub(u, x))  # what rounding u has lost: a - (u - x)
    torch._foreach_add_(rest, low)
    torch._foreach_copy_(x, torch._foreach_add(u, rest))
    torch._foreach_copy_(low, torch._foreach_sub(rest, torch._foreach_sub(x, u)))


def mul(x, low, b):
    """`(x, low) <- (x, low) * b`, lists of bfloat16 tensors, in place; b: a float, itself split into two numbers."""
    b_high = torch.tensor(b).bfloat16().item()
    b_low = torch.tensor(b - b_high).bfloat16().item()
    p = torch._foreach_mul(x, b_high)
    rest = torch._foreach_neg(p)
    # x * b_high - p exactly: addcmul rounds once. Add with alpha rounds twice at a tensor's end on CPUs.
    torch._foreach_addcmul_(rest, x, [torch.full_like(t, b_high) for t in x])
    torch._foreach_add_(rest, x, alpha=b_low)
    torch._foreach_add_(rest, low, alpha=b_high)
    torch._foreach_copy_(x, torch._foreach_add(p, rest))
    torch._foreach_copy_(low, torch._foreach_sub(rest, torch._foreach_sub(x, p)))


def _update(x, g, state, variant, step, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW on lists of tensors, in place; returns the update that was meant."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    theta = state["master"] if variant == "master" else x
    if variant == "master":
        g = [t.float() for t in g]
    torch._foreach_lerp_(m, g, 1 - beta1)
    if variant == "plus":
        mul(v, state["exp_avg_sq_low"], beta2)
        squares = torch._foreach_mul(g, g)
        torch._foreach_mul_(squares, 1 - beta2)
        grow(v, state["exp_avg_sq_low"], squares)
    else:
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    denominator = torch._foreach_div(v, 1 - beta2**step)
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, eps)
    update = [t.float() for t in m] if variant == "stochastic" else torch._foreach_mul(m, 1.0)
    torch._foreach_div_(update, denominator)
    torch._foreach_mul_(update, -lr / (1 - beta1**step))
    if weight_decay:
        torch._foreach_add_(update, theta, alpha=-lr * weight_decay)
    if variant in ("plus", "light"):
        grow(x, state["low"], update)
    elif variant == "kahan":
        pending = torch._foreach_add(state["low"], update)
        total = torch._foreach_add(x, pending)
        torch._foreach_copy_(state["low"], torch._foreach_sub(pending, torch._foreach_sub(total, x)))
        torch._foreach_copy_(x, total)
    elif variant == "stochastic":
        torch._foreach_copy_(x, [_round_at_random(t.float() + d) for t, d in zip(x, update, strict=True)])
    else:
        torch._foreach_add_(theta, update)
        if variant == "master":
            torch._foreach_copy_(x, theta)
    return update


def _round_at_random(x):
    """fp32 to bfloat16, up or down with the probability that keeps the mean: noise below the 16 bits that are cut."""
    noise = torch.randint_like(x, 2**16, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def _hyperparameters(group):
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    return {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}


def _local(x):
    """This process's part of a sharded tensor: every operation here is element by element."""
    return x.to_local() if isinstance(x, DTensor) else x


def _chunks(parameters, state):
    """Parameters of one dtype, device and age, at most CHUNK elements together where one alone is not more."""
    by_kind = {}
    for p in parameters:
        by_kind.setdefault((p.dtype, p.device, state[p]["step"]), []).append(p)
    for alike in by_kind.values():
        chunk, size = [], 0
        for p in alike:
            if chunk and size + p.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(p)
            size += p.numel()
        yield chunk


def _values(x, state):
    """Parameters as the sums that they stand for, fp32 (fp64 for fp32 parameters)."""
    if "master" in state:
        return [t.clone() for t in state["master"]]
    wide = [t.to(torch.float32 if t.dtype == torch.bfloat16 else torch.float64, copy=True) for t in x]
    return [t + low for t, low in zip(wide, state["low"], strict=True)] if "low" in state else wide


def _lost(before, after, intended):
    """`(<applied, intended>, |intended|^2, elements lost, elements to move)` summed over lists of tensors."""
    sums = torch.zeros(4, dtype=torch.float64, device=before[0].device)
    for old, new, meant in zip(before, after, intended, strict=True):
        applied, meant = (new - old).double(), meant.double()
        moves = meant != 0
        lost = (moves & (applied == 0)).sum()
        sums += torch.stack([(applied * meant).sum(), meant.square().sum(), lost.double(), moves.sum().double()])
    return sums


def _quality(sums):
    total = torch.stack([s.cpu() for s in sums]).sum(0) if sums else torch.zeros(4, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    along, square, lost, moves = total.tolist()
    return {
        "descent_quality": along / square if square else 1.0,
        "lost_updates": lost / moves if moves else 0.0,
    }
