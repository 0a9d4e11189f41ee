"""How fast to heal: one start, several learning rates, the same steps and batches. `suitable_rate` is fitted to this.

python eval/healing_rate.py GRID.yaml FOLDER RESULTS.jsonl TASK:METHOD:SIZE:LR,LR,... ...

GRID and FOLDER as in compare.py, whose parents and decompositions are used. A row of RESULTS.jsonl: the KL to the
parent before healing, the rate, and the NLL per response token of the validation split after it: the rule is a choice,
and the test split is for what was chosen.
"""

import copy
import json
import sys
import time
from pathlib import Path

import yaml
from compare import bench_of, started

from basis_select.heal import distance, heal
from basis_select.training.loss import response_nll

STEPS = 30


def main():
    path, folder, results = map(Path, sys.argv[1:4])
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    for spec in sys.argv[4:]:
        name, method, size, rates = spec.split(":")
        bench = bench_of(grid, name, 0, folder, STEPS)
        task, teacher = bench.task, bench.labels
        r, start, _, _ = started(bench, grid["methods"][method], method, size, 0)
        kl = distance(start, task, teacher)
        for lr in map(float, rates.split(",")):
            model = copy.deepcopy(start)
            began = time.monotonic()
            heal(model, task, teacher, steps=STEPS, batch_size=r.heal.batch_size, lr=lr)
            seconds = round(time.monotonic() - began, 1)
            row = {"task": name, "method": method, "size": size, "kl": round(kl, 4), "lr": lr, "steps": STEPS}
            row |= {"validation_nll": round(response_nll(model, task.validation, task.pad_id), 4), "seconds": seconds}
            print(row, flush=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
