"""The model card of a published checkpoint, and its evaluation results as the hub reads them."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..evaluation.report import interval

MARK = "written by basis_select, sha256 of the text above:"
TEXT = """---
{metadata}
---
# {name}

{what} Its linear layers are written as sums of rank-one bases, of which only those that matter to the task were kept.

## Load it

```python
import basis_select  # first, always: see Limits

model, tokenizer = basis_select.load("{repo_id}")
```

`load` checks every file against the hashes recorded when it was saved. After the import,
`AutoModelForCausalLM.from_pretrained("{repo_id}")`, `pipeline`, `generate`, `Trainer` and PEFT work as well.{prompt}

## Size

| | this model | its dense parent |
|---|---:|---:|
{sizes}

## Quality

{quality}

## How it was made

{made}

## Limits

{limits}
"""


def card(repo_id, base, metadata, sizes, recipe, row, parent, versions):
    """The text of README.md.

    metadata: licence and language, as in the card of the base. sizes, row, parent: what `sizes` returns, and the
    results of this checkpoint and of the dense parent as results.json has them; recipe: the mapping in recipe.yaml;
    versions: of the packages that made it. Without a run, recipe and versions are empty and row and parent None.
    """
    task = _task(recipe)
    what = f"{_name(base)}, compressed with basis_select for {f'one task, {task}' if task else 'one task'}."
    return signed(
        TEXT.format(
            metadata=_metadata(base, metadata).to_yaml(),
            name=repo_id.partition("/")[2],
            repo_id=repo_id,
            what=what,
            prompt=_prompt(recipe),
            sizes=_sizes(sizes, parent),
            quality=_quality(row, parent, recipe),
            made=_made(recipe, versions),
            limits=_limits(row, task),
        )
    )


def signed(text):
    """A card with a last line by which `is_ours` knows it again."""
    return f"{text.rstrip()}\n\n<!-- {MARK} {_digest(text)} -->\n"


def is_ours(text):
    """Whether `signed` wrote this card, and nobody changed it since."""
    match = re.fullmatch(rf"(.*)<!-- {MARK} ([0-9a-f]{{64}}) -->\s*", text.replace("\r\n", "\n"), re.DOTALL)
    return match is not None and _digest(match[1]) == match[2]


def _digest(text):
    return hashlib.sha256(text.strip().encode()).hexdigest()


def evaluation(repo_id, recipe, row):
    """Entries for .eval_results/TASK.yaml: the accuracy in percent, if the task is a data set of the hub as it is."""
    from ..tasks import HUB

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


def is_hub_id(base):
    return bool(base) and not base.startswith("wheel:") and base.count("/") == 1 and not Path(base).exists()


def _name(base):
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    if not base:
        return "A language model"
    # A path of this machine says nothing elsewhere.
    return f"`{base if base.startswith('wheel:') else Path(base).name}`"


def _metadata(base, known):
    about = {"base_model": base, "base_model_relation": "quantized"} if is_hub_id(base) else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["basis_select", "low-rank", "compression"],
        **about,
        **known,
    )


def _task(recipe):
    task = recipe.get("task")
    return Path(task).name if task else None


def _prompt(recipe):
    from ..tasks import HUB

    template = recipe.get("data", {}).get("prompt") or getattr(HUB.get(recipe.get("task")), "prompt", None)
    return f"\nIt was trained on prompts of this form:\n\n```\n{template}\n```" if template else ""


def _sizes(s, parent):
    dense = parent["sizes"] if parent else {}
    rows = [("bases", f"{s['bases']:,}", dense.get("bases"))]
    for name, key in (("parameters of the targeted linear layers", "targeted"), ("all parameters", "parameters")):
        whole = s[f"{key}_dense"]
        rows.append((name, f"{s[key]:,} ({whole / s[key]:.2f}x fewer)", whole))
    rows.append(("bytes of the weight files", f"{s['bytes']:,}", dense.get("bytes")))
    return "\n".join(f"| {name} | {own} | {'' if whole is None else f'{whole:,}'} |" for name, own, whole in rows)


def _quality(row, parent, recipe):
    if row is None:
        return "No evaluation is recorded for this checkpoint."
    lines = ["| | this model | its dense parent |", "|---|---|---|"]
    for name, key, form in (("accuracy", "accuracy", ".1%"), ("NLL per response token", "nll", ".3f")):
        if row[key]:
            lines.append(f"| {name} | {interval(row[key], form)} | {interval(parent[key], form)} |")
    text = "\n".join(lines) + (
        f"\n\nMeasured on the same {row['n']} test items for both, greedy decoding. In brackets are 95 % intervals: "
        "Wilson for accuracy, bootstrap over items for the negative log-likelihood."
    )
    if row["paired"]:
        p = row["paired"]
        text += f" Against the parent {p['gained']} items were gained and {p['lost']} lost"
        text += f" (McNemar's exact p = {p['p']:.2g})."
    if recipe.get("tune", {}).get("steps"):
        text += " The parent is the base model trained on the same task."
    return text


def _made(recipe, versions):
    if not recipe:
        return "The recipe of this checkpoint was not recorded."
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "```\nbasis-select run recipe.yaml\n```\n\n"
        "with the `recipe.yaml` in this repository, which has every default written out and of paths the last part. "
        "Seeds, versions and hashes of data and parent are in `manifest.json`, all results in `results.json`. "
        f"Made with {packages}."
    )


def _limits(row, task):
    n = f"The numbers above come from {row['n']} test items of that task. " if row else ""
    return (
        f"- For {task or 'its task'} only. What the task does not need was removed: expect other tasks, languages and "
        "prompt formats to work much worse than with the dense parent. None of them was measured.\n"
        f"- {n}They say nothing about safety or bias; the limits of the base model remain.\n"
        "- Without `import basis_select` transformers does not know the format: `from_pretrained` raises an error "
        "over mismatched sizes. Do not ignore them: the compressed layers would be filled with random weights.\n"
        "- Servers that do not go through transformers' `from_pretrained` need a dense export, which is no smaller."
    )
