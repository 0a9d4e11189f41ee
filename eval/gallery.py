"""Takes what runs of recipes have found into eval/results/gallery.json, of which tables.py writes docs/gallery.md.

python eval/gallery.py RUN ...

RUN is the folder of a run that has ended, named after its recipe, such as runs/svamp. Of tasks whose rows are
generated some answers are taken too; rows of data sets are their authors'.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from basis_select.run import recipe as recipes
from basis_select.run.recipe import PARENT, RESULT
from basis_select.run.report import Run
from basis_select.system.reading import read_json
from basis_select.system.writing import replace_text

REPO = Path(__file__).parents[1]
FOUND = REPO / "eval" / "results" / "gallery.json"
QUOTED = 4  # test items


def taken(run: Path) -> dict:
    """What the gallery says of a run."""
    recipe, ran = recipes.read(REPO / "recipes" / f"{run.name}.yaml"), recipes.read(run / "recipe.yaml")
    results, manifest = read_json(run / "results.json"), read_json(run / "manifest.json")
    return {
        "results": results,
        "other_keys": _different(recipe, ran),
        "machine": manifest["machine"],
        "versions": manifest["versions"],
        "examples": manifest["data"]["train"],
        "quotes": _quotes(Run(run, results, {})) if ran.task.startswith("reasoning_gym:") else [],
    }


def _different(a: object, b: object) -> list[str]:
    """The keys in which two recipes differ."""
    a, b = dict(_keys(vars(a))), dict(_keys(vars(b)))
    return [key for key in a if a[key] != b[key]]


def _keys(values: dict, before: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from _keys(vars(value), f"{before}{name}.")
        else:
            yield before + name, value


def _quotes(run: Run) -> list[dict]:
    """`[{prompt, answer, parent, result}, ...]` of the first test items."""
    pairs = zip(*(run.evaluation(name)["items"][:QUOTED] for name in (PARENT, RESULT)), strict=True)
    return [
        {"prompt": p["prompt"], "answer": p["answer"], "parent": p["generated"], "result": r["generated"]}
        for p, r in pairs
    ]


if __name__ == "__main__":
    found = read_json(FOUND) if FOUND.exists() else {}
    found |= {run.name: taken(run) for run in map(Path, sys.argv[1:])}
    replace_text(FOUND, json.dumps(dict(sorted(found.items())), indent=1) + "\n")
