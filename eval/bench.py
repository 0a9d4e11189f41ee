"""What SmolLM2 costs to run, dense and made 2, 4 and 8 times smaller: `basis-select bench` on models cut for it.

python eval/bench.py [FOLDER] [--rounds 7] [--pause 1] [--eager]

The cut is by plain SVD, each layer alone, the same part of each: of no use but for its speed, which is that of any cut
to these sizes. Models stay in FOLDER (runs/bench) and torch keeps its compiled graphs, so a killed run repeats little
more than the measurements. Writes results/bench.json and bench.md beside this script. On two quiet cores about 15
minutes, most of them torch.compile's; 3 with --eager.
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
from basis_select.decompose import decompose
from basis_select.evaluation.bench import bench, table
from basis_select.prune import prune
from basis_select.system.machine import fast_bf16
from basis_select.system.writing import replace_text

TIMES_SMALLER = (2, 4, 8)  # of the targeted linear layers
RESULTS = Path(__file__).parent / "results"


def cut(folder):
    """The folders of the dense model and of its cuts, made where they are missing."""
    folders = {"dense": folder / "dense"} | {f"{n}x": folder / f"{n}x" for n in TIMES_SMALLER}
    if not all(path.exists() for path in folders.values()):
        dense, tokenizer = load(SMOLLM2, "float32")
        bases = decompose(copy.deepcopy(dense), metric="plain", share=False)
        for name, path in folders.items():
            if not path.exists():
                n = None if name == "dense" else int(name[:-1])
                model = dense if n is None else prune(copy.deepcopy(bases), keep=1 / n, budget="uniform")
                save(model, tokenizer, path, dtype="bfloat16")
    return folders


def main(a):
    dtype = "bfloat16" if fast_bf16(torch.device("cpu")) else "float32"
    models = {name: load(path, dtype)[0] for name, path in cut(a.folder).items()}
    facts = bench(models, rounds=a.rounds, fast=not a.eager, pause=a.pause)
    options = [x for x in sys.argv[1:] if x != str(a.folder)]  # where models lie changes nothing
    facts = {"command": " ".join(["eval/bench.py", *options]), **facts}
    replace_text(RESULTS / "bench.json", json.dumps(facts, indent=1) + "\n")
    replace_text(RESULTS / "bench.md", table(facts))
    print(table(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/bench"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--eager", action="store_true")
    main(parser.parse_args())
