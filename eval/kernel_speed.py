"""How fast weights are multiplied that lie in memory with 8 or 4 bits: our kernel, PyTorch's, and float32.

python eval/kernel_speed.py OUT.json [--rounds N]

One thread. Every product takes the next of 40 MB of weights, as in a model, so that they come from memory and not
from a cache. All kernels take turns; the figures are billions of weights times tokens a second. eval/tables.py writes
the table. `rounding` in OUT.json is the other kernel, of weights that train: seconds of rounding 40 MB of float32
weights and of their gradients, by it and by torch's operations.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from basis_select.evaluation.speed import take_turns
from basis_select.layers import kernels, straight_through
from basis_select.layers.rounded import RoundedLinear, in_order
from basis_select.layers.rounding import GROUP
from basis_select.layers.straight_through import RoundingLinear
from basis_select.system.writing import replace_text

SHAPES = {"1536 x 256": (1536, 256), "256 x 576": (256, 576), "3072 x 320": (3072, 320)}
TOKENS = (1, 4, 8, 32, 128)
BYTES = 40e6


def ours(layer, dtype=torch.float32):
    packed, layout = kernels.pack([layer])
    return lambda x: torch.ops.basis_select.product(x.to(dtype), packed, layout, None).float()


def of_pytorch(layer):
    if layer.bits == 8:
        scale = layer.scale.bfloat16()
        return lambda x: torch._weight_int8pack_mm(x.bfloat16(), layer.q, scale).float()
    q, scale = in_order(layer.q, layer.in_features, layer.bits)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), q, GROUP, scale).float()


def float32(layer):
    weight = layer.weight
    return lambda x: F.linear(x, weight)


KERNELS = {
    "ours": ours,
    "ours, inputs in bfloat16": partial(ours, dtype=torch.bfloat16),
    "PyTorch's, inputs in bfloat16": of_pytorch,
    "float32, not rounded": float32,
}


def rounding(bits, rounds):
    """`{by what: median seconds}` of rounding weights that train, to bfloat16, and of their gradients."""
    rows, inputs = SHAPES["1536 x 256"]
    count = round(BYTES / (rows * inputs * 4))
    of = [RoundedLinear.rounded(torch.nn.Linear(inputs, rows, bias=False), bits) for _ in range(count)]
    layers, grad = [RoundingLinear.training(layer) for layer in of], torch.randn(rows, inputs).bfloat16()
    by_kernel = straight_through._has_kernel

    def run(found):
        straight_through._has_kernel = found
        with torch.autocast("cpu", torch.bfloat16):
            for layer in layers:
                layer.weight.grad = layer.scale.grad = None
                layer.rounded_weight().backward(grad)
        straight_through._has_kernel = by_kernel

    ways = {"kernel": by_kernel, "torch": lambda weight, dtype: False}
    seconds = take_turns({name: partial(partial, run, found) for name, found in ways.items()}, rounds)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    torch.set_num_threads(1)
    kernels.load()
    found = {}
    for shape, (rows, inputs) in SHAPES.items():
        for bits in (8, 4):
            count = round(BYTES / (rows * inputs * bits / 8))
            layers = [RoundedLinear.rounded(torch.nn.Linear(inputs, rows, bias=False), bits) for _ in range(count)]
            products = {name: [of(layer) for layer in layers] for name, of in KERNELS.items()}
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs)

                def run(name, x=x, products=products):
                    for product in products[name]:
                        product(x)

                seconds = take_turns({name: partial(partial, run, name) for name in KERNELS}, a.rounds)
                for name, times in seconds.items():
                    speed = count * rows * inputs * tokens / statistics.median(times) / 1e9
                    found.setdefault(name, {}).setdefault(f"{bits} bits, {tokens} tokens", {})[shape] = speed
    training = {f"{bits} bits": rounding(bits, a.rounds) for bits in (8, 4)}
    replace_text(a.out, json.dumps({"rounds": a.rounds, "speeds": found, "rounding": training}, indent=1) + "\n")


if __name__ == "__main__":
    main()
