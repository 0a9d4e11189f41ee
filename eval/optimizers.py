"""The same healing in fp32, by every bfloat16 optimizer and by adapters: quality over seeds, memory.

python eval/optimizers.py GRID.yaml FOLDER RESULTS.jsonl TASK SIZE [--seeds N] [--shorten N]

GRID and FOLDER as in compare.py; the grid's method "default" is healed, at the rate that heal chooses. Every row is a
process of its own, so that its peak of memory is its own, the parent's weights counted; what the parent says comes from
disk, so no step computes it. Continues whatever is in RESULTS.jsonl, and says after every row about how long the rest
will take; the table and the plot of the descent quality are written beside it. `--shorten N` takes N times fewer steps:
a trial.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from compare import bench_of, home_of, read, read_grid
from compare_rows import started

from basis_select.checkpoint.files import save
from basis_select.checkpoint.models import load
from basis_select.heal import LORA_RATE, heal, suitable_rate
from basis_select.system.machine import forget_peak_memory, peak_memory
from basis_select.training.collage import VARIANTS
from basis_select.training.loss import response_nll

mpl.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("fp32", *VARIANTS, "lora 16")
STEPS = 60


def measure(a):
    start(a)
    wanted = [(seed, kind) for seed in range(a.seeds) for kind in KINDS]
    for left, row in zip(range(len(wanted), 0, -1), wanted, strict=True):
        if row in {(r["seed"], r["kind"]) for r in read(a.results)}:
            continue
        began = time.monotonic()
        subprocess.run([sys.executable, *sys.argv, "--row", *map(str, row)], check=True)
        seconds = time.monotonic() - began
        print(f"{seconds:.0f} s, the rest about {seconds * (left - 1) / 60:.0f} minutes", flush=True)


def start(a):
    """The folder of the model that is healed, made if it is not there."""
    folder = home_of(a.folder, a.task, 0) / f"cut-{a.size}"
    if not folder.exists():
        grid = read_grid(a.grid)
        bench = bench_of(grid, a.task, 0, a.folder, STEPS)
        save(started(bench, grid["methods"]["default"], "default", a.size, 0)[1], bench.tokenizer, folder)
    return folder


def child(a, seed, kind):
    """Heal once and append the row to the results."""
    bench = bench_of(read_grid(a.grid), a.task, 0, a.folder, STEPS)
    task, teacher, model = bench.task, bench.labels, load(start(a))[0]
    steps, lr = max(1, STEPS // a.shorten), suitable_rate(model, task, teacher)
    options = {"steps": steps, "batch_size": bench.base.heal.batch_size, "lr": lr}
    if kind.startswith("lora"):
        options |= {"lora": int(kind.split()[1]), "lr": lr * LORA_RATE}
    else:
        options["precision"] = kind
    before = next((r["nll_before"] for r in read(a.results)), None) or response_nll(model, task.test, task.pad_id)
    forget_peak_memory()
    with tempfile.TemporaryDirectory() as out:
        heal(model, task, teacher, out, seed, **options)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    peak = peak_memory()
    row = {
        "task": a.task,
        "size": a.size,
        "seed": seed,
        "kind": kind,
        **options,
        "nll_before": round(before, 4),
        "test_nll": round(response_nll(model, task.test, task.pad_id), 4),
        "quality": {x["step"]: round(x["descent_quality"], 4) for x in lines if "descent_quality" in x},
        "lost": {x["step"]: round(x["lost_updates"], 4) for x in lines if "lost_updates" in x},
        "peak_bytes": peak,
        "seconds_per_step": round(float(np.median([x["seconds"] for x in lines])), 3),
    }
    print(seed, kind, row["test_nll"], flush=True)
    with a.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(rows):
    r = rows[0]
    rate = next(x["lr"] for x in rows if "lora" not in x)
    lines = [
        f"{r['task']} at {r['size']}, {r['steps']} steps of {r['batch_size']} at {rate:.2g}, "
        f"test NLL {r['nll_before']:.4f} before",
        "",
        "| healed by | mean test NLL | lowest to highest | descent quality | updates lost | peak memory | s/step |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        own = [r for r in rows if r["kind"] == kind]
        if not own:
            continue
        nll = [r["test_nll"] for r in own]
        quality, lost = ([x for r in own for x in r[key].values()] for key in ("quality", "lost"))
        shown = [f"{np.mean(x):.3f}" if x else "" for x in (quality, lost)]
        peak, seconds = (np.median([r[key] for r in own]) for key in ("peak_bytes", "seconds_per_step"))
        lines.append(
            f"| {kind} | {np.mean(nll):.4f} | {min(nll):.4f} to {max(nll):.4f} | {' | '.join(shown)} | "
            f"{peak / 2**30:.2f} GiB | {seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, path):
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in VARIANTS:
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
    for name, kind in (("grid", Path), ("folder", Path), ("results", Path), ("task", str), ("size", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shorten", type=int, default=1)
    parser.add_argument("--row", nargs=2, help="internal: measure this one")
    a = parser.parse_args()
    if a.row:
        child(a, int(a.row[0]), a.row[1])
    else:
        measure(a)
        found = read(a.results)
        a.results.with_suffix(".md").write_text(table(found), encoding="utf-8")
        plot(found, a.results.with_suffix(".png"))
