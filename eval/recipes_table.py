"""What recipes cost, forecast by `plan`, as a table in recipes/README.md.

python eval/recipes_table.py DATA [RECIPE ...]    forecasts all recipes again, or these, into eval/results/recipes.json
python eval/recipes_table.py                      writes the table from that file

DATA as for eval/prepare_data.py, with math/gsm8k/{train,test}.jsonl and math/math500/test.jsonl. Tokens are counted on
these with the tokenizer of SmolLM2; other models are planned on their public config (public_configs.py). MATH-500's
problems, over and over, stand in for MATH's training split.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from public_configs import MODELS, SMOLLM2, save

from basis_select.checkpoint.models import config_and_tokenizer
from basis_select.data.rows import read_rows
from basis_select.data.sources import SPLITS
from basis_select.evaluation.report import markdown
from basis_select.run import estimates
from basis_select.run import recipe as recipes
from basis_select.run.plan import Plan, plan
from basis_select.run.room import bytes_of
from basis_select.system.reading import read_json
from basis_select.system.writing import replace_text

REPO = Path(__file__).parents[1]
RESULTS = REPO / "eval" / "results"
README = REPO / "recipes" / "README.md"
FREE = 64e9  # bytes of memory that every plan may count on: with less, decompose passes over its examples more often
TASKS = ("gsm8k", "math", "mbpp", "svamp")  # of which DATA has what is needed to count tokens


def forecast(data, names):
    """Write what `plan` says of recipes whose data is known into eval/results/recipes.json."""
    estimates.moment_room = lambda device, coming: (FREE - coming) // 2
    found = costs()
    for path in sorted((REPO / "recipes").glob("*.yaml")):
        r = recipes.read(path)
        known = r.model in MODELS or r.model.startswith("wheel:")
        if path.stem not in (names or [path.stem]) or not known or r.task in ("data.jsonl", "chats.jsonl"):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            changed = recipes.read(path, _stand_ins(r, Path(data), Path(scratch)))
            found[path.stem] = {"model": r.model, "task": r.task, **_numbers(plan(changed))}
        print(path.stem, found[path.stem], flush=True)
        replace_text(RESULTS / "recipes.json", json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def _stand_ins(r, data, scratch):
    """Changes that put files here in the hub's place."""
    changes = []
    if r.task in TASKS:
        for split, rows in _rows(r.task, data).items():
            (scratch / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        changes.append(f"data.options={{data_dir: {scratch}}}")
    if r.model in MODELS:
        save(r.model, scratch)
        config_and_tokenizer(SMOLLM2)[1].save_pretrained(scratch)
        changes.append(f"model={scratch}")
    return changes


def _rows(task, data):
    if task == "svamp":
        rows = read_rows(data / "math/svamp/test.jsonl")
        return {"train": rows[:700], "test": rows[700:]}  # as many as on the hub
    if task == "math":
        test = read_rows(data / "math/math500/test.jsonl")
        train = [{**test[i % len(test)], "problem": f"{test[i % len(test)]['problem']} {i}"} for i in range(7500)]
        return {"train": train, "test": test}
    folder, splits = {"gsm8k": ("math/gsm8k", SPLITS[::2]), "mbpp": ("code/mbpp", SPLITS)}[task]
    return {split: read_rows(data / folder / f"{split}.jsonl") for split in splits}


def _numbers(found: Plan) -> dict:
    """The figures of a plan."""
    row = found.rows[recipes.RESULT]
    return {
        "examples": len(found.task.train),
        "tokens": round(found.tokens),
        "parameters_m": round(sum(p.numel() for p in found.model.parameters()) / 1e6, 1),
        "kept_m": round(row.published / 1e6, 2),
        "megabytes": round(bytes_of(row.recipe, row.parent, row.published) / 1e6),
        "tflop": round(found.flops / 1e12, 1),
        "memory_gib": round(found.memory / 2**30, 1),
    }


def costs():
    return read_json(RESULTS / "recipes.json")


def rate():
    """TFLOP/s that tuning reached on two cores, by eval/plan_check.py."""
    tuned = read_json(RESULTS / "plan_check.json")["SmolLM2-135M"]["tune"]
    return tuned["flops"]["measured"] / tuned["seconds"]["measured"] / 1e12


def table(found):
    head = ("recipe", "model", "task", "examples", "whole model", "TFLOP", "hours on two cores", "memory")
    rows = [
        (
            f"[{name}]({name}.yaml)",
            "SmolLM2-135M-Instruct" if c["model"].startswith("wheel:") else c["model"].rpartition("/")[2],
            c["task"],
            f"{c['examples']:,} of {c['tokens']} tokens",
            _after(c),
            f"{c['tflop']:,.0f}",
            f"{c['tflop'] / rate() / 3600:,.1f}",
            f"{c['memory_gib']:.1f} GiB",
        )
        for name, c in found.items()
    ]
    return markdown(head, rows, "lllrrrrr")


def _after(c):
    if c["kept_m"] >= c["parameters_m"]:
        return f"{c['parameters_m']:,.0f} M to an outcome"
    return f"{c['parameters_m']:,.0f} M to {c['kept_m']:,.0f} M, {c['megabytes']:,} MB"


def fill(text):
    """`text` with the table as the result file says."""
    block = f"<!-- costs -->\n{table(costs())}<!-- end -->"
    return re.sub(r"<!-- costs -->\n.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:]:
        forecast(sys.argv[1], sys.argv[2:])
    README.write_text(fill(README.read_text()))
