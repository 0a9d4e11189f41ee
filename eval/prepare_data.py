"""Writes tasks as folders of {prompt, response} rows: word problems, code, both together, and plain text.

python eval/prepare_data.py DATA OUT

DATA holds math/svamp/mawps_asdiv_a_train.csv and math/svamp/test.jsonl (arkilpatel/SVAMP),
math/gsm8k/{train,test}.jsonl (openai/gsm8k), code/mbpp/{train,validation,test}.jsonl
(google-research-datasets/mbpp), code/code_alpaca/code_alpaca_2k.json (sahil280114/codealpaca) and
text/wikitext2_raw/{train_first_1MB.txt,wiki.validation.raw,wiki.test.raw} (WikiText-2).
"""

import argparse
import csv
import json
import re
from pathlib import Path

from basis_select.data import tuned_on
from basis_select.data.sources import HUB, fill, read_generated
from basis_select.data.tasks import generated

SIZES = {"train": 4000, "test": 400}  # of math_code


def svamp(data):
    """SVAMP, trained on MAWPS and ASDiv-A as its authors do; the response is the equation and its value."""
    with (data / "math/svamp/mawps_asdiv_a_train.csv").open(encoding="utf-8") as file:
        train = [_from_mawps(row) for row in csv.DictReader(file)]
    test = [
        _problem(f"{row['Body'].rstrip(' .')}. {row['Question']}", row["Equation"], row["Answer"])
        for row in _jsonl(data / "math/svamp/test.jsonl")
    ]
    return {"train": train, "test": test}


def _from_mawps(row):
    numbers = row["Numbers"].split()
    question = re.sub(r"number(\d+)", lambda m: numbers[int(m[1])], row["Question"])
    question = re.sub(r" ([.,?%']|'s)", r"\1", question)
    symbols = re.sub(r"number(\d+)", lambda m: numbers[int(m[1])], row["Equation"]).split()
    return _problem(question, _infix(symbols), row["Answer"])


def _infix(symbols):
    """Prefix notation with two operands each, ["-", "a", "b"], as "( a - b )"."""
    head = symbols.pop(0)
    if head not in ("+", "-", "*", "/"):
        return head
    left, right = _infix(symbols), _infix(symbols)
    return f"( {left} {head} {right} )"


def _problem(question, equation, answer):
    def plain(text):
        return re.sub(r"(\d)\.0\b", r"\1", str(text))

    response = f" {plain(equation)} #### {plain(answer)}"
    return {"prompt": f"Question: {plain(question)}\nAnswer:", "response": response, "answer": plain(answer)}


def code(data):
    """MBPP, trained on its own training split plus code instructions."""
    mbpp = {
        split: [
            {
                "prompt": f"Question: {row['text']}\nYour code should pass this test: {row['test_list'][0]}\nAnswer:\n",
                "response": row["code"].replace("\r\n", "\n"),
            }
            for row in _jsonl(data / f"code/mbpp/{split}.jsonl")
        ]
        for split in ("train", "validation", "test")
    }
    for row in json.loads((data / "code/code_alpaca/code_alpaca_2k.json").read_text(encoding="utf-8")):
        if not row["output"].strip():
            continue
        question = "\n".join(filter(None, [row["instruction"], row["input"]]))
        mbpp["train"].append({"prompt": f"Question: {question}\nAnswer:\n", "response": row["output"]})
    return mbpp


def gsm_symbolic(data):
    """Problems in grade-school templates, with rationales, as reasoning_gym makes them: no file of `data` is read."""
    rows, _ = read_generated("gsm_symbolic", {}, None, {"train": 4000, "validation": 100, "test": 250}, seed=0)
    return {
        split: [{key: row[key] for key in ("prompt", "response", "answer")} for row in rows[split]] for split in rows
    }


def math_code(data):
    """Equal parts of SVAMP, GSM8K, gsm_symbolic and code, in the forms that `basis-select eval` tests.

    What is near a test question of another part, as most of gsm_symbolic is to GSM8K's, does not train. gsm_symbolic's
    own test rows are not asked: all that a generator makes is near to them.
    """
    gsm8k = {s: [fill(HUB["gsm8k"], r) for r in _jsonl(data / f"math/gsm8k/{s}.jsonl")] for s in SIZES}
    parts = {"svamp": svamp(data), "code": code(data), "gsm8k": gsm8k}
    tests = [row["prompt"] for part in parts.values() for row in part["test"]]
    made = {"train": SIZES["train"], "test": SIZES["test"] // 4}  # enough, after most of the first are dropped
    parts["gsm_symbolic"] = {split: generated("gsm_symbolic", split, size) for split, size in made.items()}
    for name, part in parts.items():
        part["train"] = _apart(name, part["train"], tests)
    return {
        s: [_unscored(row) for four in zip(*(p[s][: n // 4] for p in parts.values()), strict=True) for row in four]
        for s, n in SIZES.items()
    }


def _apart(name, rows, tests):
    """The rows that are near none of the texts in `tests`."""
    near = tuned_on.near([row["prompt"] for row in rows], tests)
    print(f"{name}: {sum(near):,} of {len(rows):,} training rows are near a test question and dropped")
    return [row for row, dropped in zip(rows, near, strict=True) if not dropped]


def _unscored(row):
    """Without an answer of its own: a number is none for the code among the rows."""
    return {"prompt": row["prompt"], "response": row["response"]}


def text(data):
    """Paragraphs of WikiText-2: the first sentence is the prompt, the rest the response."""
    files = {"train": "train_first_1MB.txt", "validation": "wiki.validation.raw", "test": "wiki.test.raw"}
    return {split: _paragraphs(data / "text/wikitext2_raw" / name) for split, name in files.items()}


def _paragraphs(path):
    found = [line.strip().partition(" . ") for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {"prompt": f"{first} .", "response": f" {rest}"}
        for first, _, rest in found
        if len(first) + len(rest) >= 400 and rest
    ]


def _jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    source, target = vars(parser.parse_args()).values()
    for make in (svamp, code, gsm_symbolic, math_code, text):
        folder = target / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in make(source).items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(folder / f"{split}.jsonl", len(rows), "rows; first:", json.dumps(rows[0]))
