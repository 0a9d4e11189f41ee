"""What it costs that oneDNN writes code for every shape of a product, by how many of them it keeps.

python eval/generated_code.py RESULT OUT.json [--rounds N]      RESULT is a folder with rounded weights

oneDNN keeps 1,024 unless ONEDNN_PRIMITIVE_CACHE_CAPACITY says otherwise; `import basis_select` lets it keep 8,192.
Every measurement is a process of its own with one thread, kinds in turn. It loads RESULT and reads prompts of LENGTHS,
once so that all code is there that is kept, then timed; then the same with training steps on EXAMPLES of such a length.
OUT.json has medians over rounds: milliseconds a prompt, microseconds a token trained on, the bytes that both added.
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KEPT = (1024, 8192)
LENGTHS = tuple(range(40, 160, 8))
EXAMPLES = 4


def child(source):
    """Of this process, whose environment says how much is kept."""
    import torch

    from basis_select import load
    from basis_select.checkpoint.fast import ready
    from basis_select.data.tasks import Example
    from basis_select.layers.straight_through import training
    from basis_select.system.machine import resident_memory
    from basis_select.training.data import Batches
    from basis_select.training.loss import task_loss
    from basis_select.tune import trainable

    torch.set_num_threads(1)
    random.seed(0)
    wide = load(source, "float32")[0]
    models = {"as stored": load(source)[0], "fast": ready(load(source)[0], compiled=False)}
    rows = [[random.randrange(3, wide.config.vocab_size) for _ in range(length)] for length in LENGTHS]
    before, found = resident_memory(), {}

    def timed(run):
        for row in rows:
            run(row)
        began = time.perf_counter()
        for row in rows:
            run(row)
        return time.perf_counter() - began

    for name, model in models.items():
        with torch.no_grad():
            seconds = timed(lambda row, model=model: model(input_ids=torch.tensor([row])))
        found[f"prompt, {name}, ms"] = 1e3 * seconds / len(rows)

    def step(row):
        example = Example("", "", "", tuple(row), len(row) // 2)
        task_loss(wide, Batches([example] * EXAMPLES, EXAMPLES, 1, 0)[0])[0].backward()
        wide.zero_grad()

    with training(wide):
        trainable(wide, False)
        found["training, us a token"] = 1e6 * timed(step) / (EXAMPLES * sum(LENGTHS))
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap is no cost
    return {**found, "bytes": resident_memory() - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help="internal: measure in this process")
    a = parser.parse_args()
    if a.child:
        print(json.dumps(child(a.result)))
        return
    runs = {kept: [] for kept in KEPT}
    for _ in range(a.rounds):
        for kept in KEPT:
            command = [sys.executable, __file__, a.result, str(a.out), "--child"]
            environment = {**os.environ, CAPACITY: str(kept), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            runs[kept].append(json.loads(done.stdout.splitlines()[-1]))
            print(kept, runs[kept][-1], flush=True)
    found = {kept: {key: statistics.median(r[key] for r in some) for key in some[0]} for kept, some in runs.items()}
    a.out.write_text(json.dumps({"rounds": a.rounds, "kept": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
