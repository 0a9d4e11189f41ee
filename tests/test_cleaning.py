"""What of a text leaves this machine."""

import pytest

from basis_select.checkpoint.cleaning import cleaned, masked

MASKED = {
    "http://jane:pw@host/x": "http://host/x",
    "https://hf_abcdefghij@host": "https://host",
    "https://host/x?token=abc&n=1": "https://host/x?token=***&n=1",
    "use hf_AbCdEfGhIjKl now": "use *** now",
    "sk-abcdefghijklmnopqrst": "***",
    "ghp_abcdefghijklmnopqrst": "***",
    "Authorization: Bearer abc.def.ghi": "Authorization: Bearer ***",
    "me@host.org": "me@host.org",
    "https://host/@x": "https://host/@x",
}
CLEANED = {  # key, value -> what is published
    ("model", "org/base"): "org/base",
    ("model", "gpt2"): "gpt2",
    ("model", "/models/org/base"): "base",
    ("model", "~/models/base"): "base",
    ("model", "../base"): "base",
    ("model", "a/b/c"): "c",
    ("model", "D:\\models\\base"): "base",
    ("model", "wheel:llm==1#sha256=0"): "wheel:llm==1#sha256=0",
    ("model", "/models/base/"): "base",
    ("task", "svamp"): "svamp",
    ("task", "reasoning_gym:gsm_symbolic"): "reasoning_gym:gsm_symbolic",
    ("task", "data/own.jsonl"): "own.jsonl",
    ("task", "clients/rows"): "rows",
    ("task", "/home/me/my rows.jsonl"): "my rows.jsonl",
    ("data.options.data_dir", "private/data"): "data",
    ("prune.costs", "file:///home/me/costs.json"): "costs.json",
    ("data.prompt", "Answer yes/no: {question}"): "Answer yes/no: {question}",
    ("data.prompt", "{question} (1/2)\nAnswer:"): "{question} (1/2)\nAnswer:",
    ("note", "read /home/me/rows.jsonl, at https://host/a/b"): "read rows.jsonl, at https://host/a/b",
    ("note", 'FileNotFoundError("/home/me/rows.jsonl")'): 'FileNotFoundError("rows.jsonl")',
    ("data.options.api_key", "abc"): "***",
    ("hf-token", "abc"): "***",
    ("max_length", 512): 512,
    ("tokens", 512): 512,
    ("data.prompt", None): None,
}


@pytest.mark.parametrize("text", MASKED)
def test_passwords_are_masked(text):
    assert masked(text) == MASKED[text]


@pytest.mark.parametrize(("key", "value"), CLEANED)
def test_folders_and_secrets_are_left_out(key, value):
    *parents, last = key.split(".")
    content = {last: value}
    for name in reversed(parents):
        content = {name: content}
    expected = CLEANED[key, value]
    found, changed = cleaned(content)
    for name in (*parents, last):
        found = found[name]
    assert found == expected
    assert changed == ([key] if expected != value else [])
