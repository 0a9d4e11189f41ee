"""Standard benchmarks through lm-eval: math, code, perplexity, and the capability suite of small language models.

The tasks are the YAML files in the folder `tasks` beside this module; lm-eval's own command runs them as well
(`--include_path`). Documents come from the hub, or from the folder that the environment variable BASIS_SELECT_DATA
names. To each task that generates, NAME, belongs NAME_nll: the likelihood of the reference response to the same prompt.
"""

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import Encoder
from ..data.sources import HUB
from ..data.tasks import Task, counted_as, load_task
from ..data.tuned_on import TunedOn
from ..system.machine import free_memory
from ..system.reading import sha256
from .accuracy import bootstrap, evaluate, likelihood, lm_eval, pooled, run, summary, wilson

FOLDER = Path(__file__).parent / "tasks"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.yaml")))
CODE = ("humaneval", "mbpp", "mbpp_zeroshot")
# arXiv 2409.15790, section 3.1; its Minerva Math is MATH-500 here.
SUITE = {
    "commonsense": (
        "hellaswag",
        "truthfulqa_mc2",
        "winogrande",
        "commonsense_qa",
        "piqa",
        "openbookqa",
        "boolq",
    ),
    "problem_solving": ("arc_easy", "arc_challenge", "mmlu"),
    "math": ("gsm8k", "math500"),
}
TEMPERATURE, TOP_P = 0.8, 0.95  # of sampled programs, as Chen et al. (arXiv 2107.03374) sample for pass@k
TYPICAL = 1024  # tokens of a request that a batch is sized for
LOOP = 4, 100  # copies, characters


def expand(names: Sequence[str], allow_code_execution: bool = False) -> list[str]:
    """Task names as evaluated: `suite` or a domain of it becomes its data sets, and NAME becomes NAME and NAME_nll.

    What is none of our names must be a source for `load_task`. Raises ValueError on others, and where a task would
    run programs that a model wrote and that was not allowed.
    """
    found = []
    for name in names:
        if name == "suite":
            found += [member for domain in SUITE.values() for member in domain]
        elif name in SUITE:
            found += SUITE[name]
        elif name in NAMES:
            found += [name, f"{name}_nll"] if f"{name}_nll" in NAMES else [name]
        elif name.startswith("reasoning_gym:") or Path(name).exists():
            found.append(name)
        else:
            known = ("suite", *SUITE, *NAMES)
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f" (meant {nearest[0]}?)" if nearest else ""
            raise ValueError(
                f"unknown task {name!r}{hint}: no file, no reasoning_gym:FAMILY and none of {', '.join(known)}"
            )
    code = [name for name in found if name in CODE]
    if code and not allow_code_execution:
        raise ValueError(
            f"{code[0]} runs programs that the model writes: allow it with --allow-code-execution, or ask for "
            f"{code[0]}_nll, which runs none"
        )
    return list(dict.fromkeys(found))


def evaluate_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    samples: int = 1,
    batch_size: int | None = None,
    allow_code_execution: bool = False,
) -> dict:
    """Score `model` on tasks, `{name: result}`: NAMES, "suite", a domain of it, or sources of `load_task`.

    `limit` takes the first rows of each; `shots` replaces the number of examples in the prompt where a task has any;
    `samples` completions of each code problem are drawn, at temperature 0.8, and give pass@k; one is greedy. Without
    a `batch_size` it follows from free memory. A result is that of `evaluate`: `accuracy`, `nll` (None where the task
    has none) and `items`, to be paired by `compare`; beside them `metric` and `metrics`, lm-eval's own, `pass@k`,
    `perplexity`, the share of generations that are `empty` or end in a loop (`repetition`), and `data`, `shots`,
    `batch_size`, `generation`, `prompts_sha256` and how many prompts were `cut` at their start because the model takes
    no more than `longest` tokens: what they were measured on. Rows that the model was tuned on are left out and counted
    as `trained`; rows that share passages with such rows are counted as `near`, and `without_near` is the
    summary of all others (tuned_on.py). Raises ValueError on an unknown name, on code that was not allowed to run,
    where nothing is left to test, and on a non-finite logit.

        >>> found = bs.evaluate_on(parent, tokenizer, ["data.jsonl"], limit=4)
        >>> len(found["data.jsonl"]["items"])
        4
    """
    names = expand(names, allow_code_execution)
    known = getattr(model, "tuned_on", None)
    return {n: evaluate_task(model, tokenizer, n, limit, shots, samples, batch_size, known) for n in names}


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    limit: int | None = None,
    shots: int | None = None,
    samples: int = 1,
    batch_size: int | None = None,
    known: TunedOn | None = None,
    counts: PreTrainedTokenizerBase | None = None,
) -> dict:
    """One result of `evaluate_on`, of a name that `expand` has let through.

    known: rows that are not to be tested; counts: the tokenizer whose tokens likelihoods are per, if not the model's.
    """
    if name not in NAMES:
        return _evaluate_rows(model, tokenizer, name, limit, batch_size, known, counts)
    metadata = {} if shots is None else {"shots": shots}
    manager = lm_eval().tasks.TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    task = manager.load(name)["tasks"][name]
    about = task.config.metadata
    if shots is not None and task.config.num_fewshot:
        task.set_config("num_fewshot", min(shots, about.get("most_shots", shots)))
    generates = task.OUTPUT_TYPE == "generate_until"
    if name in CODE:
        _require_sandbox()
        if samples > 1:
            task.set_config("repeats", samples)
            sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
            task.set_config("generation_kwargs", sampling, update=True)
    docs = task.eval_docs
    texts = [_asked(task, doc) for doc in docs] if known else []  # lm-eval takes a millisecond for each
    trained = known.trained(texts) if known else [False] * len(docs)
    fresh = [i for i, was in enumerate(trained) if not was]
    _require(fresh, name)
    taken = {"samples": fresh[:limit]} if any(trained) else {"limit": limit}
    rows = batch_size or rows_that_fit(model, generates)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(about["longest"], most or about["longest"]) if "longest" in about else None
    lm, out = run(model, tokenizer, task, rows, name, longest, name in CODE, **taken)
    items = _items(lm, task, out["samples"][name], about, Encoder(counts or tokenizer))
    near = known.near(texts) if known else [False] * len(docs)
    others = [item for item in items if not near[item["id"]]]
    return {
        "task": name,
        "n": len(items),
        "of": len(docs),
        "shots": about.get("shots", 5) if name == "mmlu" else task.config.num_fewshot,
        "data": _data(task.config.dataset_kwargs, about),
        "prompts_sha256": _digest(item["prompt_sha256"] for item in items),
        "batch_size": rows,
        "generation": task.config.generation_kwargs,
        "longest": lm.max_length,
        "cut": sum(item["cut"] for item in items),
        "trained": sum(trained),
        "near": len(items) - len(others),
        "without_near": _summary(others, about) if 0 < len(others) < len(items) else None,
        "metrics": {k: _plain(v) for k, v in out["results"][name].items() if "," in k and "_stderr" not in k},
        **_summary(items, about),
        "items": items,
    }


def _evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    limit: int | None,
    batch_size: int | None,
    known: TunedOn | None,
    counts: PreTrainedTokenizerBase | None,
) -> dict:
    """`evaluate_task` of a source of `load_task`."""
    task = load_task(name, tokenizer)
    task = counted_as(task, load_task(name, counts)) if counts else task
    task, trained = _untrained(task, name, known)
    rows = batch_size or rows_that_fit(model, generates=False)
    result = evaluate(model, tokenizer, task, limit, rows)
    prompts = [e.prompt for e in task.test[:limit]]
    near = known.near(prompts) if known else [False] * len(prompts)
    others = [item for item, is_near in zip(result["items"], near, strict=True) if not is_near]
    return {
        **result,
        "of": len(task.test),
        "batch_size": rows,
        "prompts_sha256": _digest(prompts),
        "trained": trained,
        "near": sum(near),
        "without_near": summary(others) if 0 < len(others) < len(near) else None,
    }


def _untrained(task: Task, source: str, known: TunedOn | None) -> tuple[Task, int]:
    """`(task, n)` without the n test rows that are `known`.

    A file has no test split of its own: there any other row that is not known takes their place, so that after a run
    on that file its own test split is tested, whatever the draw.
    """
    if known is None:
        return task, 0
    rows = [*task.test, *task.validation, *task.train] if Path(source).is_file() else task.test
    trained = known.trained(e.prompt for e in rows)
    fresh = [e for e, was in zip(rows, trained, strict=True) if not was][: len(task.test)]
    _require(fresh, source)
    return dataclasses.replace(task, test=fresh), sum(trained[: len(task.test)])


def _require(fresh: Sequence, name: str) -> None:
    if not fresh:
        raise ValueError(f"the model was tuned on every row of {name}: nothing is left to test")


def _asked(task: Any, doc: dict) -> str:
    """What a document asks, without examples; where that is no text, what is scored."""
    texts = (task.doc_to_text(doc), task.doc_to_target(doc))
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def rows_that_fit(model: PreTrainedModel, generates: bool) -> int:
    """Rows of a batch for which a quarter of the free memory is enough, 1 to 64, at 1,024 tokens a row.

    A row needs logits of every token, twice in fp32, or, where it `generates`, its keys and values.
    """
    config = model.config.get_text_config()
    values = 2 * config.num_hidden_layers * config.hidden_size
    per_token = values * model.dtype.itemsize if generates else 8 * config.vocab_size
    return int(min(64, max(1, free_memory(model.device) // 4 // (per_token * TYPICAL))))


def _items(lm: Any, task: Any, samples: Iterable[dict], about: dict, counter: Encoder) -> list[dict]:
    """One dict per document, in their order; the rows of several lm-eval filters become one.

    counter: by whose tokens likelihoods are divided.
    """
    fractional = about.get("fractional", task.config.repeats > 1)
    items = {}
    for sample in samples:
        texts = [part for arguments in sample["arguments"] for part in arguments if isinstance(part, str)]
        item = {"id": sample["doc_id"], "prompt_sha256": _digest(texts), "cut": _is_cut(lm, task, sample)}
        item = items.setdefault(sample["doc_id"], item)
        scores = {f"{metric},{sample['filter']}": _plain(sample[metric]) for metric in sample["metrics"]}
        if task.OUTPUT_TYPE == "loglikelihood":
            item |= likelihood(sample, counter)
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            (text,) = texts
            item |= {"nll": -sample["resps"][0][0], "tokens": len(counter.text(text))}
        else:
            if task.OUTPUT_TYPE == "multiple_choice":
                item["likelihoods"] = [responses[0][0] for responses in sample["resps"]]
            else:
                item["generated"] = sample["resps"][0]
            item.setdefault("metrics", {}).update(scores)
            if about["metric"] in scores:
                score = float(scores[about["metric"]])
                item |= {"score": score} if fractional else {"correct": bool(score)}
    return [items[i] for i in sorted(items)]


def _is_cut(lm: Any, task: Any, sample: dict) -> bool:
    """Whether lm-eval drops the start of a prompt because the request is longer than the model can take."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return False
    if task.OUTPUT_TYPE == "generate_until":
        room = lm.max_length - task.config.generation_kwargs["max_gen_toks"]
        return len(lm.tok_encode(sample["arguments"][0][0])) > room
    return len(lm.tok_encode(max(map("".join, sample["arguments"]), key=len))) > lm.max_length + 1


def _summary(items: Sequence[dict], about: dict) -> dict:
    if "nll" in items[0]:
        nll = pooled([i["nll"] for i in items], [i["tokens"] for i in items])
        perplexity = {key: value and float(np.exp(value)) for key, value in nll.items()}
        return {"accuracy": None, "nll": nll, "perplexity": perplexity}
    found = {"metric": about["metric"], "nll": None, "accuracy": _accuracy(items)}
    if "generated" in items[0]:
        generated = [text for item in items for text in item["generated"]]
        found["repetition"] = wilson([loops(text) for text in generated])
        found["empty"] = wilson([not text.strip() for text in generated])
    passes = [item["metrics"].get("passes,all") for item in items]
    if passes[0] is not None:
        drawn = len(items[0]["generated"])
        found["pass@k"] = {str(k): _pass_at(k, drawn, passes) for k in (1, 10, 100, drawn) if k <= drawn}
    return found


def _accuracy(items: Sequence[dict]) -> dict:
    if "correct" in items[0]:
        return wilson([item["correct"] for item in items])
    return bootstrap(lambda x, axis=-1: x.mean(axis), [item["score"] for item in items])


def _pass_at(k: int, drawn: int, passes: Sequence[int]) -> dict:
    """The unbiased estimate of Chen et al. that one of k samples passes, from how many of `drawn` did."""
    if drawn == 1:
        return wilson([bool(c) for c in passes])
    return bootstrap(lambda x, axis=-1: x.mean(axis), [1 - comb(drawn - c, k) / comb(drawn, k) for c in passes])


def loops(text: str) -> bool:
    """Whether `text` ends in a loop: at least four copies of one piece, together at least 100 characters.

    Numbers count as equal, so that a list that says the same under every number is one; the last copy may be cut off.
    """
    copies, least = LOOP
    text = re.sub(r"\d+", "0", text)
    for period in range(1, len(text) // copies + 1):
        span = max(least, copies * period)
        if span <= len(text) and text[-span:-period] == text[period - span :]:
            return True
    return False


def domains(results: dict[str, dict]) -> dict[str, dict]:
    """Mean over the data sets of each domain of SUITE that is whole in `results`, with its 95 % bootstrap interval."""
    found = {}
    for domain, names in SUITE.items():
        if all(name in results for name in names):
            scores = [[item.get("score", item.get("correct")) for item in results[name]["items"]] for name in names]
            found[domain] = bootstrap(_mean_of_means, *scores, paired=False)
    return found


def _mean_of_means(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([column.mean(axis) for column in columns], axis=0)


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, which JSON takes."""
    return value.item() if isinstance(value, np.generic) else value


def _data(where: dict, about: dict) -> dict:
    """Which documents these are: the hub's, or files below BASIS_SELECT_DATA by their hashes."""
    folder = os.environ.get("BASIS_SELECT_DATA")
    if "family" in where:
        return {"generated": where["family"], "size": where["size"]}
    if not folder:
        if "task" in where:
            return {"hub": HUB[where["task"]].path, "config": HUB[where["task"]].config}
        return {"hub": where["hub"], "config": where.get("config")}
    found = {"files": {name: sha256(Path(folder) / name) for name in where["files"].values()}}
    return {**found, "note": about["local"]} if "local" in about else found


def _require_sandbox() -> None:
    from .sandbox import check, missing

    if lacks := missing():
        raise ValueError(f"programs of a model cannot be run here, the sandbox lacks {'; '.join(lacks)}")
    if not check("def f():\n    return 1\n", "assert f() == 1\n").passed:
        raise ValueError("programs of a model cannot be run here: the sandbox fails one that is right")


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:32]
