"""`basis-select try`: what is typed is answered as evaluation would answer it, piece by piece, by one model or two."""

import json

import pytest
import torch
from conftest import make_tokenizer, tiny
from typer.testing import CliRunner

from basis_select import decompose, load_task, prune, save, tune
from basis_select.cli import app
from basis_select.evaluation.accuracy import generated
from basis_select.evaluation.speed import load_fastest
from basis_select.evaluation.trying import answer, converse


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("sums") / "data.jsonl", make_tokenizer()
    rows = [{"prompt": f"{a}+{b}=", "response": f"{a + b}", "answer": f"{a + b}"} for a in range(9) for b in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(path, tokenizer, validation=4, test=4)
    return tune(tiny(tied=True), task, steps=60, batch_size=8, lr=1e-2), tokenizer, task


def test_an_answer_is_the_one_that_is_evaluated_and_comes_in_pieces(tuned):
    model, tokenizer, task = tuned
    pieces, examples = [], task.test[:4]
    for example, expected in zip(examples, generated(model, tokenizer, task, examples), strict=True):
        pieces.clear()
        answer(model, tokenizer, example.prompt, pieces.append, tokens=8)
        assert "".join(pieces).startswith(expected)
        assert expected.strip()


def test_both_models_answer_every_line_in_its_template(tuned):
    model, tokenizer, _ = tuned
    said = []
    converse({"ours": (model, tokenizer), "parent": (model, tokenizer)}, ["1+2\n", "\n"], said.append, "{}=", 4)
    lines = "".join(said).splitlines()
    assert [line.partition("] ")[0] for line in lines] == ["[ours", "[parent"]
    assert len({line.partition("] ")[2] for line in lines}) == 1


def test_a_chat_needs_a_template_and_a_prompt_a_token(tuned):
    model, tokenizer, _ = tuned
    with pytest.raises(ValueError, match="no chat template"):
        answer(model, tokenizer, "1+2=", print, chat=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    said = [[], []]
    answer(model, tokenizer, "1+2", said[0].append, chat=True)
    answer(model, tokenizer, "1+2=", said[1].append)
    assert said[0] == said[1]


def test_the_command_answers_the_standard_input(tuned, tmp_path):
    model, tokenizer, task = tuned
    save(model, tokenizer, tmp_path / "parent")
    small = prune(decompose(tiny(tied=True), task, examples=8), size="2x", bits="auto", multiple_of=1)
    save(small, tokenizer, tmp_path / "small", "bfloat16")
    both = [str(tmp_path / "small"), "--against", str(tmp_path / "parent"), "--tokens", "4"]
    done = CliRunner().invoke(app, ["try", *both, "--template", "{}="], input="1+2\n3+4\n")
    assert done.exit_code == 0, done.output
    assert [line.partition("]")[0] for line in done.stdout.splitlines()] == ["[small", "[parent"] * 2
    done = CliRunner().invoke(app, ["try", *both, "--template", "no place"], input="1+2\n")
    assert done.exit_code == 1
    assert "should have {} where the line goes" in done.output


def test_what_is_rounded_is_loaded_as_it_is_stored(tuned, tmp_path):
    _, tokenizer, task = tuned
    small = prune(decompose(tiny(tied=True), task, examples=8), size="2x", bits="auto", multiple_of=1)
    save(small, tokenizer, tmp_path / "small", "bfloat16")
    save(tiny(), tokenizer, tmp_path / "wide")
    assert load_fastest(str(tmp_path / "small"), "cpu")[0].dtype == torch.bfloat16
    assert load_fastest(str(tmp_path / "wide"), "cpu")[0].dtype in (torch.float32, torch.bfloat16)
