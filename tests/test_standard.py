import itertools
import json
import math
import os
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import in_processes, make_tokenizer, tiny
from typer.testing import CliRunner
from vocabularies import TEXT, byte_level, wrapped

import basis_select as bs
from basis_select.cli import app
from basis_select.data.tasks import Example, generated, load_task
from basis_select.evaluation import standard
from basis_select.evaluation.tasks import utils
from basis_select.training.loss import response_nlls

REAL = Path(__file__).parents[2] / "shared/data"
HUMANEVAL = {
    "task_id": "x/0",
    "prompt": "def half(x):\n    # of x\n",
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}


def adapters(question, answer):
    return {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A few rows of each form of file, laid out as BASIS_SELECT_DATA names them."""
    words = [
        {"question": f"Ann has {i} and {i} more. All?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(9)
    ]
    sums = [{"Body": f"Bob has {i}", "Question": "And?", "Equation": f"( {i} )", "Answer": float(i)} for i in range(9)]
    goals = [
        adapters(f"the question: goal {i}\n\nSolution1: go left \n\nSolution2: go right \n\nAnswer format", "solution2")
        for i in range(26)
    ]
    files = {
        "math/gsm8k/train.jsonl": words,
        "math/gsm8k/test.jsonl": words[3:],
        "math/svamp/test.jsonl": sums,
        "code/humaneval/test.jsonl": [HUMANEVAL],
        "commonsense/llm_adapters/piqa_test.json": goals,
        "text/wikitext2_raw/test_pages.jsonl": [
            {"page": " = A = \n It was , and is . \n"},
            {"page": " = B = \n No . \n"},
        ],
    }
    for name, rows in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setenv("BASIS_SELECT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_likelihood_is_that_of_training(data, tokenizer):
    model = tiny(dtype="bfloat16", max_position_embeddings=512)  # in fp32 training's products may be bfloat16
    items = bs.evaluate_on(model, tokenizer, ["gsm8k_zeroshot_nll"], batch_size=4)["gsm8k_zeroshot_nll"]["items"]
    examples = []
    for row in utils.as_tuned("gsm8k", {"test": "math/gsm8k/test.jsonl"})["test"]:
        ids = tokenizer.encode(row["prompt"] + row["response"])
        examples.append(Example(row["prompt"], row["response"], None, tuple(ids), len(tokenizer.encode(row["prompt"]))))
    nll, tokens = response_nlls(model, examples)
    assert [item["tokens"] for item in items] == tokens.tolist()
    assert [item["nll"] for item in items] == pytest.approx(nll.tolist(), rel=2e-3)


def test_code_likelihood_counts_the_line_end_that_lm_eval_moves_into_the_response(data, tokenizer):
    model = tiny(max_position_embeddings=512)
    result = bs.evaluate_on(model, tokenizer, ["humaneval_nll"])["humaneval_nll"]
    prompt, text = HUMANEVAL["prompt"].rstrip(), HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    start = len(tokenizer.encode(prompt))
    expected = -sum(log_p[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    assert result["items"][0]["tokens"] == ids.shape[1] - start
    assert result["items"][0]["nll"] == pytest.approx(expected, abs=1e-3)


def test_a_result_says_what_it_was_measured_on(data, tokenizer):
    model = tiny(max_position_embeddings=2048)
    results = bs.evaluate_on(model, tokenizer, ["gsm8k", "piqa", "wikitext2"], limit=2, shots=2)
    assert list(results) == ["gsm8k", "gsm8k_nll", "piqa", "wikitext2"]
    gsm8k, piqa, pages = results["gsm8k"], results["piqa"], results["wikitext2"]
    assert (gsm8k["n"], gsm8k["of"], gsm8k["shots"]) == (2, 6, 2)
    assert set(gsm8k["data"]["files"]) == {"math/gsm8k/train.jsonl", "math/gsm8k/test.jsonl"}
    assert set(gsm8k["items"][0]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert results["gsm8k_nll"]["nll"]["low"] <= results["gsm8k_nll"]["nll"]["value"]
    assert (piqa["of"], "20 for shots" in piqa["data"]["note"]) == (6, True)
    assert all(len(item["likelihoods"]) == 2 for item in piqa["items"])
    nll, bytes_ = sum(item["nll"] for item in pages["items"]), len(" = A = \n It was , and is . \n = B = \n No . \n")
    assert pages["metrics"]["byte_perplexity,none"] == pytest.approx(math.exp(nll / bytes_))
    assert pages["perplexity"]["value"] == pytest.approx(math.exp(nll / sum(i["tokens"] for i in pages["items"])))
    json.dumps(results)


def test_prompts_that_do_not_fit_are_counted(data, tokenizer):
    model = tiny(max_position_embeddings=120)
    results = bs.evaluate_on(model, tokenizer, ["piqa", "humaneval_nll", "wikitext2"], limit=2)
    assert [result["cut"] for result in results.values()] == [2, 0, 0]
    assert results["wikitext2"]["longest"] == 120


def test_a_non_finite_logit_is_fatal_also_where_only_text_is_generated(data, tokenizer):
    model = tiny(max_position_embeddings=2048)
    model.lm_head.weight.data[77] = float("nan")
    for task in ("gsm8k", "svamp_nll", "piqa"):
        with pytest.raises(ValueError, match=f"logits of one batch of {task} are not finite: the model is broken"):
            bs.evaluate_on(model, tokenizer, [task], limit=2)


def test_gsm_symbolic_is_the_test_split_of_the_recipes(tokenizer):
    task = load_task("reasoning_gym:gsm_symbolic", tokenizer, max_length=10000, train=5, validation=5, test=5)
    assert [row["prompt"] for row in generated("gsm_symbolic", "test", 5)] == [e.prompt for e in task.test]


@pytest.mark.parametrize(
    ("read", "row", "expected"),
    [
        (
            utils.arc,
            adapters("Answer the question: Why?\n\nAnswer1: a b Answer2: c? Answer3: d\n\nAnswer format: x", "answer2"),
            {"question": "Why?", "choices": {"text": ["a b", "c?", "d"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        ),
        (
            utils.piqa,
            adapters(
                "the question: dry it\n\nSolution1: use\na towel \n\nSolution2: wait \n\nAnswer format", "solution1"
            ),
            {"goal": "dry it", "sol1": "use\na towel", "sol2": "wait", "label": 0},
        ),
        (
            utils.winogrande,
            adapters("the given sentence: It is _ now.\n\nOption1: day Option2: night Answer format: x", "option2"),
            {"sentence": "It is _ now.", "option1": "day", "option2": "night", "answer": "2"},
        ),
        (
            utils.boolq,
            adapters("with true or false, question: is it so?\n\nAnswer format: true/false", "true"),
            {"passage": "", "question": "is it so", "label": 1},
        ),
    ],
)
def test_instructions_of_llm_adapters_become_columns(read, row, expected):
    assert read(row) == expected
    with pytest.raises(ValueError, match="not one of LLM-Adapters'"):
        read({**row, "instruction": "something else"})


def test_an_impossible_answer_does_not_hide_the_others():
    doc = {"mc2_targets": {"labels": [1, 0, 0]}}
    assert utils.mass_on_true_answers(doc, [(-2000.0, False), (-2000.0, False), (-9000.0, False)])["acc"] == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("She sells 9 eggs for 2 dollars each: 9 * 2 = 18.\n#### 18", False),
        ("It is so. " + "abc" * 34, True),
        ("abc" * 33, False),  # 99 characters are too few
        ("so " + "The answer is that it is what it has been said to be. " * 3, False),  # three copies
        ("so " + "The answer is that it is what it has been said to be. " * 4 + "The ans", True),
        ("-" * 200 + " and out of it", False),
        (" ".join(f"{i}. A pack costs 76 dollars." for i in range(5, 15)), True),
    ],
)
def test_what_a_loop_is(text, expected):
    assert standard.loops(text) == expected


def test_pass_at_k_is_the_mean_over_all_draws_of_k():
    passed = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    for k in (1, 2, 4, 5):
        draws = [statistics.mean(any(d) for d in itertools.combinations(p, k)) for p in passed]
        found = standard._pass_at(k, 5, [sum(p) for p in passed])
        assert found["value"] == pytest.approx(statistics.mean(draws))


def test_domain_means_need_whole_domains_and_weigh_data_sets_alike():
    def result(correct):
        return {"items": [{"correct": c} for c in correct]}

    results = {"gsm8k": result([True] * 10), "math500": result([False, True] * 100), "arc_easy": result([True])}
    found = standard.domains(results)
    assert list(found) == ["math"]
    assert found["math"]["value"] == 0.75
    assert 0.70 < found["math"]["low"] < 0.75 < found["math"]["high"] < 0.80


def test_programs_run_in_the_sandbox():
    from basis_select.evaluation.sandbox import missing

    if missing():
        pytest.skip(f"the sandbox lacks {missing()}")
    found = utils.humaneval(HUMANEVAL, [[HUMANEVAL["canonical_solution"], "    return x\n"]])
    assert (found["passes"], found["pass@1"]) == (1, 0.5)
    assert "AssertionError" in found["reasons"][1]
    doc = {"test_setup_code": "", "test_list": ["assert sum(4, 5) == 9"], "code": "def sum(a, b):\r\n    return a + b"}
    assert (
        utils.mbpp(doc, [["```python\ndef sum(x, y):\n    return y + x\n```\n", doc["code"], "x = 1"]])["passes"] == 2
    )


def test_several_samples_give_pass_at_k_with_a_fraction_per_item(data, tokenizer):
    from basis_select.evaluation.sandbox import missing

    if missing():
        pytest.skip(f"the sandbox lacks {missing()}")
    model = tiny(max_position_embeddings=640)
    result = bs.evaluate_on(model, tokenizer, ["humaneval"], samples=2, allow_code_execution=True)["humaneval"]
    assert set(result["pass@k"]) == {"1", "2"}
    assert result["generation"]["do_sample"]
    first, second = result["items"][0]["generated"]
    assert first != second
    assert bs.compare(result, result)["score"]["value"] == 0 == result["accuracy"]["value"]


def call(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_a_model_is_paired_with_its_parent_or_with_its_parents_results(data, dense_folder, task, tmp_path):
    smaller = bs.decompose(tiny(max_position_embeddings=2048, tied=True), task, metric="plain", embedding=True)
    bs.prune(smaller, keep=0.5, keep_embedding=0.5, multiple_of=1)
    bs.save(smaller, make_tokenizer(), tmp_path / "other")
    how = ["--tasks", "svamp_nll,piqa", "--limit", 4]
    done = call(tmp_path / "other", *how, "--against", dense_folder, "--out", tmp_path / "both.json")
    assert done.exit_code == 0, done.output
    assert "paired: nll" in done.output
    both = json.loads((tmp_path / "both.json").read_text())
    assert sum(both["paired"]["piqa"][k] for k in ("both", "gained", "lost", "neither")) == 4
    assert both["against"]["model"]["weights_sha256"] != both["model"]["weights_sha256"]
    assert 0 < both["model"]["sizes"]["bytes"] < both["against"]["model"]["sizes"]["bytes"]
    before, after = (measured["tasks"]["svamp_nll"]["nll"]["value"] for measured in (both["against"], both))
    difference = both["paired"]["svamp_nll"]["nll"]
    assert difference["value"] == pytest.approx(after - before, abs=1e-9)
    assert difference["low"] <= difference["value"] <= difference["high"]

    assert call(dense_folder, *how, "--out", tmp_path / "parent.json").exit_code == 0
    again = call(tmp_path / "other", *how, "--against", tmp_path / "parent.json", "--out", tmp_path / "again.json")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again.json").read_text())["paired"] == both["paired"]
    for changed, message in [
        (["--limit", 3], "cannot be paired"),
        (["--dtype", "bfloat16"], "measured in float32, not in bfloat16"),
        (["--tasks", "svamp"], "has no result for svamp: it holds svamp_nll, piqa"),
    ]:
        refused = call(tmp_path / "other", *how, *changed, "--against", tmp_path / "parent.json")
        assert refused.exit_code == 1
        assert message in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "svam"], "unknown task 'svam' (meant svamp?)"),
        (["--tasks", "svamp_nll,humaneval"], "allow it with --allow-code-execution, or ask for humaneval_nll"),
        (["--tasks", "boolq"], "there is no commonsense/llm_adapters/boolq_train.json in"),
        (["--tasks", "svamp_nll", "--against", "nowhere.json"], "there is no result file at nowhere.json"),
        (["--tasks", "svamp_nll", "--against", "./nowhere"], "there is no model folder at ./nowhere"),
    ],
)
def test_refusals_are_one_sentence(arguments, message, data, dense_folder):
    done = call(dense_folder, *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("error:") == 1


def test_data_of_ones_own_is_measured_by_the_same_command(dense_folder, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(9) for b in range(9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call(dense_folder, "--tasks", tmp_path / "sums.jsonl", "--limit", 5, "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    (result,) = json.loads((tmp_path / "out.json").read_text())["tasks"].values()
    assert result["n"] == 5
    assert result["nll"]["value"] > 0


def lm_evals_own_command(rank, data, arguments):
    os.environ["BASIS_SELECT_DATA"] = str(data)
    sys.argv = ["lm_eval", *arguments]
    runpy.run_module("lm_eval", run_name="__main__")


@pytest.mark.slow
def test_the_numbers_are_those_of_lm_evals_own_command(data, dense_folder, tmp_path):
    """Bit for bit, on a dense checkpoint: metrics, and every generation and likelihood."""
    tasks = ["gsm8k", "svamp_nll", "piqa", "wikitext2"]
    options = {
        "model": "hf",
        "model_args": f"pretrained={dense_folder},softmax_dtype=float32",
        "tasks": ",".join(tasks),
        "include_path": standard.FOLDER,
        "limit": 4,
        "batch_size": 2,
        "device": "cpu",
        "output_path": tmp_path / "theirs",
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    in_processes(lm_evals_own_command, data, [*arguments, "--log_samples"], count=1)
    theirs = json.loads(next((tmp_path / "theirs").rglob("results_*.json")).read_text())["results"]
    model, tokenizer = bs.load(dense_folder)
    ours = bs.evaluate_on(model, tokenizer, tasks, limit=4, batch_size=2)
    for name in tasks:
        assert ours[name]["metrics"] == {k: theirs[name][k] for k in ours[name]["metrics"]}
        file = next((tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl"))
        samples = {row["doc_id"]: row["resps"] for row in map(json.loads, file.read_text().splitlines())}
        for item in ours[name]["items"]:
            if "generated" in item:
                assert samples[item["id"]] == [item["generated"]]
            elif "likelihoods" in item:
                assert [r[0][0] for r in samples[item["id"]]] == [str(x) for x in item["likelihoods"]]


@pytest.mark.slow
def test_every_task_reads_the_real_files(tokenizer, monkeypatch):
    if not REAL.is_dir():
        pytest.skip(f"there is no {REAL}")
    monkeypatch.setenv("BASIS_SELECT_DATA", str(REAL))
    model = tiny(max_position_embeddings=8192)
    names = [name for name in standard.NAMES if name not in standard.CODE]
    for name in names:
        result = standard.evaluate_task(model, tokenizer, name, limit=1, shots=1)
        assert result["n"] == 1 <= result["of"]


@pytest.mark.slow
def test_a_trimmed_model_counts_tokens_as_its_parent_does_or_says_that_it_cannot(data, tmp_path):
    tokenizer = wrapped(byte_level())
    rows = [{"prompt": line[:-9], "response": line[-9:]} for line in TEXT[:60]]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (data / "text/wikitext2_raw/test_pages.jsonl").write_text(json.dumps({"page": " ".join(TEXT[60:])}) + "\n")
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=2048)
    bs.save(model, tokenizer, tmp_path / "parent")
    task = load_task(str(tmp_path / "words.jsonl"), tokenizer, validation=5, test=40)
    model, smaller, _ = bs.trim(model, tokenizer, task)
    bs.save(model, smaller, tmp_path / "trimmed")
    bs.save(tiny(max_position_embeddings=2048), make_tokenizer(), tmp_path / "other")
    how = [tmp_path / "trimmed", "--tasks", f"{tmp_path / 'words.jsonl'},svamp_nll,wikitext2"]
    found = {}
    for against in ("other", "parent", "record.json"):
        done = call(*how, "--against", tmp_path / against, "--out", tmp_path / "out.json")
        assert done.exit_code == 0, done.output
        found[against] = json.loads((tmp_path / "out.json").read_text())
        assert ("per token of the trimmed tokenizer" in done.output) == (against == "other")
        if against == "parent":
            record = found[against]["against"] | {"settings": found[against]["settings"]}
            (tmp_path / "record.json").write_text(json.dumps(record))
    alone, both = found["other"]["tasks"], found["parent"]
    more = 0
    for name, result in both["tasks"].items():
        tokens = [item["tokens"] for item in both["against"]["tasks"][name]["items"]]
        assert [item["tokens"] for item in result["items"]] == tokens
        assert [item["nll"] for item in result["items"]] == [item["nll"] for item in alone[name]["items"]]
        more += sum(item["tokens"] for item in alone[name]["items"]) > sum(tokens)
    assert more > 1
    assert found["record.json"]["tasks"] == both["tasks"]
