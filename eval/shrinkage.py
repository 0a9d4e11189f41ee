"""How much to shrink second moments: one parent and its moments, several rules, sizes from 2x to 16x, nothing healed.

python eval/shrinkage.py GRID.yaml FOLDER RESULTS.jsonl [TASK ...]     continues whatever is there
python eval/shrinkage.py RESULTS.jsonl                                 writes the table beside it

GRID and FOLDER as in compare.py. A row of RESULTS.jsonl: task, rule, and for every size the response NLL of the
validation split, by which the rule is chosen, and of the test split. A rule is OAS, the one in use, or a share of the
mean eigenvalue for inputs and outputs.
"""

import copy
import json
import logging
import sys
from pathlib import Path

from compare import bench_of, read, read_grid

from basis_select import decompose
from basis_select.evaluation.report import markdown
from basis_select.layers.group import only
from basis_select.linalg.metrics import METRICS, Metric, shifted
from basis_select.selection import select
from basis_select.target import target
from basis_select.training.loss import response_nll

SIZES = (2, 4, 8, 16)  # times fewer parameters in the linear layers; the embedding stays whole
SHARES = {"0.01": (1e-2, 1e-2), "0.001 and 0.01": (1e-3, 1e-2)}


def shift(share):
    return lambda moment, samples: shifted(moment, share)


def rules():
    """`{name: Metric}`; the one in use first."""
    shares = {name: Metric(inputs=shift(a), outputs=shift(g)) for name, (a, g) in SHARES.items()}
    return {"OAS": METRICS["kronecker"], **shares}


def measure(parent, task, moments, rule):
    """`{split: {size: NLL}}` of the model decomposed with this rule, its lesser bases set aside."""
    METRICS["by this rule"] = rule
    model = decompose(copy.deepcopy(parent), task, moments, metric="by this rule")
    found = {"validation": {}, "test": {}}
    for size in SIZES:
        with only(select(model, target(keep=1 / size))):
            for split, row in found.items():
                row[size] = round(response_nll(model, getattr(task, split), task.pad_id), 4)
    return found


def main(grid, folder, results, names):
    done = {(r["task"], r["rule"]) for r in read(results)}
    for name in names or grid["tasks"]:
        missing = {rule: metric for rule, metric in rules().items() if (name, rule) not in done}
        if not missing:
            continue
        bench = bench_of(grid, name, 0, folder)
        parent, task, moments = bench.parent, bench.task, bench.moments[True]
        dense = {s: round(response_nll(parent, getattr(task, s), task.pad_id), 4) for s in ("validation", "test")}
        for rule, metric in missing.items():
            row = {"task": name, "rule": rule, "parent": dense, **measure(parent, task, moments, metric)}
            logging.warning("%s", row)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def table(rows):
    """Markdown: validation NLL, and test NLL in brackets, of every rule and size, a block for each task."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == task]
        sizes = list(own[0]["validation"])
        body = [[r["rule"], *(f"{r['validation'][s]:.3f} ({r['test'][s]:.3f})" for s in sizes)] for r in own]
        lines += [f"{task}, parent {own[0]['parent']['validation']:.3f} ({own[0]['parent']['test']:.3f})", ""]
        lines += [markdown(["shrinkage", *(f"{s}x" for s in sizes)], body, "l" + "r" * len(sizes))]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        path, folder, results = map(Path, sys.argv[1:4])
        main(read_grid(path), folder, results, sys.argv[4:])
    source = Path(sys.argv[-1] if len(sys.argv) == 2 else sys.argv[3])
    text = "Response NLL after a cut, nothing healed: validation split, and test split in brackets.\n\n"
    source.with_suffix(".md").write_text(text + table(read(source)), encoding="utf-8")
