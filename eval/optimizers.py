"""The same healing in fp32 and by every bfloat16 optimizer: quality over seeds, and what each of them loses.

python eval/optimizers.py GRID.yaml FOLDER RESULTS.jsonl TASK SIZE [--steps N] [--seeds N] [--lr X]

GRID and FOLDER as in compare.py; the grid's method "default" is healed. Continues whatever is in RESULTS.jsonl; the
table and the plot of the descent quality are written beside it.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import yaml
from compare import cut, read

from basis_select.heal import heal, suitable_rate
from basis_select.training.collage import VARIANTS
from basis_select.training.loss import response_nll

mpl.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("fp32", *VARIANTS)


def measure(grid, folder, results, name, size, steps, seeds, lr):
    r, task, teacher, start = cut(grid, name, "default", size, folder)
    lr = lr or suitable_rate(start, task, teacher)
    done = {(row["kind"], row["seed"]) for row in read(results)}
    for seed in range(seeds):
        for kind in KINDS:
            if (kind, seed) in done:
                continue
            model = copy.deepcopy(start)
            with tempfile.TemporaryDirectory() as out:
                options = {"steps": steps, "batch_size": r.heal.batch_size, "lr": lr, "precision": kind}
                heal(model, task, teacher, out, seed, **options)
                lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
            row = {
                "task": name,
                "size": size,
                "kind": kind,
                "seed": seed,
                "steps": steps,
                "lr": lr,
                "test_nll": round(response_nll(model, task.test, task.pad_id), 4),
                "quality": {x["step"]: round(x["descent_quality"], 4) for x in lines if "descent_quality" in x},
                "lost": {x["step"]: round(x["lost_updates"], 4) for x in lines if "lost_updates" in x},
                "seconds_per_step": round(float(np.median([x["seconds"] for x in lines])), 3),
            }
            print(kind, seed, row["test_nll"], flush=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def table(rows):
    lines = [
        "| optimizer | test NLL, mean | lowest to highest | descent quality | updates lost |",
        "|---|---:|---|---:|---:|",
    ]
    for kind in KINDS:
        own = [r for r in rows if r["kind"] == kind]
        if not own:
            continue
        nll = [r["test_nll"] for r in own]
        quality, lost = ([x for r in own for x in r[key].values()] for key in ("quality", "lost"))
        shown = [f"{np.mean(x):.3f}" if x else "" for x in (quality, lost)]
        lines.append(f"| {kind} | {np.mean(nll):.4f} | {min(nll):.4f} to {max(nll):.4f} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plot(rows, path):
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in KINDS[1:]:
        curves = [r["quality"] for r in rows if r["kind"] == kind]
        if curves:
            steps = sorted(map(int, curves[0]))
            ax.plot(steps, [np.mean([c[str(s)] for c in curves]) for s in steps], label=kind, marker="o", markersize=3)
    ax.set(xlabel="healing step", ylabel="descent quality (1: nothing lost)")
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("grid", Path), ("folder", Path), ("results", Path), ("task", str), ("size", float)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float)
    a = parser.parse_args()
    content = yaml.safe_load(a.grid.read_text(encoding="utf-8"))
    measure(content, a.folder, a.results, a.task, a.size, a.steps, a.seeds, a.lr)
    found = read(a.results)
    a.results.with_suffix(".md").write_text(table(found), encoding="utf-8")
    plot(found, a.results.with_suffix(".png"))
