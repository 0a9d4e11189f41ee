"""A model, and the parent it came from, measured on the same items, with all that is needed to measure them again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.models import config_and_tokenizer, load
from ..data.tuned_on import TunedOn
from ..sizes import sizes
from ..system.machine import command_line, environment
from ..system.reading import misfit, read_json
from ..system.writing import replace_text, require_file
from ..target import Dtype
from .accuracy import SEED, compare
from .report import interval
from .standard import SUITE, domains, evaluate_task, expand

REPORT = {"model": {"dtype": str, "sizes": dict}, "tasks": {str: dict}, "settings": dict, "domains": dict}
OWN, TRIMMED, UNTRIMMED = "its own tokens", "the tokens left to it", "its parent's tokens"  # what NLL is per
RESULT = {"n": int, "of": int, "items": [dict], "batch_size": int}  # of a task


def measure(
    source: str | Path,
    names: Sequence[str],
    *,
    against: str | Path | None = None,
    dtype: Dtype | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    samples: int = 1,
    batch_size: int | None = None,
    allow_code_execution: bool = False,
) -> dict:
    """Load `source`, evaluate it on tasks (`evaluate_on`), and pair it with its parent.

    `against`: where the parent is loaded from, or a .json file that this function wrote for it. Both are measured in
    one dtype, on the same prompts, in batches of the same size. Returns, and writes to the file `out`, `model`
    (source, dtype, sha256 of its weights, the four sizes), `tasks` (`{name: result}`), `domains` of the suite, the
    same three for `against`, `paired` (`{name: compare}`), versions, seed, settings and the command. Raises
    ValueError if results cannot be paired. Rows that the model was tuned on are left out for both models.
    If `against` is its parent, the likelihoods of a trimmed model are per token of the parent's tokenizer, as in a run;
    otherwise they are per token of its own tokenizer, and `model["counted_in"]` and `lines` say so.

        >>> found = bs.measure("parent", ["data.jsonl"], against="parent", limit=4)
        >>> found["paired"]["data.jsonl"]["nll"]["value"]
        0.0
    """
    if out:
        require_file(out)
    names = expand(names, allow_code_execution)
    if not names:
        raise ValueError("no task is named: give at least one, or `suite`")
    how = {"limit": limit, "shots": shots, "samples": samples}
    batches = dict.fromkeys(names, batch_size)
    parent = None
    if against and Path(against).suffix == ".json":
        parent = _recorded(against, names, how, dtype)
        dtype = parent["model"]["dtype"]
        batches = {name: parent["tasks"][name]["batch_size"] for name in names}
    elif against:
        config_and_tokenizer(against)  # before the work, not after half of it
    origin = parent["model"]["source"] if parent else against
    measured, known = _measured(source, dtype, names, how, batches, origin=origin)
    report = {
        "command": command_line(),
        **environment(),
        "seed": SEED,
        "settings": how,
        **measured,
    }
    if against:
        if parent is None:
            batches = {name: report["tasks"][name]["batch_size"] for name in names}
            parent, _ = _measured(against, report["model"]["dtype"], names, how, batches, known)
        report["against"] = parent
        report["paired"] = {name: compare(parent["tasks"][name], report["tasks"][name]) for name in names}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(out), json.dumps(report, indent=1))
    return report


def _measured(
    source: str | Path,
    dtype: Dtype | None,
    names: Sequence[str],
    how: dict,
    batches: dict[str, int | None],
    known: TunedOn | None = None,
    origin: str | Path | None = None,
) -> tuple[dict, TunedOn | None]:
    """`(report, what is not to be tested)`: what the model was tuned on, and what is `known` beside."""
    model, tokenizer = load(source, dtype)
    counts = _untrimmed(model, origin)
    own = getattr(model, "tuned_on", None)
    known = own | known if own and known else own or known
    tasks = {
        name: evaluate_task(model, tokenizer, name, batch_size=batches[name], known=known, counts=counts, **how)
        for name in names
    }
    report = {
        "model": {
            "source": str(source),
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights_sha256": weights_sha256(model),
            "sizes": sizes(model, source if Path(source).is_dir() else None),
            "rows_tuned_on": own and len(own.prompts),
            "counted_in": UNTRIMMED if counts else TRIMMED if _trimmed(model) else OWN,
        },
        "tasks": tasks,
        "domains": domains(tasks),
    }
    return report, known


def _trimmed(model: PreTrainedModel) -> dict:
    """What `trim` has reported of a model, nothing if it was not trimmed."""
    return getattr(model.config, "trimmed", None) or {}


def _untrimmed(model: PreTrainedModel, origin: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a trimmed model's parent, if `origin` is that parent: it has as many tokens as there were."""
    trimmed = _trimmed(model)
    if not trimmed or origin is None:
        return None
    config, tokenizer = config_and_tokenizer(origin)
    return tokenizer if config.get_text_config().vocab_size == trimmed["tokens_before"] else None


def _recorded(path: str | Path, names: Sequence[str], how: dict, dtype: Dtype | None) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no result file at {path}")
    report = read_json(Path(path), REPORT)
    missing = [name for name in names if name not in report["tasks"]]
    if missing:
        raise ValueError(f"{path} has no result for {missing[0]}: it holds {', '.join(report['tasks'])}")
    lost = next((name for name in names if misfit(report["tasks"][name], RESULT)), None)
    if lost:
        raise ValueError(f"{path} is damaged: {misfit(report['tasks'][lost], RESULT, f'tasks.{lost}')}")
    if report["settings"] != how:
        raise ValueError(f"{path} was measured with {report['settings']}, this is {how}: they cannot be paired")
    if dtype not in (None, report["model"]["dtype"]):
        raise ValueError(f"{path} was measured in {report['model']['dtype']}, not in {dtype}: they cannot be paired")
    return {key: report[key] for key in ("model", "tasks", "domains")}


def weights_sha256(model: nn.Module) -> str:
    """One digest of the names and bytes of all tensors of `model`, in the dtype it has."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def lines(report: dict) -> Iterator[str]:
    """A report as lines of text: a block per task, a line per model."""
    models = [("parent", report["against"])] if "against" in report else []
    models.append(("model", report))
    if report["model"].get("rows_tuned_on") is None:
        yield "what the model was tuned on is not recorded: whether it has seen what is tested cannot be told"
    if report["model"].get("counted_in") == TRIMMED:
        yield (
            "nll is per token of the trimmed tokenizer, not, as in a run, of the one before: with --against PARENT, "
            "the model that was trimmed, it is per token of the parent's and can be compared"
        )
    for name, result in report["tasks"].items():
        shots = f", {result['shots']} shots" if result.get("shots") else ""
        cut = f", {result['cut']:,} prompts cut at their start" if result.get("cut") else ""
        left_out = f", {result['trained']:,} that it was tuned on left out" if result.get("trained") else ""
        yield f"{name} ({result['n']:,} of {result['of']:,}{shots}{cut}{left_out})"
        for who, measured in models:
            yield f"  {who}: {', '.join(_figures(measured['tasks'][name]))}"
        if result.get("near"):
            others = ", ".join(_figures(result["without_near"] or {})) or "none is left"
            yield f"  {result['near']:,} share passages with rows that it was tuned on; without them: {others}"
        if "paired" in report:
            yield f"  paired: {', '.join(_differences(report['paired'][name]))}"
    for domain in report["domains"]:
        yield f"{domain}, mean of {len(SUITE[domain])}"
        for who, measured in models:
            yield f"  {who}: {interval(measured['domains'][domain], '.1%')}"


def _figures(result: dict) -> Iterator[str]:
    forms = {"accuracy": ".1%", "nll": ".4f", "perplexity": ".2f", "repetition": ".1%", "empty": ".1%"}
    for key, form in forms.items():
        if result.get(key):
            yield f"{key} {interval(result[key], form)}"
    for k, value in result.get("pass@k", {}).items():
        if k != "1":
            yield f"pass@{k} {interval(value, '.1%')}"


def _differences(paired: dict) -> Iterator[str]:
    if "p" in paired:
        yield f"{paired['gained']} gained, {paired['lost']} lost (p {paired['p']:.2g})"
    for key in ("nll", "score"):
        if key in paired:
            yield f"{key} {interval(paired[key], '+.4f')}"
