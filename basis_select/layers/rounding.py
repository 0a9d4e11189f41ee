"""Weights of 8, 4, 3 or 2 bits: what they are rounded to, and what that costs. Functions of tensors.

Values are whole numbers times a scale. At 8 bits that is one of bfloat16 for a row. Below that it is one for GROUP
inputs of a row, negative where the largest weight of a group is positive, since the range has one number more below
zero; it has 8 bits itself, a number of float8_e4m3fn times a power of two that is the row's. In memory scales are such
numbers in whatever dtype they are held.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

GROUP = 32  # inputs that share a scale below 8 bits
SHRINK = tuple(1.1 - i / 16 for i in range(9))  # of the scale that holds the largest weight of a group below 8 bits
FLOAT8 = torch.float8_e4m3fn  # largest number 448
RANGE = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}  # of the whole numbers

AT_ONCE = 2**19  # numbers of a weight that a CPU rounds at once
LINES = 64  # that are rounded one after the other before all that follow make up for their errors

Bits = Literal[8, 4, 3, 2]


@dataclass(frozen=True)
class Side:
    """What errors cost at the inputs, or at the outputs, of a weight, where their second moment is M: (n, n).

    alone: (n,), the diagonal of M, what a squared error of each entry costs by itself. order: (n,), where M is known,
    the entries as they are rounded, the most costly first, and root: (n, n), the upper triangle R of `M^-1 = R^T R` in
    that order: entries that are not rounded yet make up for errors (`fed_back`).
    """

    alone: torch.Tensor
    order: torch.Tensor | None = None
    root: torch.Tensor | None = None

    @classmethod
    def of(cls, alone: torch.Tensor, bases: torch.Tensor) -> "Side":
        """bases: (r, n), orthonormal in M. If there are n of them `M^-1 = bases^T bases`, whose root their QR has."""
        if len(bases) < bases.shape[1]:
            return cls(alone)
        order = alone.argsort(descending=True, stable=True)
        root = torch.linalg.qr(bases.double()[:, order], mode="r").R
        if not root.diagonal().all():  # bases that are not independent, as rounding to bfloat16 can leave them
            return cls(alone)
        return cls(alone, order, root * root.diagonal().sign()[:, None])

    def cost(self, bits: int) -> torch.Tensor:
        """(n,), what a squared error of each entry costs after what makes up for it."""
        if self.root is None or bits == 8:
            return self.alone
        return (self.root.diagonal() ** -2)[self.order.argsort()]


def stored_bytes(rows: int, inputs: int, bits: int) -> int:
    """Bytes of a weight (rows, inputs) of 16 bits or fewer, with its scales.

    >>> stored_bytes(4, 64, 4)
    140
    """
    if bits >= 8:
        return rows * inputs * bits // 8 + 2 * rows * (bits == 8)
    return rows * row_bytes(inputs, bits)


def row_bytes(inputs: int, bits: int) -> int:
    """Of a row of fewer than 8 bits: its whole numbers, its scales and their power of two, each in whole bytes.

    >>> row_bytes(32, 3)
    14
    """
    return number_bytes(inputs, bits) + scales_of(inputs) + 1


def number_bytes(inputs: int, bits: int) -> int:
    """That so many whole numbers take.

    >>> number_bytes(32, 3)
    12
    """
    return -(-inputs * bits // 8)


def scales_of(inputs: int) -> int:
    """How many a row of so many inputs has below 8 bits; the last of them may be for fewer than GROUP.

    >>> scales_of(33)
    2
    """
    return -(-inputs // GROUP)


def storable(scale: torch.Tensor) -> torch.Tensor:
    """The nearest scales that are stored, in the same dtype; scale: (rows,) of 8 bits, (rows, groups) of fewer."""
    if scale.dim() == 1:
        return scale.bfloat16().to(scale.dtype)
    return _to_8_bits(scale.float(), _unit(_power(scale))).to(scale.dtype)


def _to_8_bits(scale: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Scales of float32 as numbers of 8 bits, of which none is zero, times the unit of the row."""
    codes = (scale / unit).to(FLOAT8).float()
    return torch.where(codes == 0, torch.finfo(FLOAT8).smallest_normal / 8, codes).mul_(unit)


def _power(scale: torch.Tensor) -> torch.Tensor:
    """(rows, 1), int32: of the least power of two times which numbers of 8 bits hold the scales (rows, groups)."""
    mantissa, exponent = torch.frexp(scale.float().abs().amax(1, keepdim=True))
    return (exponent - 9 + (mantissa > 448 / 512)).clamp(-126, 127)


def _unit(power: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)


def nearest(weight: torch.Tensor, bits: int, cost: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q, scale)`: the whole numbers, int8 (rows, inputs), and scales in the dtype of `weight`, nearest to it.

    cost: (inputs,), what a squared error of each input costs, 1 without it. Below 8 bits a group's scale is the one
    of SHRINK with the least cost: a few large weights are worth less than the precision of all others.

    >>> nearest(torch.tensor([[4.0, -3, 2, -1]]), 3)
    (tensor([[-4,  3, -2,  1]], dtype=torch.int8), tensor([[-1.]]))
    """
    cost = _costs(cost, weight, bits)
    made = [_nearest(by_group(rows.float(), bits), bits, cost) for rows in weight.split(rows_at_once(weight))]
    q, scale = (torch.cat(parts) for parts in zip(*made, strict=True))
    return q.flatten(1)[:, : weight.shape[1]].to(torch.int8), scale.flatten(int(bits < 8)).to(weight.dtype)


def _nearest(grouped: torch.Tensor, bits: int, cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q, scale)` of weights as of `by_group`, the whole numbers as float32."""
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    largest = (largest.abs() if bits == 8 else -largest) / -RANGE[bits][0]
    unit, best, least = _unit(_power(SHRINK[0] * largest.flatten(1))), None, None
    for share in SHRINK if bits < 8 else (1,):
        scale = storable(largest.flatten()) if bits == 8 else _to_8_bits(share * largest.flatten(1), unit)
        scale = torch.where(scale == 0, 1, scale).view_as(largest)
        error = (grouped / scale).round_().clamp_(*RANGE[bits]).mul_(scale).sub_(grouped).square_().mul_(cost)
        error = error.sum(-1, keepdim=True)
        best = scale if best is None else torch.where(error < least, scale, best)
        least = error if least is None else torch.minimum(error, least)
    return (grouped / best).round_().clamp_(*RANGE[bits]), best


def rows_at_once(weight: torch.Tensor) -> int:
    """Of a weight (out, in), on a CPU so many that what one operation leaves is in the cache for the next."""
    return max(1, AT_ONCE // weight.shape[1]) if weight.device.type == "cpu" else max(1, len(weight))


def fed_back(weight: torch.Tensor, bits: int, inputs: Side, outputs: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q, scale)` as of `nearest`, where inputs, or else outputs, not rounded yet make up for errors of the others.

    That is GPTQ (arXiv 2210.17323), here with outputs in turn too where only their second moment is known. Of 8 bits,
    and where neither is known, it is `nearest`.
    """
    q, scale = nearest(weight, bits, inputs.cost(bits))
    if bits == 8 or (inputs.root is None and outputs.root is None):
        return q, scale
    w, each = weight.float(), scale.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    if inputs.root is None:
        return _in_turn(w, each, bits, outputs), scale
    return _in_turn(w.T, each.T, bits, inputs).T.contiguous(), scale


def _in_turn(w: torch.Tensor, scale: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Whole numbers for w: (n, m), with a scale for each, line by line in the order of the side along them."""
    w, scale, root = w[side.order], scale[side.order], side.root.to(w.dtype)
    q = torch.empty_like(w, dtype=torch.int8)
    for start in range(0, len(w), LINES):
        end = min(len(w), start + LINES)
        errors = w.new_empty(end - start, w.shape[1])
        for i in range(start, end):
            whole = (w[i] / scale[i]).round_().clamp_(*RANGE[bits])
            q[i] = whole
            torch.div(w[i] - whole * scale[i], root[i, i], out=errors[i - start])
            w[i + 1 : end].addcmul_(root[i, i + 1 : end, None], errors[i - start], value=-1)
        w[end:].addmm_(root[start:end, end:].T, errors, alpha=-1)
    return q[side.order.argsort()]


def restored(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight (rows, inputs) that whole numbers and scales stand for, in the dtype of `scale`."""
    if scale.dim() == 1:
        return q.to(scale.dtype) * scale[:, None]
    return (by_group(q.to(scale.dtype), 4) * scale[..., None]).flatten(1)[:, : q.shape[1]]


def restored_from_bytes(bytes_: torch.Tensor, inputs: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (rows, inputs) that was `packed`, at 4 bits without the whole numbers in between."""
    if bits != 4:
        return restored(*unpacked(bytes_, inputs, bits, dtype))
    numbers, scale = apart(bytes_, inputs, bits, dtype)
    each = torch.arange(256, device=bytes_.device)
    values = (torch.stack([each & 15, each >> 4], dim=-1) - 8).to(dtype)
    x = torch.nn.functional.embedding(numbers.int(), values).flatten(1)[:, :inputs]
    return (by_group(x, 4) * scale[..., None]).flatten(1)[:, :inputs]


def by_group(x: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, inputs) as (rows, groups, inputs of a group) with one scale each, the last group filled with zeros."""
    if bits == 8:
        return x[:, None]
    return torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _costs(cost: torch.Tensor | None, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """(1, groups, inputs of a group)"""
    given = torch.ones(weight.shape[1], device=weight.device) if cost is None else cost.float().to(weight.device)
    return by_group(given[None], bits)


def packed(q: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers (rows, inputs) of fewer than 8 bits and `storable` scales (rows, groups): uint8 (rows, bytes).

    First the whole numbers, one after the other from the lowest bit of the first byte on, each with half their range
    added: of 4 bits, the first of two lies in a byte's low half. Then a byte for each scale, and the exponent of the
    row's power of two with 128 added. So rows need nothing but themselves.
    """
    power = _power(scale)
    codes = (scale.float() / _unit(power)).to(FLOAT8).view(torch.uint8)
    return torch.cat([_packed(q, bits), codes, (power + 128).to(torch.uint8)], dim=1)


def _packed(q: torch.Tensor, bits: int) -> torch.Tensor:
    inputs, rows = q.shape[1], len(q)
    eights = torch.nn.functional.pad(q, (0, -inputs % 8)).view(rows, -1, 8).int() + 2 ** (bits - 1)
    places = torch.arange(8, device=q.device, dtype=torch.int32)
    whole = (eights << bits * places).sum(-1, keepdim=True, dtype=torch.int32)
    return (whole >> 8 * places[:bits] & 255).to(torch.uint8).view(rows, -1)[:, : number_bytes(inputs, bits)]


def apart(
    bytes_: torch.Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(bytes of the whole numbers, scales in `dtype`)` of what was `packed`."""
    numbers, codes, power = bytes_.split([number_bytes(inputs, bits), scales_of(inputs), 1], dim=1)
    return numbers, (codes.contiguous().view(FLOAT8).float() * _unit(power.int() - 128)).to(dtype)


def unpacked(
    bytes_: torch.Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """What was `packed`: int8 (rows, inputs), and the scales in `dtype`."""
    numbers, scale = apart(bytes_, inputs, bits, dtype)
    if bits == 4:
        return torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(-2)[..., :inputs].to(torch.int8) - 8, scale
    rows, places = len(numbers), torch.arange(8, device=bytes_.device, dtype=torch.int32)
    parts = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % bits)).view(rows, -1, bits).int()
    whole = (parts << 8 * places[:bits]).sum(-1, keepdim=True, dtype=torch.int32)
    q = (whole >> bits * places & 2**bits - 1).view(rows, -1)[:, :inputs]
    return q.to(torch.int8) - 2 ** (bits - 1), scale


def factors(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`u: (out, r)`, `s: (r,)`, `v: (r, in)` as two factors of `u diag(s) v` that lose least when they are rounded.

    Columns of the first have one norm, so that small bases are rounded as finely as large ones with which they share
    scales; rows of the second, which do not share any, carry the rest. Both have the same mean square.
    """
    norm = u.norm(dim=0).clamp_min(torch.finfo(u.dtype).tiny)
    u, v = u / norm, v * (s * norm)[:, None]
    balance = (v.square().mean() / u.square().mean()).sqrt().sqrt()
    return (u * balance, v / balance) if 0 < balance < torch.inf else (u, v)  # of a layer of zeros it is no number


def basis_costs(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, widths: Iterable[int], outputs: Side, inputs: Side
) -> dict[int, torch.Tensor]:
    """`{bits: what it costs in the metric to round each basis `s_i u_i v_i` to so many}`, (r,), float64.

    outputs, inputs: of G and A. Errors of rounding are as good as independent, so that `tr(dW^T G dW A)` needs no
    more of the two than the cost of each. Of basis i it is `(du^T G du) (v A v^T) + (u^T G u) (dv A dv^T)`, and in the
    metric `u^T G u = v A v^T = 1`.
    """
    norm = u.norm(dim=0).double().clamp_min(torch.finfo(torch.float32).tiny)
    wide, long = factors(u.float(), s.float(), v.float())
    a = wide.norm(dim=0).double() / norm  # `factors` scaled u_i by it and s_i v_i by 1 / a
    costs = {}
    for bits in widths:
        output_cost, input_cost = outputs.cost(bits), inputs.cost(bits)
        du = (restored(*nearest(wide, bits)) - wide).double().square()
        dv = (restored(*nearest(long, bits, input_cost)) - long).double().square()
        du, dv = output_cost.double() @ du, dv @ input_cost.double()
        costs[bits] = s.double().square() * du / a.square() + dv * a.square()
    return costs


def dense_cost(weight: torch.Tensor, bits: int, outputs: Side, inputs: Side) -> float:
    """What it costs in the metric to round a dense weight (out, in) to so many bits, fed back along one side."""
    input_cost = inputs.cost(bits)
    output_cost = outputs.cost(bits) if inputs.root is None else outputs.alone
    error = (restored(*nearest(weight.float(), bits, input_cost)) - weight.float()).double().square()
    return float(output_cost.double() @ error @ input_cost.double())
