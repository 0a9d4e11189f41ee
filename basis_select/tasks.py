"""A task is data, a prompt and response template, and how an answer is scored."""

import json
import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str
    answer: str | None  # what a generated response must contain; None: only its likelihood is scored
    input_ids: tuple  # prompt, response and end token
    start: int  # index of the first response token


@dataclass(frozen=True)
class Task:
    """Encoded examples per split. `score(generated, answer) -> bool`, or None where answers are not scored."""

    name: str
    train: list
    validation: list
    test: list
    score: Callable | None
    pad_id: int
    report: dict = field(default_factory=dict)  # what was dropped or cut, and why


def exact(generated, answer):
    """The response is the answer, up to surrounding white space."""
    return generated.strip() == answer.strip()


def number(generated, answer):
    """The last number of the response, or the one after '####', equals the answer."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", generated.rpartition("####")[2].replace("$", ""))
    if not found:
        return False
    try:
        return abs(float(found[-1].replace(",", "")) - float(answer.replace(",", ""))) < 1e-4
    except ValueError:
        return False


SCORES = {"exact": exact, "number": number}


@dataclass(frozen=True)
class _Hub:
    path: str
    config: str | None
    prompt: str
    response: str
    answer: Callable | None
    splits: dict
    score: Callable | None
    test_path: str | None = None  # a data set of its own, for the test split


_QUESTION = "Question: {question}\nAnswer:"
HUB = {
    "gsm8k": _Hub(
        "openai/gsm8k",
        "main",
        _QUESTION,
        " {answer}",
        lambda row: row["answer"].rpartition("####")[2].strip(),
        {"train": "train", "test": "test"},
        number,
    ),
    "svamp": _Hub(
        "ChilleD/SVAMP",
        None,
        "Question: {Body} {Question}\nAnswer:",
        " {Equation} #### {Answer}",
        lambda row: str(row["Answer"]),
        {"train": "train", "test": "test"},
        number,
    ),
    "mbpp": _Hub(
        "google-research-datasets/mbpp",
        "full",
        "Question: {text}\nYour code should pass this test: {test_list[0]}\nAnswer:\n",
        "{code}",
        None,  # running model-written code needs the sandbox: only the likelihood is scored
        {"train": "train", "validation": "validation", "test": "test"},
        None,
    ),
    "math": _Hub(
        "DigitalLearningGmbH/MATH-lighteval",
        "default",
        "Problem:\n{problem}\n\nSolution:",  # of Minerva, as in the benchmark math500
        " {solution}",
        None,  # an answer is an expression, which math500 compares: only the likelihood is scored
        {"train": "train", "test": "test"},
        None,
        test_path="HuggingFaceH4/MATH-500",
    ),
}


def load_task(
    source,
    tokenizer,
    seed=0,
    *,
    options: dict | None = None,
    prompt: str | None = None,
    score: str | None = None,
    train: int = 10000,
    validation: int = 200,
    test: int = 200,
    max_length: int = 512,
):
    """Build a task for a tokenizer: prompts masked, every response closed by the end token.

    source: a name in HUB (`options: {data_dir: FOLDER}` reads `SPLIT.jsonl` files instead of the hub), the path of
    a JSON or JSONL file of `{prompt, response}` or `{messages}` rows (splits are drawn by `seed`), a folder that holds
    `train.jsonl`, `test.jsonl` and perhaps `validation.jsonl` of such rows, or
    `reasoning_gym:FAMILY` with `options` for the family and `prompt` a template over its metadata. `score`,
    "exact" or "number", replaces the source's own way. `train`, `validation` and `test` cap the splits. No prompt
    occurs in two splits. Examples longer than `max_length` tokens are cut at their end and counted, never silently.
    Raises ValueError or FileNotFoundError naming the source.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    options = options or {}
    if source.startswith("reasoning_gym:"):
        rows, default = _reasoning_gym(source.partition(":")[2], options, prompt, sizes, seed)
    elif source in HUB:
        rows, default = _hub(source, options, sizes, seed)
    elif Path(source).is_dir():
        rows, default = _folder(Path(source), tokenizer, sizes, seed)
    else:
        rows, default = _file(source, tokenizer, sizes, seed)
    if score is not None and score not in SCORES:
        raise ValueError(f"unknown score {score!r}; known are {', '.join(SCORES)}")
    rows, overlaps = _disjoint(rows, sizes)
    report = {"overlaps_dropped": overlaps, "truncated": 0, "dropped_too_long": 0}
    splits = {}
    for split in SPLITS:
        encoded = [_encode(row, tokenizer, max_length, report) for row in rows[split][: sizes[split]]]
        splits[split] = [e for e in encoded if e is not None]
        if not splits[split]:
            raise ValueError(f"the {split} split of {source} is empty")
    if report["truncated"] or report["dropped_too_long"]:
        log.warning(
            "%s: %d examples were cut to max_length=%d tokens, %d more dropped since their prompt alone fills it",
            source,
            report["truncated"],
            max_length,
            report["dropped_too_long"],
        )
    return Task(source, **splits, score=SCORES.get(score, default), pad_id=tokenizer.pad_token_id, report=report)


def _encode(row, tokenizer, max_length, report):
    # The boundary is found as lm-eval finds it: what the prompt alone encodes to is prompt.
    special = not row.get("rendered", False)
    start = len(tokenizer.encode(row["prompt"], add_special_tokens=special))
    ids = tokenizer.encode(row["prompt"] + row["response"], add_special_tokens=special)
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    if start >= max_length:
        report["dropped_too_long"] += 1
        return None
    if len(ids) > max_length:
        report["truncated"] += 1
        ids = ids[:max_length]
    return Example(row["prompt"], row["response"], row.get("answer"), tuple(ids), start)


def _disjoint(rows, sizes):
    """Drop rows whose prompt is in an earlier split (test first) or came before; count them."""
    seen, dropped, kept = set(), 0, {}
    for split in reversed(SPLITS):
        kept[split] = []
        for row in rows[split]:
            if row["prompt"] in seen:
                dropped += 1
            elif len(kept[split]) < sizes[split]:
                seen.add(row["prompt"])
                kept[split].append(row)
    return kept, dropped


def _reasoning_gym(family, options, template, sizes, seed):
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("generated tasks need the demo extra: pip install 'basis-select[demo]'") from None
    rows = {}
    for number_, split in enumerate(SPLITS):
        # Item i of a family is drawn from seed + i: the splits' seeds are kept further apart than any size.
        base = seed * len(SPLITS) * 10_000_000 + number_ * 10_000_000
        try:
            items = reasoning_gym.create_dataset(family, seed=base, size=2 * sizes[split], **options)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"reasoning_gym:{family} with {options} cannot be made: {error}") from error
        rows[split] = [_gym_row(item, template, family) for item in items]
    rationale = rows["test"][0]["rationale"]
    return rows, number if rationale else exact


def generated(family, split, size, seed=0):
    """The first `size` rows of which `load_task("reasoning_gym:FAMILY", seed=seed)` makes a split."""
    sizes = dict.fromkeys(SPLITS, 1) | {split: size}
    return _disjoint(_reasoning_gym(family, {}, None, sizes, seed)[0], sizes)[0][split]


def _gym_row(item, template, family):
    metadata, answer = item["metadata"], str(item["answer"])
    rationale = next((metadata[k] for k in ("answer_cot", "rationale", "cot") if metadata.get(k)), None)
    response = answer
    if rationale:
        response = rationale if f"#### {answer}" in rationale else f"{rationale}\n#### {answer}"
    try:
        prompt = (template or _QUESTION).format(question=item["question"].strip(), **metadata)
    except KeyError as error:
        raise ValueError(
            f"the prompt template names {error}, which reasoning_gym:{family} does not have; it has question, "
            + ", ".join(sorted(metadata))
        ) from None
    return {"prompt": prompt, "response": " " + response, "answer": answer, "rationale": bool(rationale)}


def _hub(name, options, sizes, seed):
    from datasets import load_dataset

    spec = HUB[name]
    rows = {}
    for split, where in spec.splits.items():
        if "data_dir" in options:
            path = Path(options["data_dir"]) / f"{where}.jsonl"
            if not path.is_file():
                raise FileNotFoundError(f"{name}: there is no {path}")
            data = read_rows(path)
        else:
            source = (spec.path, spec.config)
            if split == "test" and spec.test_path:
                source = (spec.test_path, None)
            data = load_dataset(*source, split=where)
        rows[split] = [fill(spec, row) for row in data]
    return _hold_out(rows, sizes, seed), spec.score


def fill(spec, row):
    """A row of a data set in HUB as `{prompt, response, answer}`."""
    return {
        "prompt": spec.prompt.format(**row),
        "response": spec.response.format(**row),
        "answer": spec.answer and spec.answer(row),
    }


def _hold_out(rows, sizes, seed):
    if "validation" not in rows:
        rows["train"], rows["validation"] = _draw(rows["train"], sizes["validation"], seed)
    return rows


def _folder(path, tokenizer, sizes, seed):
    files = {split: path / f"{split}.jsonl" for split in SPLITS}
    missing = [split for split in ("train", "test") if not files[split].is_file()]
    if missing:
        raise FileNotFoundError(f"{path} has no {' and no '.join(f'{m}.jsonl' for m in missing)}")
    rows = {
        split: [_file_row(row, f"{file}, row {i + 1}", tokenizer) for i, row in enumerate(read_rows(file))]
        for split, file in files.items()
        if file.is_file()
    }
    return _hold_out(rows, sizes, seed), _exact_where_answered(rows)


def _file(source, tokenizer, sizes, seed):
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"unknown task {source!r}: none of {', '.join(HUB)}, no reasoning_gym:FAMILY and no JSON or JSONL file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file at {path}")
    rows = [_file_row(row, f"{path}, row {i + 1}", tokenizer) for i, row in enumerate(read_rows(path))]
    if len(rows) < 3:
        raise ValueError(f"{path} holds {len(rows)} rows: at least one each to train, validate and test is needed")
    held = min(sizes["test"], len(rows) // 5 or 1), min(sizes["validation"], len(rows) // 5 or 1)
    rest, test = _draw(rows, held[0], seed)
    train, validation = _draw(rest, held[1], seed + 1)
    rows = {"train": train, "validation": validation, "test": test}
    return rows, _exact_where_answered(rows)


def _exact_where_answered(rows):
    return exact if all(row["answer"] is not None for row in rows["test"]) else None


def _file_row(row, where, tokenizer):
    if isinstance(row, dict) and {"prompt", "response"} <= row.keys():
        return {
            "prompt": row["prompt"],
            "response": row["response"],
            "answer": row.get("answer", row["response"]),
        }
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError(f"{where}: the last of `messages` must have the role assistant")
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: `messages` need a chat template, which this model's tokenizer lacks")
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        content = messages[-1]["content"]
        return {"prompt": prompt, "response": content, "answer": content, "rendered": True}
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{where} has {keys}; a row is {{prompt, response}} or {{messages}}")


def read_rows(path):
    text = Path(path).read_text(encoding="utf-8")
    try:
        if Path(path).suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise ValueError(f"{path} is not a JSON list of rows")
            return rows
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # JSON strings hold other line ends
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _draw(rows, count, seed):
    held = set(random.Random(seed).sample(range(len(rows)), min(count, len(rows) - 1)))
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
