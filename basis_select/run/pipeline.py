"""Runs a recipe: its parent and all its rows through the list of stages, and what is published of them."""

import json
import shutil
from pathlib import Path

from ..checkpoint.verify import verify
from ..evaluation.report import curve, table
from ..system.reading import read_json
from ..system.writing import replace_text
from . import recipe as recipes
from .directory import alone, check_stages, publish, require_own, sweep
from .disk import OnDisk
from .plan import rows_of
from .recipe import PARENT, Recipe
from .report import report
from .results import manifest_of, result_of
from .room import check_budget
from .terminal import Progress
from .work import FILES


def run(recipe: Recipe, folder: Path | str, shard: bool = False) -> dict:
    """Run `recipe` in `folder`, continuing whatever is there; returns the results, also written to results.json.

    The folder receives recipe.yaml (every default written out), manifest.json, metrics.jsonl, stages/, final/
    (the checkpoint), results.json, results.md and report.html; for a recipe with `sizes` also final-SIZE/, curve.csv
    and curve.png. What an earlier run published stays until all of this one is there, and only what a run wrote is
    replaced. Of several processes the first runs this and the others train with it (processes.lead); `shard` spreads
    parent, model and optimizer over them while they tune and heal. Raises ValueError, before any work, if another run
    uses the folder, if it holds a damaged stage or files of somebody else where the run would write.
    """
    folder = Path(folder)
    require_own(folder, recipe.model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror}") from None
    with alone(folder):
        (folder / "stages").mkdir(exist_ok=True)
        sweep(folder)
        check_stages(folder)
        rows = {PARENT: recipe, **rows_of(recipe)}
        progress = Progress(rows)
        disk = OnDisk(recipe, folder, shard, progress)
        loaded = disk.row(dense=True, until="load")
        view = disk.view(recipe, loaded)
        for row in rows_of(recipe).values():  # what cannot be met is said before hours are spent on tuning
            check_budget(row, loaded["parent"] / "model", view.task)
        progress.loaded(view)
        states = {}
        for name, row in rows.items():
            progress.row = name
            states[name] = disk.row(row, dense=name == PARENT)
        progress.row = ""
        results = _results(states, disk.time(states))
        _publish(recipe, folder, states)
        _describe(recipe, folder, results, disk, states[recipes.RESULT])
    return results


def _results(states: dict[str, dict], timed: Path) -> dict[str, dict]:
    evaluations = {name: read_json(state["evaluation"] / FILES["evaluation"]) for name, state in states.items()}
    speeds = read_json(timed / FILES["speed"])
    results = {
        name: result_of(name, state["final"], evaluations[name], evaluations[PARENT], speeds[name])
        for name, state in states.items()
    }
    results[recipes.RESULT]["reloaded"] = verify(states[recipes.RESULT]["final"] / "model")
    return results


def _publish(recipe: Recipe, folder: Path, states: dict[str, dict]) -> None:
    (folder / "results.json").unlink(missing_ok=True)  # no push says of new weights what is true of the old ones
    publish(states[recipes.RESULT]["final"], folder / "final")
    for size, name in zip(recipe.sizes, recipe.family(), strict=True):
        publish(states[name]["final"], folder / f"final-{size}")
    of_others = {*folder.glob("final-*")} - {folder / f"final-{size}" for size in recipe.sizes}
    for path in of_others:  # what an earlier recipe asked for: `require_own` knows that it is a run's
        shutil.rmtree(path)
    for path in folder.glob("curve.*"):
        path.unlink()


def _describe(recipe: Recipe, folder: Path, results: dict[str, dict], disk: OnDisk, state: dict) -> None:
    """Write what tells of a run beside its checkpoints."""
    manifest = manifest_of(recipe, state["parent"], state["final"], disk.view(recipe, state).task)
    replace_text(folder / "recipe.yaml", recipes.write(recipe))
    replace_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    replace_text(folder / "results.md", table(results))
    replace_text(folder / "results.json", json.dumps(results, indent=1))
    if recipe.sizes:
        curve({name: results[name] for name in (PARENT, recipes.RESULT, *recipe.family())}, folder)
    report(folder)
