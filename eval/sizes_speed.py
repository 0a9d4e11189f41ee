"""How fast the models of a grid decode, each method at each of its sizes, with what `load(fast=True)` makes of them.

python eval/sizes_speed.py GRID.yaml FOLDER OUT.json [--tokens N] [--rounds N]

The grid is one of compare.py with `trained: [0]` and one task: what is healed has the same form, and so the same speed.
FOLDER keeps parents and decompositions, as there. All models are in one process, with its threads, and take turns at
answering a prompt of 16 tokens with `generate`. Tokens a second are those of the answer; reading the prompt is timed
alone and taken off. OUT.png, drawn beside OUT.json, has speed against bytes, with the lowest and highest round.
"""

import argparse
import functools
import json
import logging
import tempfile
from pathlib import Path

import torch
from compare import behind, bench_of, read_grid, rows, stored
from compare_report import DEFAULT
from compare_rows import plain, started
from matplotlib.figure import Figure

import basis_select as bs
from basis_select.evaluation.figures import legend, quality
from basis_select.evaluation.speed import spread, take_turns, timed_on
from basis_select.system.writing import replace_text

PROMPT = 16  # tokens


def made(bench, grid, row):
    """`(model, tokenizer)` of a row before it is healed."""
    if row.method == "parent":
        return behind(bench, bench.tuned)[:2]
    return started(bench, grid["methods"][row.method], row.method, row.size, 0).model, bench.tokenizer


def answering(model, tokens):
    """What generates so many tokens after a prompt."""
    ids = torch.arange(PROMPT)[None]
    exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return functools.partial(model.generate, ids, attention_mask=torch.ones_like(ids), **exactly)


def measure(models, tokens, rounds):
    """`{name: tokens a second}`, of the median, lowest and highest round."""
    runs = {
        (name, n): functools.partial(answering, model, n) for name, model in models.items() for n in (1, tokens + 1)
    }
    seconds = take_turns(runs, rounds)
    pairs = {name: zip(seconds[name, 1], seconds[name, tokens + 1], strict=True) for name in models}
    return {name: spread([tokens / (all_ - first) for first, all_ in found]) for name, found in pairs.items()}


def plot(rows, path):
    """Speed against bytes, methods that have several sizes joined."""
    series = {}
    for name, row in rows.items():
        speed = row["tokens_per_second"]
        point = (row["bytes"], speed["median"], speed["low"], speed["high"])
        series.setdefault(name.partition(", ")[0], []).append(point)
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    ax = figure.subplots()
    quality(ax, series, "decode, tokens/s", strong=DEFAULT)
    ax.grid(alpha=0.3, which="both")
    legend(figure)
    figure.savefig(path, dpi=130)


def main():
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("grid", "folder", "out"):
        parser.add_argument(name, type=Path)
    for name, value in (("tokens", 64), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    grid = read_grid(a.grid)
    (task,) = grid["tasks"]
    bench = bench_of(grid, task, 0, a.folder)
    facts, models = {}, {}
    with tempfile.TemporaryDirectory(dir=a.folder) as place:
        for row in rows(grid):
            name, folder = f"{row.method}, {row.size or ''}".removesuffix(", "), Path(place) / plain(str(row))
            facts[name] = stored(*made(bench, grid, row), folder)[1]["bytes"]
            models[name] = bs.load(folder, fast=True)[0]
        speeds = measure(models, a.tokens, a.rounds)
    device = timed_on(torch.device("cpu"), torch.float32)
    found = {name: {"bytes": size, "tokens_per_second": speeds[name]} for name, size in facts.items()}
    options = {"grid": a.grid.name, "task": task, "tokens": a.tokens, "rounds": a.rounds}
    replace_text(a.out, json.dumps({**device, **options, "rows": found}, indent=1))
    plot(found, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
