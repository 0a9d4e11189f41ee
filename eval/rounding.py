"""What rounding costs before healing: to the nearest numbers, and with errors fed back (layers/rounding.py).

python eval/rounding.py DECOMPOSED RECIPE OUT.json SIZE ...     DECOMPOSED: a checkpoint of weighted bases, such as the
                                                                `decompose` stage of a run of the recipe

Rows are the validation NLL and the bytes of the dense model at 4 and at 3 bits and of `bits=auto` at each size, where
losses by rounding count wholly, half, or a tenth.
"""

import argparse
import copy
import json
from pathlib import Path

from compare_rows import dense

from basis_select import load, load_task, prune
from basis_select.layers import group
from basis_select.layers.rounding import Side
from basis_select.run.recipe import read
from basis_select.sizes import sizes
from basis_select.training.loss import response_nll

SHARES = (1, 0.5, 0.1)
SIDES = {"nearest": lambda alone, bases: Side(alone), "fed back": Side.of}


def made(model, task, size):
    """`{what: a function that returns the model}`"""

    def cut(size, share):
        return prune(copy.deepcopy(model), task, size=size, bits="auto", rounding=share)

    ways = {f"dense, {bits} bits": lambda bits=bits: dense(copy.deepcopy(model), bits) for bits in (4, 3)}
    for each in size:
        ways |= {f"{each}, rounding counts {s:g} times": lambda at=each, s=s: cut(at, s) for s in SHARES}
    return ways


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decomposed")
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("sizes", nargs="+")
    a = parser.parse_args()
    model, tokenizer = load(a.decomposed)
    recipe = read(a.recipe)
    task = load_task(recipe.task, tokenizer, recipe.seed, **vars(recipe.data))
    rows = []
    for name, side in SIDES.items():
        group.Side = type("Side", (Side,), {"of": staticmethod(side)})
        for what, make in made(model, task, a.sizes).items():
            found = make()
            nll = round(response_nll(found, task.validation, task.pad_id), 4)
            rows.append({"what": what, "rounding": name, "bits": sizes(found)["bits"], "validation_nll": nll})
            print(rows[-1], flush=True)
        a.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
