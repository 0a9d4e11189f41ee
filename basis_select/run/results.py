"""What a run says of itself in the end: one row of results for every model, and a manifest."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..data.tasks import Task
from ..evaluation.accuracy import compare
from ..system.reading import read_json
from .recipe import PARENT, Recipe


def result_of(name: str, final: Path, evaluation: dict, parent: dict, speed: dict) -> dict:
    """One row of results.json; parent: the evaluation of the dense model."""
    facts = read_json(final / "stage.json")
    return {
        "accuracy": evaluation["accuracy"],
        "nll": evaluation["nll"],
        "n": evaluation["n"],
        "sizes": facts["sizes"],
        "decode_tokens_per_second": speed,
        "paired": compare(parent, evaluation) if name != PARENT and evaluation["accuracy"] else None,
        "stages": history(final),
        "weights_sha256": facts["weights_sha256"],
    }


def history(stage: Path) -> list[dict]:
    """`[{stage, seconds, peak_memory_bytes, validation_nll}, ...]` of everything a checkpoint came from, in order."""
    seen = {}

    def visit(path: Path) -> None:
        facts = read_json(path / "stage.json")
        for name in facts["upstream"]:
            if name not in seen:
                visit(path.parent / name)
        seen[path.name] = {
            "stage": path.name,
            **{k: facts.get(k) for k in ("seconds", "peak_memory_bytes", "validation_nll")},
        }

    visit(stage)
    return list(seen.values())


def manifest_of(recipe: Recipe, parent: Path, result: Path, task: Task) -> dict:
    """What it takes to tell whether another run was the same: versions, seed, hashes of weights and data."""
    encoded = json.dumps([[e.input_ids for e in split] for split in (task.train, task.validation, task.test)])
    return {
        **_made_with(result),
        "seed": recipe.seed,
        "parent_weights_sha256": read_json(parent / "stage.json")["weights_sha256"],
        "data_sha256": hashlib.sha256(encoded.encode()).hexdigest(),
        "data": {
            "train": len(task.train),
            "validation": len(task.validation),
            "test": len(task.test),
            **task.report,
        },
    }


def _made_with(result: Path) -> dict:
    """`environment()` of the stages that `result` came from; where they differ, each one's, joined by commas."""
    made = [read_json(result.parent / stage["stage"] / "stage.json").get("made_with", {}) for stage in history(result)]
    names = {name: None for one in made for name in one.get("versions", {})}
    versions = {name: _joined(one.get("versions", {}).get(name) for one in made) for name in names}
    return {"versions": versions, **{key: _joined(one.get(key) for one in made) for key in ("python", "machine")}}


def _joined(values: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(value or "unknown" for value in values))
