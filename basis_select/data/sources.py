"""Where the rows of a task come from: data sets of the hub, generators of reasoning_gym, a user's own files."""

import logging
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answers import exact, number
from .rows import file_rows, one_kind, read_rows

log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")


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
_NEXT = "\nQuestion:"  # where a response to such a prompt is followed by another
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


def read_source(
    source: str, tokenizer: PreTrainedTokenizerBase, options: dict, prompt: str | None, sizes: dict[str, int], seed: int
) -> tuple[dict[str, list[dict]], Callable | None, bool]:
    """`(rows per split, how the source scores responses, whether rows are made)` of a source of `load_task`.

    A row is `{prompt, response, answer}`, with `where` it stands in a file. Raises as `load_task` does.
    """
    made = source.startswith("reasoning_gym:")
    _check_used(source, options, prompt, made)
    if made:
        return *read_generated(source.partition(":")[2], options, prompt, sizes, seed), True
    if source in HUB:
        return *_hub(source, options, sizes, seed), False
    if source and Path(source).is_dir():
        return _folder(Path(source), tokenizer, sizes, seed), None, False
    return _file(source, tokenizer, sizes, seed), None, False


def _check_used(source: str, options: dict, prompt: str | None, made: bool) -> None:
    """Raise ValueError for what the source would not look at."""
    known = ["data_dir"] if source in HUB else []
    if prompt is not None and not made:
        raise ValueError(f"prompt is a template of reasoning_gym's tasks, {source!r} is none")
    if unknown := [] if made else sorted(map(str, options.keys() - set(known))):
        what = f"known there is {known[0]}" if known else "a file or folder has none"
        raise ValueError(f"{source} has no options {', '.join(unknown)}; {what}")
    if not isinstance(folder := options.get("data_dir", ""), str | Path):
        raise ValueError(f"data_dir is {folder!r}, it should be the path of a folder")


def read_generated(
    family: str, options: dict, template: str | None, sizes: dict[str, int], seed: int
) -> tuple[dict[str, list[dict]], Callable]:
    """`(rows per split, how responses are scored)` of a family of reasoning_gym, twice as many as `sizes` says."""
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


def _gym_row(item: dict, template: str | None, family: str) -> dict:
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
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the prompt template {template!r} cannot be filled for reasoning_gym:{family}: {error}"
        ) from None
    row = {"prompt": prompt, "response": " " + response, "answer": answer, "rationale": bool(rationale)}
    return row if template else {**row, "next": _NEXT}


def _hub(name: str, options: dict, sizes: dict[str, int], seed: int) -> tuple[dict[str, list[dict]], Callable | None]:
    from datasets import load_dataset

    spec = HUB[name]
    rows = {}
    for split, where in spec.splits.items():
        if "data_dir" in options:
            origin = Path(options["data_dir"]) / f"{where}.jsonl"
            if not origin.is_file():
                raise FileNotFoundError(f"{name}: there is no {origin}")
            data = read_rows(origin)
        else:
            source = (spec.path, spec.config)
            if split == "test" and spec.test_path:
                source = (spec.test_path, None)
            origin, data = source[0], load_dataset(*source, split=where)
        rows[split] = [_hub_row(spec, row, f"{origin}, row {i + 1}") for i, row in enumerate(data)]
    return _hold_out(rows, sizes, seed), spec.score


def _hub_row(spec: _Hub, row: dict, where: str) -> dict:
    try:
        filled = {**fill(spec, row), "where": where}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{where} is no row of {spec.path}: {str(row)[:200]}") from None
    if not filled["response"].strip():
        raise ValueError(f"{where}: the response is empty")
    return filled


def fill(spec: _Hub, row: dict) -> dict:
    """A row of a data set in HUB as `{prompt, response, answer}`; `next` where a text ends the response."""
    filled = {
        "prompt": _Filler().format(spec.prompt, **row),
        "response": _Filler().format(spec.response, **row),
        "answer": spec.answer and spec.answer(row),
    }
    return {**filled, "next": _NEXT} if spec.prompt.startswith(_NEXT.strip()) else filled


def _hold_out(rows: dict[str, list[dict]], sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    if "validation" not in rows:
        count = min(sizes["validation"], max(len(rows["train"]) // 3, len(rows["train"]) > 1))
        rows["train"], rows["validation"] = draw(rows["train"], count, seed)
    return rows


def _folder(path: Path, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    files = {split: path / f"{split}.jsonl" for split in SPLITS}
    missing = [split for split in ("train", "test") if not files[split].is_file()]
    if missing:
        raise FileNotFoundError(f"{path} has no {' and no '.join(f'{m}.jsonl' for m in missing)}")
    others = [p.name for p in sorted(path.iterdir()) if p.suffix in (".json", ".jsonl") and p not in files.values()]
    if others:
        known = ", ".join(file.name for file in files.values())
        log.warning("%s: %s is not read, splits are %s", path, ", ".join(others), known)
    rows = {split: file_rows(file, tokenizer) for split, file in files.items() if file.is_file()}
    one_kind([row for split in rows.values() for row in split])
    return _hold_out(rows, sizes, seed)


def _file(source: str, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    path = Path(source)
    if path.suffix.lower() not in (".json", ".jsonl"):
        if path.is_file():
            raise ValueError(f"{path} is neither .jsonl nor .json: a file of rows is one of these")
        raise ValueError(
            f"unknown task {source!r}: none of {', '.join(HUB)}, no reasoning_gym:FAMILY and no JSON or JSONL file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file at {path}")
    rows = file_rows(path, tokenizer)
    if len(rows) < 3:
        raise ValueError(f"{path} holds {len(rows)} rows: at least one each to train, validate and test is needed")
    held = min(sizes["test"], len(rows) // 5 or 1), min(sizes["validation"], len(rows) // 5 or 1)
    rest, test = draw(rows, held[0], seed)
    train, validation = draw(rest, held[1], seed + 1)
    return {"train": train, "validation": validation, "test": test}


def draw(rows: Sequence[dict], count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`(those left, those drawn)`, each in the order they had."""
    held = set(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


class _Filler(string.Formatter):
    """str.format, but only of texts and numbers."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError(f"{value!r} is no text")
        return super().format_field(value, format_spec)
