"""Data and tokenizers as people have them: each is read as it is meant, or refused in one sentence."""

import codecs
import gzip
import json
import logging

import pytest
from conftest import make_tokenizer, tiny
from rows import CALL, SPLIT, chats, chatting, lines, loaded, numbered, row, talk
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import basis_select as bs
from basis_select.data.encoding import Encoder
from basis_select.data.tasks import load_task
from basis_select.training.data import require_fit

HERE = r"^\S*a\.jsonl"  # the sentence begins with the file
FIVE = lines(good=5)

# what the file a.jsonl holds: the rows that are read, or the sentence
CONTENTS = [
    # encodings
    (codecs.BOM_UTF8 + FIVE.encode(), 5),
    (FIVE.replace("\n", "\r\n"), 5),
    (FIVE.replace("\n", "\r"), 5),
    (FIVE.replace("\n", "\n\n \n"), 5),
    (lines({"prompt": "a\u2028b", "response": "c"}).replace("\\u2028", "\u2028"), 5),
    (FIVE.encode("utf-16"), f"{HERE} is not UTF-8 text: invalid start byte at byte 0"),
    (FIVE.encode("utf-16-le"), f"{HERE} is not UTF-8 text: it holds NUL bytes"),
    (FIVE.encode("utf-32-be"), f"{HERE} is not UTF-8 text: it holds NUL bytes"),
    (FIVE.encode() + b"\0" * 64, f"{HERE} is not UTF-8 text: it holds NUL bytes"),
    (FIVE.replace("is", "\u00e9").encode("latin-1"), f"{HERE} is not UTF-8 text: invalid"),
    (FIVE.replace("is", "\u201cis\u201d").encode("cp1252"), f"{HERE} is not UTF-8 text: invalid start byte"),
    (gzip.compress(FIVE.encode(), mtime=0), f"{HERE} is not UTF-8 text"),
    (b"PAR1\x15\x04\xff", f"{HERE} is not UTF-8 text"),
    # nothing, little, no JSON
    ("", f"{HERE} holds 0 rows"),
    ("\n \n", f"{HERE} holds 0 rows"),
    (lines(good=2), f"{HERE} holds 2 rows: at least one each to train, validate and test"),
    (lines(good=3), 3),
    ("prompt,response\na,b\n", f"{HERE}, line 1, is not valid JSON"),
    ("prompt: a\nresponse: b\n", f"{HERE}, line 1, is not valid JSON"),
    ("<html>not found</html>", f"{HERE}, line 1, is not valid JSON"),
    ("version https://git-lfs.github.com/spec/v1\n", f"{HERE}, line 1, is not valid JSON"),
    (lines("{'prompt': 'a', 'response': 'b'}"), f"{HERE}, line 5, is not valid JSON"),
    (lines('{"prompt": "a", "response": "b",}'), f"{HERE}, line 5, is not valid JSON"),
    (lines('{"prompt": "a", "response": "b"'), f"{HERE}, line 5, is not valid JSON"),
    (lines('{"prompt": "a\tb", "response": "b"}'), f"{HERE}, line 5, is not valid JSON: Invalid control character"),
    (lines('{"prompt": "a", "response": "b"} {"prompt": "c"}'), f"{HERE}, line 5, is not valid JSON: Extra data"),
    (json.dumps([row()] * 5, indent=1), f"{HERE}, line 1, is not valid JSON"),
    (json.dumps([row()] * 5), f"{HERE}, row 1 is a list; a row is"),
    # numbers, depth, keys, text that is none
    (lines('{"prompt": "a", "response": NaN}'), f"{HERE}, line 5, is not valid JSON: NaN"),
    (lines('{"prompt": "a", "response": -Infinity}'), f"{HERE}, line 5, is not valid JSON: -Infinity"),
    (lines('{"prompt": "a", "response": 1e999}'), f"{HERE}, row 5: `response` is the number inf"),
    (lines('{"prompt": "a", "response": 1' + "0" * 30 + "}"), f"{HERE}, row 5: `response` is the number 10{{30}}, it"),
    (lines('{"prompt": "a", "response": ' + "9" * 5000 + "}"), f"{HERE}, line 5, is not valid JSON: .*digits"),
    (lines("[" * 100_000), f"{HERE}, line 5, is nested too deeply"),
    (lines('{"a": ' * 50_000), f"{HERE}, line 5, is nested too deeply"),
    (lines('{"prompt": "a", "prompt": "b", "response": "c"}'), f"{HERE}, line 5, .* 'prompt' twice"),
    (lines('{"prompt": "a", "response": "b\\ud83d"}'), f"{HERE}, line 5, holds half of a character"),
    (lines('{"prompt": "\\uDC00", "response": "b"}'), f"{HERE}, line 5, holds half of a character"),
    (lines('{"prompt": "\\ud83d\\ude00", "response": "b"}'), 5),
    # rows
    (lines({}), rf"{HERE}, row 5 has \[\]; a row is"),
    (lines("null"), f"{HERE}, row 5 is null; a row is"),
    (lines("[]"), f"{HERE}, row 5 is a list"),
    (lines("5"), f"{HERE}, row 5 is the number 5"),
    (lines("true"), f"{HERE}, row 5 is true or false"),
    (lines('"text"'), f"{HERE}, row 5 is text"),
    (lines({"question": "a", "answer": "b"}), rf"{HERE}, row 5 has \['answer', 'question'\]; a row is"),
    (lines({"instruction": "a", "output": "b"}), rf"{HERE}, row 5 has \['instruction', 'output'\]"),
    (lines({"text": "a"}), rf"{HERE}, row 5 has \['text'\]"),
    (lines({"Prompt": "a", "Response": "b"}), rf"{HERE}, row 5 has \['Prompt', 'Response'\]"),
    (lines({"prompt": "a", "completion": "b"}), rf"{HERE}, row 5 has \['completion', 'prompt'\]"),
    (lines({"prompt": "a"}), rf"{HERE}, row 5 has \['prompt'\]"),
    (lines(row(system="s")), f"{HERE}, row 5 has system beside `prompt` and `response`; known there is answer"),
    (lines(row(tools=[])), f"{HERE}, row 5 has tools beside"),
    (lines(row(id=1, source="x")), f"{HERE}, row 5 has id, source beside"),
    (lines(row(prompt=5)), f"{HERE}, row 5: `prompt` is the number 5, it should be text"),
    (lines(row(prompt=None)), f"{HERE}, row 5: `prompt` is null"),
    (lines(row(prompt=talk("a"))), f"{HERE}, row 5: `prompt` is a list"),
    (lines(row(response=True)), f"{HERE}, row 5: `response` is true or false"),
    (lines(row(response={"a": 1})), f"{HERE}, row 5: `response` is an object"),
    (lines(row(response=["a"])), f"{HERE}, row 5: `response` is a list"),
    (lines(row(response="")), f"{HERE}, row 5: the response is empty"),
    (lines(row(response=" \u00a0\n")), f"{HERE}, row 5: the response is empty"),
    (lines(row(response="\u200b")), f"{HERE}, row 5: the tokenizer has no token for the response"),
    (lines(row(answer=5)), f"{HERE}, row 5: `answer` is the number 5"),
    (lines(row(answer=None)), f"{HERE}, row 5: `answer` is null"),
    (lines(row(answer=["r", "s"])), f"{HERE}, row 5: `answer` is a list"),
    (lines(row(answer="")), "1 of the 5 responses .*, row 5 has the answer '' and the response 'r'"),
    (lines(row(answer="q")), "1 of the 5 responses .*, row 5 has the answer 'q' and the response 'r'"),
    (lines({"prompt": "", "response": "b"}), 5),
    (lines(*[{"prompt": "", "response": "b"}] * 9, good=0), r"the train split of \S*a.jsonl is empty: 8 were dropped"),
    (lines(*[row()] * 9, good=0), r"the train split of \S*a.jsonl is empty: 8 .* since their prompt is in another"),
    # conversations
    (lines({"messages": talk("a")}), rf"{HERE}, row 5 holds messages and \S+ row 1 a prompt: .* one kind"),
    (chats(row()), rf"{HERE}, row 5 holds a prompt and \S+ row 1 messages: .* one kind"),
    (chats({"messages": talk("a"), "prompt": "p"}), f"{HERE}, row 5 has prompt beside `messages`"),
    (chats({"messages": talk("a"), "id": 1}), f"{HERE}, row 5 has id beside `messages`; known there are tools, answer"),
    (chats({"conversations": talk("a")}), rf"{HERE}, row 5 has \['conversations'\]"),
    (chats({"messages": None}), f"{HERE}, row 5: `messages` is null"),
    (chats({"messages": "[]"}), f"{HERE}, row 5: `messages` is text"),
    (chats({"messages": {}}), f"{HERE}, row 5: `messages` is an object"),
    (chats({"messages": []}), f"{HERE}, row 5: the last of `messages` must have the role assistant"),
    (chats({"messages": talk("a")[:1]}), f"{HERE}, row 5: the last of `messages` must have the role assistant"),
    (chats({"messages": [None, *talk("a")]}), f"{HERE}, row 5: `messages` .* a list of objects"),
    (chats({"messages": [{}, *talk("a")]}), f"{HERE}, row 5: a message has a role and a content, both text, not"),
    (chats({"messages": [{"from": "human", "value": "a"}]}), f"{HERE}, row 5: a message has a role and a content"),
    (chats({"messages": [{"role": 1, "content": "a"}, *talk("a")]}), f"{HERE}, row 5: a message has a role"),
    (chats({"messages": [{"role": "user", "content": [{"type": "text"}]}, *talk("a")]}), f"{HERE}, row 5: a message"),
    (chats({"messages": talk("a", None)}), f"{HERE}, row 5: a message has a role and a content"),
    (chats({"messages": talk("a", 5)}), f"{HERE}, row 5: a message has a role and a content"),
    (chats({"messages": talk("a", "")}), f"{HERE}, row 5: the response is empty"),
    (chats({"messages": talk("a", " ")}), f"{HERE}, row 5: the response is empty"),
    (chats({"messages": talk("a", None, tool_calls="f()")}), f"{HERE}, row 5: `tool_calls` is text, .* of objects"),
    (chats({"messages": talk("a", None, tool_calls=["f"])}), f"{HERE}, row 5: `tool_calls` is a list, .* of objects"),
    (chats({"messages": talk("a", None, tool_calls=[CALL])}), f"{HERE}, row 5: .* leaves out `tool_calls`: .*lookup"),
    (chats({"messages": talk("a", "b", tool_calls=[CALL])}), f"{HERE}, row 5: .* leaves out `tool_calls`: .*lookup"),
    (chats({"messages": talk("a"), "tools": "[]"}), f"{HERE}, row 5: `tools` is text, it should be a list of objects"),
    (chats({"messages": talk("a"), "tools": {}}), f"{HERE}, row 5: `tools` is an object"),
    (chats({"messages": talk("a"), "tools": ["f"]}), f"{HERE}, row 5: `tools` is a list, it should be a list of obj"),
    (chats({"messages": talk("a"), "tools": None}), 5),
    (chats({"messages": talk("a"), "tools": []}), 5),
    (chats({"messages": talk("a"), "tools": [{"name": "f"}]}), 5),
    (chats({"messages": talk("a"), "answer": 1}), f"{HERE}, row 5: `answer` is the number 1"),
    (chats({"messages": [{"role": "system", "content": "s"}, *talk("a")]}), 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return chatting()


@pytest.mark.parametrize(("content", "expected"), CONTENTS)
def test_a_file_is_read_or_named_with_its_row(content, expected, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, int):
        assert loaded(tmp_path / "a.jsonl", tokenizer) == expected
        return
    with pytest.raises(ValueError, match=expected):
        loaded(tmp_path / "a.jsonl", tokenizer)


ROWS = [row(prompt=f"p{i}") for i in range(5)]
NAMED = [
    ("a.json", json.dumps(ROWS), 5),
    ("a.JSON", json.dumps(ROWS), 5),
    ("a.JSONL", FIVE, 5),
    ("a.json", "\ufeff" + json.dumps(ROWS, indent=1), 5),
    ("a.json", FIVE, r"a.json is not valid JSON: Extra data: line 2"),
    ("a.json", "", r"a.json is not valid JSON"),
    ("a.json", "[]", r"a.json holds 0 rows"),
    ("a.json", json.dumps({"train": ROWS}), r"a.json is an object, it should be a list of rows"),
    ("a.json", "null", r"a.json is null, it should be a list of rows"),
    ("a.json", json.dumps([*ROWS, 5]), r"a.json, row 6 is the number 5"),
    ("a.json", "[" * 100_000, r"a.json is nested too deeply"),
    ("a.csv", "prompt,response\na,b\n", r"\S*a.csv is neither .jsonl nor .json"),
    ("a.tsv", "prompt\tresponse\na\tb\n", r"\S*a.tsv is neither .jsonl nor .json"),
    ("a.txt", FIVE, r"\S*a.txt is neither .jsonl nor .json"),
    ("a.jsonl.gz", FIVE, r"\S*a.jsonl.gz is neither .jsonl nor .json"),
    ("a.parquet", "PAR1", r"\S*a.parquet is neither .jsonl nor .json"),
    ("a", FIVE, r"\S*a is neither .jsonl nor .json"),
    ("other.jsonl", FIVE, r"there is no data file at \S*a.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "expected"), NAMED)
def test_files_by_their_names(name, content, expected, tokenizer, tmp_path):
    (tmp_path / name).write_text(content)
    source = tmp_path / ("a.jsonl" if name == "other.jsonl" else name)
    if isinstance(expected, int):
        assert loaded(source, tokenizer) == expected
        return
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        loaded(source, tokenizer)


FOLDERS = [
    ({}, r"has no train.jsonl and no test.jsonl"),
    ({"train.jsonl": numbered("a", 9)}, r"has no test.jsonl"),
    ({"train.json": numbered("a", 9), "test.json": numbered("b", 9)}, r"has no train.jsonl and no test.jsonl"),
    ({"train.jsonl": "", "test.jsonl": numbered("b", 9)}, r"the train split .* empty: .* there were 0 for"),
    ({"train.jsonl": numbered("a", 1), "test.jsonl": numbered("b", 9)}, r"the validation split .* were 1 for train, 0"),
    ({"train.jsonl": numbered("a", 9), "test.jsonl": ""}, r"the test split of \S+ is empty"),
    ({"train.jsonl": numbered("a", 9), "test.jsonl": numbered("b", 9), "validation.jsonl": ""}, r"the validation spl"),
    ({"train.jsonl": numbered("a", 9), "test.jsonl": lines("5", good=2)}, r"test.jsonl, row 3 is the number 5"),
    ({"train.jsonl": numbered("a", 9), "test.jsonl": chats(good=9)}, r"test.jsonl, row 1 holds messages and \S+train"),
    ({"train.jsonl": numbered("a", 9), "test.jsonl": numbered("a", 9)}, r"the train split .* in another split"),
    ({"train.jsonl": numbered("A", 9), "test.jsonl": numbered(" a", 9)}, r"the train split .* in another split"),
    ({"train.jsonl": numbered("a", 2), "test.jsonl": numbered("b", 1)}, (1, 1, 1)),
    ({"train.jsonl": numbered("a", 30), "test.jsonl": numbered("b", 9)}, (20, 10, 9)),
]  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), FOLDERS)
def test_a_folder_is_read_or_named(files, expected, tokenizer, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if isinstance(expected, tuple):
        task = load_task(str(tmp_path), tokenizer)
        assert tuple(len(getattr(task, split)) for split in SPLIT) == expected
        return
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        load_task(str(tmp_path), tokenizer)


HOW = [
    ({"train": 0}, "load_task: train is 0, it should be a whole number from 1"),
    ({"validation": 0}, "validation is 0, it should be a whole number"),
    ({"test": -1}, "test is -1, it should be"),
    ({"test": "5"}, "test is '5', it should be"),
    ({"train": 2.5}, "train is 2.5, it should be"),
    ({"train": True}, "train is True, it should be"),
    ({"max_length": 0}, "max_length is 0, it should be"),
    ({"max_length": None}, "max_length is None, it should be"),
    ({"max_length": 1}, "is empty: .* dropped since their prompt alone fills max_length=1 tokens"),
    ({"seed": None}, "seed=None should be a whole number"),
    ({"seed": "a"}, "seed='a' should be"),
    ({"score": "f1"}, "score is 'f1', it should be exact or number"),
    ({"options": {"data_dir": "x"}}, "has no options data_dir; a file or folder has none"),
    ({"prompt": "{question}"}, "prompt is a template .* reasoning_gym"),
    ({"train": 10**9}, 5),
    ({"seed": -1}, 5),
    ({"test": 1, "validation": 1}, 5),
]


@pytest.mark.parametrize(("how", "expected"), HOW)
def test_options_are_checked_and_none_is_ignored(how, expected, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(FIVE)
    if isinstance(expected, int):
        assert loaded(tmp_path / "a.jsonl", tokenizer, **how) == expected
        return
    with pytest.raises(ValueError, match=expected):
        load_task(str(tmp_path / "a.jsonl"), tokenizer, **how)


SOURCES = [
    ("gsm8k", {"options": {"data_dri": "."}}, "gsm8k .* data_dri; known there is data_dir"),
    ("gsm8k", {"options": {"data_dir": 5}}, "data_dir is 5, it should be the path of a folder"),
    ("gsm8k", {"options": {"data_dir": "nowhere"}}, "gsm8k: there is no nowhere"),
    ("GSM8K", {}, "unknown task 'GSM8K'"),
    ("", {}, "unknown task ''"),
    ("reasoning_gym:nothing", {}, "reasoning_gym:nothing .* cannot be made"),
    ("reasoning_gym:chain_sum", {"options": {"nothing": 1}}, "cannot be made: .*nothing"),
    ("reasoning_gym:chain_sum", {"options": {"min_terms": -1}}, "cannot be made"),
    ("reasoning_gym:chain_sum", {"prompt": "{nothing}"}, "names 'nothing', which"),
    ("reasoning_gym:chain_sum", {"prompt": "{"}, "the prompt template '{' .* reasoning_gym:chain_sum"),
    ("reasoning_gym:chain_sum", {"prompt": "{}"}, "the prompt template '{}'"),
    ("reasoning_gym:chain_sum", {"prompt": "{question.x}"}, "the prompt template '{question.x}'"),
    ("reasoning_gym:chain_sum", {"prompt": "{question:d}"}, "the prompt template '{question:d}'"),
    ("reasoning_gym:chain_sum", {"prompt": "same"}, "is empty: .* came before in the same split"),
]


@pytest.mark.parametrize(("source", "how", "expected"), SOURCES)
def test_sources_are_named(source, how, expected, tokenizer):
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        load_task(source, tokenizer, **{"train": 20, "validation": 4, "test": 4} | how)


LOCAL = [
    ("gsm8k", {"question": None, "answer": "#### 1"}, "test.jsonl, row 3 is no row of openai/gsm8k"),
    ("gsm8k", {"question": ["q"], "answer": "#### 1"}, "test.jsonl, row 3 is no row"),
    ("gsm8k", {"question": "q", "answer": 5}, "test.jsonl, row 3 is no row"),
    ("gsm8k", {"question": "q"}, "test.jsonl, row 3 is no row"),
    ("gsm8k", [1], "test.jsonl, row 3 is no row"),
    ("gsm8k", {"question": "q", "answer": " "}, "test.jsonl, row 3: the response is empty"),
    ("gsm8k", {"question": "q", "answer": "#### none"}, r"1 of the .*test.jsonl, row 3 has the answer 'none'"),
    ("mbpp", {"text": "t", "code": "c", "test_list": []}, "test.jsonl, row 3 is no row"),
    ("mbpp", {"text": "t", "code": "c", "test_list": [None]}, "test.jsonl, row 3 is no row"),
    ("mbpp", {"text": "t", "code": None, "test_list": ["a"]}, "test.jsonl, row 3 is no row"),
    ("svamp", {"Body": "b", "Question": "q", "Equation": "e", "Answer": {"a": 1}}, "test.jsonl, row 3 is no row"),
    ("svamp", {"Body": "b", "Question": "q", "Equation": "e", "Answer": True}, "test.jsonl, row 3 is no row"),
]


@pytest.mark.parametrize(("name", "bad", "expected"), LOCAL)
def test_rows_of_a_local_copy_are_checked(name, bad, expected, tokenizer, tmp_path):
    good = {
        "gsm8k": {"question": "q", "answer": "#### 7"},
        "svamp": {"Body": "b", "Question": "q", "Equation": "e", "Answer": 7.0},
        "mbpp": {"text": "t", "code": "c", "test_list": ["a"]},
    }[name]
    asked = next(iter(good))
    for split in SPLIT:
        rows = [{**good, asked: f"{split} {i}"} for i in range(9)]
        if split == "test":
            rows[2] = bad
        (tmp_path / f"{split}.jsonl").write_text(lines(*rows, good=0))
    with pytest.raises(ValueError, match=expected):
        load_task(name, tokenizer, options={"data_dir": str(tmp_path)})


def test_a_file_of_a_folder_that_is_no_split_is_named(tokenizer, tmp_path, caplog):
    for name in ("train", "test", "val"):
        (tmp_path / f"{name}.jsonl").write_text(
            lines(*({"prompt": f"{name} {i}", "response": "r"} for i in range(9)), good=0)
        )
    load_task(str(tmp_path), tokenizer)
    assert "val.jsonl is not read, splits are train.jsonl, validation.jsonl, test.jsonl" in caplog.text


def symbols(*characters, **tokens):
    """A tokenizer of only these characters and special tokens."""
    vocabulary = {text: i for i, text in enumerate([*tokens.values(), *characters])}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A" if "bos_token" in tokens else "$A", special_tokens=[("<s>", 0)] if "bos_token" in tokens else []
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, **tokens)


def test_the_tokens_before_a_text_are_found_in_any_alphabet():
    dna = symbols(*"CGT ", bos_token="<s>", eos_token="</s>")
    assert Encoder(dna).text("GC") == [0, 3, 2]
    with pytest.raises(ValueError, match="this tokenizer has no token for"):
        Encoder(symbols(bos_token="<s>", eos_token="</s>")).text("a")


def test_a_tokenizer_needs_an_end_token_and_not_a_padding_token(tmp_path):
    (tmp_path / "a.jsonl").write_text(FIVE)
    characters = [chr(c) for c in range(32, 127)]
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        load_task(str(tmp_path / "a.jsonl"), symbols(*characters, bos_token="<s>"))
    ended = symbols(*characters, bos_token="<s>", eos_token="</s>")
    assert load_task(str(tmp_path / "a.jsonl"), ended).pad_id == ended.eos_token_id


def grown(**tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["~~"])
    tokenizer.add_special_tokens(tokens)
    return tokenizer


LONG = lines(*[row(prompt=f"{i}" + "x" * 140) for i in range(5)], good=0)
FITS = [
    (make_tokenizer(), FIVE, {}, None),
    (grown(), FIVE, {}, None),
    (grown(), lines(row(response="~~")), {}, "a row has the token 128 and the model's last token is 127: take"),
    (grown(pad_token="<new>"), FIVE, {}, "padding is the token 129 and the model's last token is 127"),
    (grown(eos_token="<new>"), FIVE, {}, "a row has the token 129 and the model's last token is 127"),
    (make_tokenizer(), FIVE, {"vocab_size": 40}, "a row has the token 1.. and the model's last token is 39"),
    (make_tokenizer(), LONG, {"kind": "gpt2"}, "a row has 14. tokens and the model has learned 128 positions"),
    (make_tokenizer(), LONG, {"kind": "opt", "ffn_dim": 96}, "a row has 14. tokens and .* 128 positions: .*max_length"),
    (make_tokenizer(), LONG, {}, None),
]


@pytest.mark.parametrize(("tokenizer", "content", "how", "expected"), FITS)
def test_data_that_a_model_cannot_take_is_refused_before_work(tokenizer, content, how, expected, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    task, model = load_task(str(tmp_path / "a.jsonl"), tokenizer), tiny(**how)
    if expected is None:
        require_fit(model, task)
        return
    for work in (
        lambda: bs.tune(model, task, steps=1, batch_size=2),
        lambda: bs.decompose(model, task),
        lambda: bs.evaluate(model, tokenizer, task),
    ):
        with pytest.raises(ValueError, match=f"a.jsonl: {expected}"):
            work()


def test_one_test_item_is_measured(tmp_path):
    (tmp_path / "a.jsonl").write_text(FIVE)
    tokenizer = make_tokenizer()
    result = bs.evaluate(tiny(), tokenizer, load_task(str(tmp_path / "a.jsonl"), tokenizer, test=1))
    assert (result["n"], result["nll"]["low"]) == (1, None)
    with pytest.raises(ValueError, match="limit=0 should be at least 1"):
        bs.evaluate(tiny(), tokenizer, load_task(str(tmp_path / "a.jsonl"), tokenizer), limit=0)


def test_duplicates_stay_in_one_split_whatever_their_case_and_white_space(tokenizer, tmp_path, caplog):
    spelled = ("Same {}", " same  {}", "SAME {}\n")
    rows = [row(prompt=spelled[i % 3].format(i // 3)) for i in range(60)]
    (tmp_path / "a.jsonl").write_text(lines(*rows, good=0))
    with caplog.at_level(logging.WARNING):
        task = load_task(str(tmp_path / "a.jsonl"), tokenizer)
    splits = [{" ".join(e.prompt.lower().split()) for e in getattr(task, split)} for split in SPLIT]
    assert sum(map(len, splits)) == len(set().union(*splits))
    assert len(task.test) == len(splits[2])
    counted = (
        task.report["overlaps_dropped"]
        + task.report["repeats_dropped"]
        + sum(map(len, (task.train, task.validation, task.test)))
    )
    assert counted == 60
    assert "were dropped since their prompt is in another split" in caplog.text
