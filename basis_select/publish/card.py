"""The model card of a published checkpoint, and its evaluation results as the hub reads them."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..evaluation.report import interval

MARK = "written by basis_select, sha256 of the text above:"
TEMPLATE = Path(__file__).with_name("card_template.md")
FAMILY = Path(__file__).with_name("family_template.md")


def card(
    repo_id: str,
    base: str | None,
    metadata: dict,
    sizes: dict,
    recipe: dict,
    row: dict | None,
    parent: dict | None,
    versions: dict[str, str],
    trimmed: dict | None = None,
) -> str:
    """The text of README.md.

    metadata: licence and language, as in the card of the base. sizes, row, parent: what `sizes` returns, and the
    results of this checkpoint and of the dense parent as results.json has them; recipe: the mapping in recipe.yaml;
    versions: of the packages that made it; trimmed: what `trim` reports, if it was. Without a run, recipe and versions
    are empty and row and parent None.
    """
    made = ModelCard.from_template(
        _metadata(base, metadata),
        template_path=TEMPLATE,
        name=repo_id.partition("/")[2],
        repo_id=repo_id,
        origin=_name(base),
        task=Path(recipe["task"]).name if recipe.get("task") else None,
        prompt=_prompt(recipe),
        sizes=_sizes(sizes, parent),
        bits=sizes.get("bits"),
        quality=_quality(row, parent) if row else [],
        row=row,
        recipe=recipe,
        versions=versions,
        trimmed=trimmed,
    )
    return signed(made.content)


def family_card(
    repo_id: str, base: str | None, metadata: dict, recipe: dict, rows: dict[str, dict], parent: dict
) -> str:
    """The text of the README.md over all sizes of a model. rows: `{repository: its results}`, the smallest first."""
    made = ModelCard.from_template(
        _metadata(base, metadata),
        template_path=FAMILY,
        name=repo_id.partition("/")[2],
        origin=_name(base),
        task=Path(recipe["task"]).name if recipe.get("task") else None,
        rows=[
            *(_overview(f"[{name}](https://huggingface.co/{name})", row) for name, row in rows.items()),
            _overview("the dense parent", parent),
        ],
        n=parent["n"],
        smallest=next(iter(rows)),
    )
    return signed(made.content)


def _overview(name: str, row: dict) -> dict[str, str]:
    return {
        "name": name,
        "megabytes": f"{row['sizes']['bytes'] / 1e6:.1f}",
        "parameters": f"{row['sizes']['parameters']:,}",
        "accuracy": interval(row["accuracy"], ".1%") if row["accuracy"] else "",
        "nll": interval(row["nll"], ".3f"),
    }


def signed(text: str) -> str:
    """A card with a last line by which `is_ours` knows it again."""
    return f"{text.rstrip()}\n\n<!-- {MARK} {_digest(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether `signed` wrote this card, and nobody changed it since."""
    match = re.fullmatch(rf"(.*)<!-- {MARK} ([0-9a-f]{{64}}) -->\s*", text.replace("\r\n", "\n"), re.DOTALL)
    return match is not None and _digest(match[1]) == match[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def evaluation(repo_id: str, recipe: dict, row: dict | None) -> list[dict]:
    """Entries for .eval_results/TASK.yaml: the accuracy in percent, if the task is a data set of the hub as it is."""
    from ..data.sources import HUB

    if row is None or not row["accuracy"] or recipe["task"] not in HUB or recipe["data"]["options"]:
        return []
    accuracy, how = row["accuracy"], f"{row['n']} test items drawn at random, greedy, no examples in the prompt"
    entry = EvalResultEntry(
        dataset_id=HUB[recipe["task"]].path,
        task_id=recipe["task"],
        value=100 * accuracy["value"],
        source_url=f"https://huggingface.co/{repo_id}",
        source_name="Model Card",
        notes=f"{how}; 95 % interval {interval(accuracy, '.1%')}",
    )
    return eval_result_entries_to_yaml([entry])


def is_hub_id(base: str | None) -> bool:
    return bool(base) and not base.startswith("wheel:") and base.count("/") == 1 and not Path(base).exists()


def _name(base: str | None) -> str:
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    if not base:
        return "A language model"
    # A path of this machine says nothing elsewhere.
    return f"`{base if base.startswith('wheel:') else Path(base).name}`"


def _metadata(base: str | None, known: dict) -> ModelCardData:
    about = {"base_model": base, "base_model_relation": "quantized"} if is_hub_id(base) else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["basis_select", "low-rank", "compression"],
        **about,
        **known,
    )


def _prompt(recipe: dict) -> str | None:
    from ..data.sources import HUB

    return recipe.get("data", {}).get("prompt") or getattr(HUB.get(recipe.get("task")), "prompt", None)


def _sizes(s: dict, parent: dict | None) -> list[tuple[str, str, str]]:
    """`[(what, of this model, of its dense parent), ...]` as texts."""
    dense = parent["sizes"] if parent else {}
    rows = [("bases", f"{s['bases']:,}", dense.get("bases"))]
    for name, key in (("parameters of the targeted linear layers", "targeted"), ("all parameters", "parameters")):
        whole = s[f"{key}_dense"]
        rows.append((name, f"{s[key]:,} ({whole / s[key]:.2f}x fewer)", whole))
    rows.append(("bytes of the weight files", f"{s['bytes']:,}", dense.get("bytes")))
    return [(name, own, "" if whole is None else f"{whole:,}") for name, own, whole in rows]


def _quality(row: dict, parent: dict) -> list[tuple[str, str, str]]:
    """`[(measure, of this model, of its dense parent), ...]` as texts with their intervals."""
    measures = (("accuracy", "accuracy", ".1%"), ("NLL per response token", "nll", ".3f"))
    return [(name, *(interval(x[key], form) for x in (row, parent))) for name, key, form in measures if row[key]]
