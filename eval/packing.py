"""Does pivoted storage (PIFA, biomedical-cybernetics/pivoting-factorization) pay for factors? A rank-r product kept as
r of its rows, of which the others are combinations, needs `r (in + out) - r^2` numbers instead of `r (in + out)`.

python eval/packing.py MODEL OUT.json

Cuts MODEL in the plain metric to a half and a quarter, packs every layer, and for each size writes: bytes in bfloat16
(pivot indices as int32) next to those of the factors; the relative error that rounding to bfloat16 adds to the products
of either form, and the logits' KL from the unrounded model that follows; and milliseconds of one token through all
layers, the forms taking turns. A shared v has the pivots of its stacked outputs. Takes about five minutes on two cores.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.linalg import qr, solve_triangular
from torch import nn

from basis_select import decompose, load, prune
from basis_select.checkpoint.verify import probe_logits
from basis_select.layers.group import groups

ROUNDS = 7


def pack(u, v):
    """`(rows, coefficients, pivots)` with `(u v)[pivots] = rows` and `coefficients @ rows` the other rows, in order.

    u: (out, r), v: (r, in), float64. Pivoted QR of u^T picks the rows, so that all coefficients stay small.
    """
    _, triangle, order = qr(u.numpy().T, mode="economic", pivoting=True)
    r = u.shape[1]
    coefficients = torch.from_numpy(solve_triangular(triangle[:, :r], triangle[:, r:]).T.copy())  # (out - r, r)
    others, at = order[r:].argsort(), torch.from_numpy(order[:r].copy()).long()
    return u[at] @ v, coefficients[torch.from_numpy(others)], at


def unpack(rows, coefficients, pivots):
    """The product, (out, in)."""
    out = len(rows) + len(coefficients)
    rest = torch.ones(out, dtype=torch.bool)
    rest[pivots] = False
    product = torch.empty(out, rows.shape[1], dtype=rows.dtype)
    product[pivots], product[rest] = rows, coefficients @ rows
    return product


class Packed(nn.Module):
    """`y_p = rows x`, `y_rest = coefficients y_p`, put in their places by one gather."""

    def __init__(self, rows, coefficients, pivots):
        super().__init__()
        self.rows, self.coefficients = rows.bfloat16(), coefficients.bfloat16()
        rest = torch.ones(len(rows) + len(coefficients), dtype=torch.bool)
        rest[pivots] = False
        self.place = torch.cat([pivots, rest.nonzero()[:, 0]]).argsort()

    def forward(self, x):
        y = F.linear(x, self.rows)
        return torch.cat([y, F.linear(y, self.coefficients)], dim=-1)[..., self.place]


class Factors(nn.Module):
    def __init__(self, u, v):
        super().__init__()
        self.u, self.v = u.bfloat16(), v.bfloat16()

    def forward(self, x):
        return F.linear(F.linear(x, self.v), self.u)


@torch.no_grad()
def measure(model):
    """One size: `model` is cut and in float32; its layers are replaced by what the rounded forms multiply to."""
    exact = probe_logits(model).log_softmax(-1)
    forms = {"factors": copy.deepcopy(model), "packed": copy.deepcopy(model)}
    layers = {name: [] for name in forms}
    result = {name: {"bytes": 0, "error": []} for name in forms}
    largest = 0.0
    for group in groups(model):
        u = group.u.double()
        v = group.leader.v.weight.double()
        product = u @ v
        parts = pack(u, v)
        largest = max(largest, parts[1].abs().max().item() if len(parts[1]) else 0.0)
        rounded = {
            "factors": u.bfloat16().double() @ v.bfloat16().double(),
            "packed": unpack(*(x.bfloat16().double() for x in parts[:2]), parts[2]),
        }
        result["factors"]["bytes"] += 2 * (u.numel() + v.numel())
        result["packed"]["bytes"] += 2 * (parts[0].numel() + parts[1].numel()) + 4 * len(parts[2])
        layers["factors"].append((v.shape[1], Factors(u, v)))
        layers["packed"].append((v.shape[1], Packed(*parts)))
        for name, value in rounded.items():
            result[name]["error"].append(((value - product).norm() / product.norm()).item())
            pieces = value.float().split(group.shape.outputs)
            for (n, layer), weight in zip(group.items(), pieces, strict=True):
                linear = layer.to_linear()
                linear.weight.data = weight.contiguous()
                forms[name].set_submodule(n, linear)
    for name, form in forms.items():
        other = probe_logits(form).log_softmax(-1)
        result[name]["kl"] = (exact.exp() * (exact - other)).sum(-1).mean().item()
        result[name]["error"] = statistics.mean(result[name]["error"])
    result["largest coefficient"] = largest
    for name, seconds in times(layers).items():
        result[name]["milliseconds"] = seconds
    return result


def times(forms):
    """Median milliseconds of one bfloat16 token through all layers of each form, in turn; the first round warms up."""
    found = {name: [] for name in forms}
    for _ in range(ROUNDS + 1):
        for name, layers in forms.items():
            inputs = [torch.randn(1, 1, size).bfloat16() for size, _ in layers]
            began = time.perf_counter()
            for x, (_, layer) in zip(inputs, layers, strict=True):
                layer(x)
            found[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(rounds[1:]) for name, rounds in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model, _ = load(args.model, "float32")
    result = {}
    for share in (False, True):
        bases = decompose(copy.deepcopy(model), metric="plain", share=share)
        for times_fewer in (2, 4):
            cut = prune(copy.deepcopy(bases), keep=1 / times_fewer, budget="uniform")
            name = f"{times_fewer}x, {'shared v' if share else 'own v'}"
            result[name] = measure(cut)
            print(name, json.dumps(result[name]), flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
