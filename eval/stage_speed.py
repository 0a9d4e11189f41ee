"""How fast the stages of a run were, in tokens a second, beside the floor: the time of their products alone.

python eval/stage_speed.py RUN OUT.json

RUN is the folder of a run that has ended on this machine, with nothing beside it. The floor is what `plan` counts of a
stage, at the speed of a large product measured here, in the dtype and with the threads of the run: float64 for
decompositions. eval/tables.py writes the table.
"""

import argparse
import json
from pathlib import Path

import torch

from basis_select.run import measuring, plan, recipe
from basis_select.run.recipe import PARENT, RESULT
from basis_select.system.machine import fast_bf16
from basis_select.system.processes import device
from basis_select.system.reading import read_json
from basis_select.system.writing import replace_text


def seconds_of(run: Path, row: str, results: dict) -> dict[str, float]:
    """`{stage: seconds}` of a row, with those of its evaluation."""
    found = {stage["stage"].rpartition("-")[0]: stage["seconds"] for stage in results[row]["stages"]}
    final = results[row]["stages"][-1]["stage"]
    facts = [read_json(path) for path in run.glob("stages/evaluate-*/stage.json")]
    return found | {"evaluate": next(f["seconds"] for f in facts if f["upstream"] == [final])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    machine = read_json(a.run / "manifest.json")["machine"]
    torch.set_num_threads(int(machine.split(" torch threads")[0].rpartition(" ")[2]))
    rates = {name: rate / measuring.EFFICIENCY for name, rate in measuring.machine_rates().items()}
    results = read_json(a.run / "results.json")
    rows, seconds = [], {row: seconds_of(a.run, row, results) for row in (PARENT, RESULT)}
    for step in plan.plan(recipe.read(a.run / "recipe.yaml"), rates=rates).steps:
        if step.row not in seconds or not step.cost.tokens:
            continue
        floor = step.cost.flops / rates["train"] if step.name == "evaluate" else step.cost.seconds
        found = {"tokens": step.cost.tokens, "flops": step.cost.flops, "floor": floor}
        rows.append({"row": step.row, "stage": step.name, **found, "seconds": seconds[step.row][step.name]})
    dtype = "bfloat16" if fast_bf16(device()) else "float32"
    found = {"machine": machine, "dtype": dtype, "flops_per_second": rates, "stages": rows}
    replace_text(a.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
