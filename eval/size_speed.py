"""What the rows of a comparison at sizes on disk take on disk and in memory, and how fast they decode.

python eval/size_speed.py GRID.yaml FOLDER OUT.json TASK [--sizes 67MB,45MB] [--bits 8,4,3] [--tokens N] [--rounds N]

GRID and FOLDER are those of compare.py. For a TASK the parent, ours of every size and the dense parent at so many bits
are made as there, but not healed, which changes neither shapes nor bits. Each is saved, loaded and made ready as by
`load(fast=True)`; then all decode `--tokens` tokens after a prompt of 16, in turn, at batch 1 on one thread.
eval/tables.py writes the table.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from compare import bench_of, read_grid
from compare_rows import started

from basis_select.checkpoint.fast import ready
from basis_select.checkpoint.files import save
from basis_select.evaluation.speed import Generation, environment, spread, take_turns
from basis_select.run.work import load_here
from basis_select.sizes import sizes
from basis_select.system.writing import replace_text


def rows(grid, folder, task, wanted, widths):
    """`(name of a row, tokenizer, model)`, one after the other."""
    bench = bench_of(grid, task, grid["seeds"][0], folder)
    whole = bench.disk.view(bench.base, bench.tuned).tokenizer
    yield "the parent", whole, load_here(bench.tuned["parent"] / "model")[0]
    yield "the parent, tokens trimmed", bench.tokenizer, bench.parent
    ways = {f"ours, {size}": (grid["methods"]["default"], size) for size in wanted}
    ways |= {f"the dense parent at {bits} bits": ({"dense": bits}, None) for bits in widths}
    for name, (own, size) in ways.items():
        yield name, bench.tokenizer, started(bench, own, name, size, 0).model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("grid", Path), ("folder", Path), ("out", Path), ("task", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["110MB", "67MB", "45MB", "34MB", "27MB"])
    parser.add_argument("--bits", type=lambda text: [int(n) for n in text.split(",")], default=[8, 4, 3])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    torch.set_num_threads(1)
    found, runs = {}, {}
    for name, tokenizer, model in rows(read_grid(a.grid), a.folder, a.task, a.sizes, a.bits):
        with tempfile.TemporaryDirectory() as place:
            saved = save(model, tokenizer, Path(place) / "model", "bfloat16")
            model = load_here(saved)[0]
            found[name] = {"bytes": sizes(model, saved)["bytes"]}
        model = ready(model, compiled=False)
        held = [*model.parameters(), *model.buffers()]
        found[name]["memory"] = sum(x.nbytes for x in held)
        runs[name] = Generation(model, 16, a.tokens, compiled=True).to_decode
        runs[name]()  # compiles
        print(name, found[name], flush=True)
    for name, seconds in take_turns(runs, a.rounds).items():
        found[name]["tokens_per_second"] = spread([a.tokens / s for s in seconds])
    facts = environment(torch.device("cpu"), torch.bfloat16) | {"tokens": a.tokens, "rounds": a.rounds, "task": a.task}
    replace_text(a.out, json.dumps(facts | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
