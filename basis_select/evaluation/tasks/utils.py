"""What the task files beside this one call: where documents come from, and how answers are scored."""

import ast
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from basis_select.data import tasks
from basis_select.data.answers import number
from basis_select.data.rows import read_rows
from basis_select.data.sources import HUB, fill

DATA = "BASIS_SELECT_DATA"  # a folder with the files that the tasks name; unset, they come from the hub


def documents(
    hub: str,
    files: dict[str, str],
    config: str | None = None,
    row: Callable[[dict], dict] | None = None,
    hold_out: int = 0,
    **_: Any,
) -> datasets.DatasetDict:
    """The splits of a data set: from the files below $BASIS_SELECT_DATA if that is set, else from the hub.

    `row` turns a row of such a file into the hub's columns. Of a data set whose files have no training split,
    `hold_out` rows become one. (lm-eval adds the task's metadata to the arguments.)
    """
    folder = os.environ.get(DATA)
    if not folder:
        try:
            return datasets.load_dataset(hub, config)
        except OSError as error:
            names = ", ".join(files.values())
            raise ValueError(f"no {hub} from the hub ({error}): ${DATA} may name a folder with {names}") from None
    splits = {}
    for split, name in files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"there is no {name} in {folder}, which {DATA} names")
        splits[split] = [row(r) if row else r for r in read_rows(path)]
    if hold_out:
        ((split, rows),) = splits.items()
        splits = {"train": rows[:hold_out], split: rows[hold_out:]}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


def as_tuned(task: str, files: dict[str, str], **_: Any) -> datasets.DatasetDict:
    """Test documents of a task in HUB, with the `prompt`, `response` and `answer` it trains on."""
    spec = HUB[task]
    rows = documents(spec.path, files, spec.config)["test"]
    return _test([{**row, **_split(fill(spec, row))} for row in rows])


def generated(family: str, size: int, **_: Any) -> datasets.DatasetDict:
    """The first `size` test documents of `reasoning_gym:FAMILY` with seed 0."""
    return _test([_split(row) for row in tasks.generated(family, "test", size)])


def _split(row: dict) -> dict:
    """A row with the white space at the end of its prompt where training has it, in the response."""
    prompt = row["prompt"].rstrip()
    return {**row, "prompt": prompt, "response": row["prompt"][len(prompt) :] + row["response"]}


def mmlu(hub: str, files: dict[str, str], config: str | None, shots: int = 5, **_: Any) -> datasets.DatasetDict:
    splits = documents(hub, files, config)
    shown = {}
    for row in splits["dev"]:
        shown.setdefault(row["subject"], []).append(f"{_mmlu_question(row)} {'ABCD'[row['answer']]}\n\n")
    rows = []
    for row in splits["test"]:
        head = (
            f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n\n"
        )
        rows.append({"shown": head + "".join(shown[row["subject"]][:shots]), "asked": _mmlu_question(row), **row})
    random.Random(0).shuffle(rows)
    return _test(rows)


def _mmlu_question(row: dict) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}\nAnswer:"


def _test(rows: list[dict]) -> datasets.DatasetDict:
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))


# Rows of LLM-Adapters' files are instructions that hold question and options as text.


def arc(row: dict) -> dict:
    question, options = _instruction(row, r"the question: (.*?)\n\n(Answer1: .*?)\n\nAnswer format")
    texts = [text.strip() for text in re.split(r"Answer\d: ", options)[1:]]
    labels = [str(i + 1) for i in range(len(texts))]
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": row["answer"][-1]}


def piqa(row: dict) -> dict:
    found = _instruction(row, r"the question: (.*?)\s*\n\nSolution1: (.*?)\s*\n\nSolution2: (.*?)\s*\n\nAnswer format")
    goal, sol1, sol2 = found
    return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": int(row["answer"][-1]) - 1}


def winogrande(row: dict) -> dict:
    found = _instruction(row, r"given sentence: (.*?)\s*\n\nOption1: (.*?) Option2: (.*?) Answer format")
    sentence, option1, option2 = found
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": row["answer"][-1]}


def boolq(row: dict) -> dict:
    (question,) = _instruction(row, r"true or false, question: (.*?)\??\n\nAnswer format")
    return {"passage": "", "question": question, "label": int(row["answer"] == "true")}


def _instruction(row: dict, pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, row["instruction"], re.DOTALL)
    if not found:
        raise ValueError(f"this row is not one of LLM-Adapters': {json.dumps(row)[:200]}")
    return found.groups()


def commonsense_qa(row: dict) -> dict:
    choices = row["question"]["choices"]
    columns = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
    return {"question": row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}


def mbpp_shots(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if row["task_id"] in (2, 3, 4)]


# Scores: `(document, responses) -> {metric: value}`.


def likelihood(doc: dict, results: Sequence) -> dict:
    return {"nll": -results[0][0]}


def same_number(doc: dict, results: Sequence) -> dict:
    return {"acc": int(number(results[0], doc["answer"]))}


def mass_on_true_answers(doc: dict, results: Sequence) -> dict:
    """TruthfulQA's mc2: the share of probability that the true answers have among all."""
    ll = np.array([ll for ll, _ in results])
    p = np.exp(ll - ll.max())  # the largest is 1: none of a poor model's answers may vanish with all others
    return {"acc": float(p[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / p.sum())}


def humaneval(doc: dict, results: Sequence) -> dict:
    tests = f"{helpers(doc)}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return _run([doc["prompt"] + text for text in results[0]], tests, doc["entry_point"])


def helpers(doc: dict) -> str:
    """What a prompt defines beside the function asked for: the tests' own copy, whatever a completion makes of it."""
    tree = ast.parse(doc["prompt"] + doc["canonical_solution"])
    tree.body = [node for node in tree.body if getattr(node, "name", None) != doc["entry_point"]]
    return ast.unparse(tree)


def mbpp(doc: dict, results: Sequence) -> dict:
    tests = "\n".join([doc["test_setup_code"] or "", *doc["test_list"]])
    named = re.findall(r"^def (\w+)", doc["code"], re.MULTILINE)  # one task asks for a function called sum
    entry = next((name for name in named if f"{name}(" in doc["test_list"][0]), "")
    return _run([_unfenced(text) for text in results[0]], tests, entry)


def _unfenced(text: str) -> str:
    found = re.search(r"```(?:\w+)?\n(.*?)\n?```", text, re.DOTALL)
    return found[1] if found else text


def _run(programs: Sequence[str], tests: str, entry: str = "") -> dict:
    from basis_select.evaluation.sandbox import check

    outcomes = [check(program, tests, entry=entry) for program in programs]
    passes = sum(outcome.passed for outcome in outcomes)
    return {"pass@1": passes / len(programs), "passes": passes, "reasons": [outcome.reason for outcome in outcomes]}


def every_response(resps: Any, docs: Any) -> Any:
    return resps


def tally(reasons: Iterable[Iterable[str]]) -> dict[str, int]:
    return dict(Counter(reason for of_item in reasons for reason in of_item))
