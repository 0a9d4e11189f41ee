"""What a model was tuned on goes with it, and no row of it, or near it, is tested without a word."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer, tiny
from rows import lines, numbered, row
from typer.testing import CliRunner

import basis_select as bs
from basis_select.cli import app
from basis_select.data import tuned_on
from basis_select.data.tasks import Example, generated, load_task

REAL = Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """GSM8K of a few rows, laid out as BASIS_SELECT_DATA names it."""
    words = [
        {"question": f"Ann has {i} and {i} more. All?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(9)
    ]
    folder = tmp_path / "data/math/gsm8k"
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("test", 3)):
        (folder / f"{split}.jsonl").write_text(lines(*words[first:], good=0))
    monkeypatch.setenv("BASIS_SELECT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def call(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def tuned(model, path, folder, **how):
    """`model` trained on a file of rows with its own draw, and saved."""
    task = load_task(str(path), make_tokenizer(), **how)
    bs.save(bs.tune(model, task, steps=1, batch_size=2), make_tokenizer(), folder)
    return task


@pytest.mark.parametrize("how", [{"seed": 1}, {"test": 5}, {"validation": 3, "seed": 2}])
def test_a_row_that_was_tuned_on_is_never_tested(how, tmp_path):
    rows = [{"prompt": f"q{i}:", "response": f" a{i}"} for i in range(60)]
    for name, before in (("own", ""), ("copy", " ")):
        own = [{**row, "prompt": before + row["prompt"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text(lines(*own, good=0))
    task = tuned(tiny(), tmp_path / "own.jsonl", tmp_path / "tuned", **how)
    model, tokenizer = bs.load(tmp_path / "tuned")
    bs.prune(bs.decompose(model, task, metric="plain"), task, keep=0.5, multiple_of=1)
    bs.save(model, tokenizer, tmp_path / "again")  # what is known lasts
    model, tokenizer = bs.load(tmp_path / "again")
    for name in ("own", "copy"):
        (result,) = bs.evaluate_on(model, tokenizer, [str(tmp_path / f"{name}.jsonl")]).values()
        tested = {item["prompt"].strip() for item in result["items"]}
        assert tested == {e.prompt for e in task.test}  # the run's own test split
        assert result["trained"] > 0
    (tmp_path / "all.jsonl").write_text(
        lines(*({"prompt": e.prompt, "response": e.response} for e in task.train), good=0)
    )
    with pytest.raises(ValueError, match=r"tuned on every row of .*all.jsonl: nothing is left to test"):
        bs.evaluate_on(model, tokenizer, [str(tmp_path / "all.jsonl")])


def test_benchmark_rows_that_were_tuned_on_are_left_out_on_the_parent_too(data, dense_folder, tmp_path):
    test = [json.loads(line) for line in (data / "math/gsm8k/test.jsonl").read_text().splitlines()]
    rows = [{"prompt": f"Question: {r['question']}\nAnswer:", "response": " " + r["answer"]} for r in test[:3]]
    rows += [{"prompt": f"q{i}", "response": "#### 1"} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text(lines(*rows, good=0))
    task = tuned(tiny(max_position_embeddings=2048), tmp_path / "mine.jsonl", tmp_path / "tuned", test=1, validation=1)
    known = {e.prompt for e in (*task.train, *task.validation)} & {r["prompt"] for r in rows[:3]}
    done = call(tmp_path / "tuned", "--tasks", "gsm8k_nll", "--against", dense_folder, "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert f"gsm8k_nll ({6 - len(known)} of 6, 5 shots, {len(known)} that it was tuned on left out)" in done.output
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["model"]["rows_tuned_on"] == len(task.train) + len(task.validation)
    for measured in (out, out["against"]):
        assert [item["id"] for item in measured["tasks"]["gsm8k_nll"]["items"]] == list(range(len(known), 6))


def test_what_is_not_known_of_a_model_is_said(data, dense_folder):
    done = call(dense_folder, "--tasks", "gsm8k_nll", "--limit", 2)
    assert "what the model was tuned on is not recorded" in done.output


QUESTION = (
    "Toula went to the bakery and bought various types of pastries. She bought {} dozen donuts which cost ${} per "
    "dozen, and {} dozen mini cupcakes which cost $80 per dozen. How much was the total cost?"
)


def test_rows_made_from_a_test_question_are_found_whatever_their_numbers(data, tmp_path):
    other = "Ann reads a book of 90 pages. On Monday she reads a third of it and on Tuesday a half of the rest. {}"
    tests = [QUESTION.format(3, 68, 2), other.format("How many pages are left?")]
    made = QUESTION.format("1,200", 7.5, 40).replace("Toula", "Mia").replace("donuts", "cakes")
    assert tuned_on.near([made, "Mia bought 40 dozen cakes at the bakery.", tests[1]], tests) == [True, False, True]
    docs = [{"question": question, "answer": "#### 8"} for question in tests]
    (data / "math/gsm8k/test.jsonl").write_text(lines(*docs, good=0))
    model = tiny(max_position_embeddings=2048)
    tuned_on.remember(model, [Example(made, "8", "8", (1,), 0)])
    result = bs.evaluate_on(model, make_tokenizer(), ["gsm8k_zeroshot_nll"])["gsm8k_zeroshot_nll"]
    assert (result["n"], result["trained"], result["near"]) == (2, 0, 1)
    assert result["without_near"]["nll"]["value"] == pytest.approx(
        result["items"][1]["nll"] / result["items"][1]["tokens"]
    )


def test_a_record_that_is_none_is_named(dense_folder):
    model, _ = bs.load(dense_folder)
    (dense_folder / tuned_on.FILE).write_text('{"prompts": "x"}')
    with pytest.raises(ValueError, match=r"tuned_on.json does not hold hashes of rows"):
        tuned_on.read(model, dense_folder)


@pytest.mark.slow
def test_gsm_symbolic_is_near_gsm8k_and_its_training_split_is_not():
    if not REAL.is_dir():
        pytest.skip(f"there is no {REAL}")
    train, test = (
        [json.loads(line)["question"] for line in (REAL / f"math/gsm8k/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    made = [row["prompt"] for row in generated("gsm_symbolic", "train", 1000)]
    assert 350 < sum(tuned_on.near(made, test)) < 420
    assert sum(tuned_on.near(train, test)) < 10


ITEMS = [{"prompt": f"Item {i}:", "response": f" a{i}"} for i in range(60)]
COPIES = {
    "same": ITEMS,
    "order": ITEMS[::-1],
    "space": [{**r, "prompt": "  " + r["prompt"].replace(" ", " \t")} for r in ITEMS],
    "case": [{**r, "prompt": r["prompt"].upper()} for r in ITEMS],
    "more": [row(prompt=f"other {i}") for i in range(20)] + ITEMS,
    "folder": ITEMS,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has seen ITEMS as another seed draws them, and the task."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    path.write_text(lines(*ITEMS, good=0))
    task = load_task(path, make_tokenizer(), seed=1)
    return bs.tune(tiny(), task, steps=1, batch_size=2), task


@pytest.mark.parametrize("copy", COPIES)
def test_no_row_that_was_trained_is_tested_from_whatever_file(copy, trained, tmp_path):
    model, task = trained
    name, content = f"{copy}.jsonl", COPIES[copy]
    (tmp_path / name).write_text(lines(*content, good=0))
    if copy == "folder":
        (tmp_path / "train.jsonl").write_text(lines(*content[:20], good=0))
        (tmp_path / "test.jsonl").write_text(lines(*content[20:], good=0))
        name = ""
    (result,) = bs.evaluate_on(model, make_tokenizer(), [str(tmp_path / name)]).values()
    tested = {" ".join(item["prompt"].lower().split()) for item in result["items"]}
    assert tested
    assert not tested & {e.prompt.lower() for e in (*task.train, *task.validation)}
    assert result["trained"] > 0


def test_own_rows_that_are_near_trained_ones_are_counted(trained, tmp_path):
    model, _ = trained
    story = (
        "On a cold morning in {} the old baker of the village counted {} loaves of bread before he opened his shop. {}"
    )
    tuned_on.remember(model, [Example(story.format("May", 40, "How many?"), "a", "a", (5,), 0)])
    rows = [row(prompt=story.format("June", 7, "Say it.")), *(row(prompt=f"fresh {i}") for i in range(9))]
    (tmp_path / "train.jsonl").write_text(numbered("z", 9))
    (tmp_path / "test.jsonl").write_text(lines(*rows, good=0))
    (result,) = bs.evaluate_on(model, make_tokenizer(), [str(tmp_path)]).values()
    assert (result["n"], result["trained"], result["near"]) == (10, 0, 1)
    assert result["without_near"]["nll"]["value"] != result["nll"]["value"]
