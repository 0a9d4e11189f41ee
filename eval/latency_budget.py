"""Is a model cut for time faster than one cut for parameters of the same quality, on this machine? Two curves.

python eval/latency_budget.py TASK [FOLDER] [--parent SOURCE] [--rounds 9]

TASK is what a recipe's `task` may be, for example a folder of eval/prepare_data.py; the parent should be tuned on it.
Both kinds of cut are made of the same bases (Kronecker metric, shared input), nothing is healed: response NLL of the
validation split, and the time of a decoded token, all models taking turns in one process. Every model, the costs
and the NLL stay in FOLDER (runs/latency_budget): a killed run repeats only what was being made, and the timing. Writes
results/latency_budget.json and .png beside this script. On two quiet cores about 20 minutes for SmolLM2.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from public_configs import SMOLLM2

from basis_select.checkpoint.files import save
from basis_select.checkpoint.models import load
from basis_select.data.tasks import load_task
from basis_select.decompose import decompose
from basis_select.evaluation.profile import profile
from basis_select.evaluation.speed import Generation, spread, take_turns, timed_on
from basis_select.prune import prune
from basis_select.sizes import sizes
from basis_select.system.machine import fast_bf16
from basis_select.system.reading import read_json
from basis_select.system.writing import replace_text
from basis_select.training.loss import response_nll

KEEPS = (0.7, 0.5, 0.35, 0.25, 0.15)
TIMES_FASTER = (1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6)  # those that the machine cannot reach are left out
TOKENS = 16
RESULTS = Path(__file__).parent / "results"


def cuts(a, dtype):
    """`{name: folder}` of every cut, and what is known of it in its cut.json."""
    costs = a.folder / "costs.json"
    if not costs.exists():
        replace_text(costs, json.dumps(profile(load(a.parent, dtype)[0], tokens=(1,)), indent=1))
    asks = {f"{keep:.0%} of the parameters": {"keep": keep} for keep in KEEPS}
    asks |= {f"{n}x decode": {"latency": f"{n}x decode", "costs": str(costs)} for n in TIMES_FASTER}
    folders = {name: a.folder / name.replace(" ", "_").replace("%", "") for name in asks}
    if not all((folder / "cut.json").exists() for folder in folders.values()):
        bases, tokenizer = load(a.parent, "float32")
        task = load_task(a.task, tokenizer, validation=128)
        decompose(bases, task)
    found = {}
    for name, ask in asks.items():
        folder = folders[name]
        if not (folder / "cut.json").exists():
            try:
                model = prune(copy.deepcopy(bases), **ask)
            except ValueError as error:  # faster than any choice of ranks
                print(f"{name}: {error}", flush=True)
                continue
            save(model, tokenizer, folder, dtype="bfloat16")
            facts = {"nll": response_nll(model, task.validation, task.pad_id), "parameters": sizes(model)["parameters"]}
            replace_text(folder / "cut.json", json.dumps({"budget": next(iter(ask)), **facts}))
            print(name, facts, flush=True)
        found[name] = folder
    return found


def main(a):
    a.folder.mkdir(parents=True, exist_ok=True)
    dtype = "bfloat16" if fast_bf16(torch.device("cpu")) else "float32"
    found = cuts(a, dtype)
    models = {name: load(path, dtype)[0] for name, path in {"parent": a.parent, **found}.items()}
    parent = models["parent"]
    seconds = take_turns({name: Generation(m, 32, TOKENS).to_decode for name, m in models.items()}, a.rounds, a.pause)
    rows = {"parent": {"budget": None, "parameters": sizes(parent)["parameters"]}}
    rows |= {name: read_json(path / "cut.json") for name, path in found.items()}
    for name, row in rows.items():
        row["seconds"] = spread([s / TOKENS for s in seconds[name]])
    facts = {"command": " ".join(["eval/latency_budget.py", *sys.argv[1:]]), "rounds": a.rounds, "pause": a.pause}
    facts |= {**timed_on(parent.device, parent.dtype), "rows": rows}
    replace_text(RESULTS / "latency_budget.json", json.dumps(facts, indent=1) + "\n")
    plot(rows)


def plot(rows):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4))
    for budget, label in (("keep", "cut for parameters"), ("latency", "cut for time")):
        points = sorted((r["seconds"]["median"] * 1e3, r["nll"]) for r in rows.values() if r["budget"] == budget)
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", label=label)
    ax.axvline(rows["parent"]["seconds"]["median"] * 1e3, linestyle=":", color="gray", label="dense parent")
    ax.set(xlabel="ms per decoded token, batch 1", ylabel="validation NLL per response token, nothing healed")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(RESULTS / "latency_budget.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/latency_budget"))
    parser.add_argument("--parent", default=SMOLLM2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pause", type=float, default=0.5)
    main(parser.parse_args())
