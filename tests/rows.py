"""Rows of data as tests write them into files, and what of such a file is read."""

import json

from conftest import make_tokenizer

from basis_select.data.tasks import load_task

SPLIT = ("train", "validation", "test")
TURNS = (
    "{% if tools %}{{ tools|tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {}}}
CALLS = TURNS.replace("{{ m.content }}", "{{ m.content or '' }}{{ (m.tool_calls or '')|string }}")


def lines(*rows, good=4):
    """JSONL of these rows after `good` ones."""
    rows = [*({"prompt": f"{i} is", "response": f" {i}"} for i in range(good)), *rows]
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def chats(*rows, good=4):
    return lines(*[{"messages": talk(f"q{i}")} for i in range(good)], *rows, good=0)


def talk(question, answer="a", **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def row(**fields):
    return {"prompt": "p", "response": "r"} | fields


def chatting(template=TURNS):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def loaded(source, tokenizer, **how):
    task = load_task(str(source), tokenizer, **how)
    return sum(len(getattr(task, split)) for split in SPLIT)


def numbered(word, n):
    return lines(*[row(prompt=f"{word}{i}") for i in range(n)], good=0)
