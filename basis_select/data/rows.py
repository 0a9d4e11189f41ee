"""Rows of a user's own files: `{prompt, response}` or `{messages, tools}`, checked one by one."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from ..system.reading import once, read_text


def file_rows(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The rows of a file as `{prompt, response, answer, where}`, those of messages with `turn_end` and `rendered`.

    Raises ValueError naming the file and the row.
    """
    rows = [_file_row(row, f"{path}, row {i + 1}", tokenizer) for i, row in enumerate(read_rows(path))]
    one_kind(rows)
    return rows


def one_kind(rows: Sequence[dict]) -> None:
    """Raise ValueError, naming the first row of the other kind, where rows of messages stand beside rows of prompts."""
    for row in rows:
        if row.get("rendered") != rows[0].get("rendered"):
            kinds = ("messages", "a prompt") if row.get("rendered") else ("a prompt", "messages")
            raise ValueError(
                f"{row['where']} holds {kinds[0]} and {rows[0]['where']} {kinds[1]}: a task's rows are of one kind"
            )


DAY = datetime(2024, 7, 26)  # of chat templates that write the date: a row is the same text on any day
_CODES = ("%d", "%b", "%B", "%m", "%Y", "%y", "%a", "%A")
_DATES = "".join(f"|replace({code!r}, {DAY.strftime(code)!r})" for code in _CODES)
_ON_THAT_DAY = f"{{% macro strftime_now(format) %}}{{{{ format{_DATES} }}}}{{% endmacro %}}"


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None = None, **how: Any
) -> str:
    """The text that the tokenizer's chat template makes of messages, on DAY."""
    template = tokenizer.get_chat_template(tools=tools)
    if "strftime_now" in template:
        template = _ON_THAT_DAY + template
    return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **how)


def _file_row(row: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {_kind(row)}; a row is {{prompt, response}} or {{messages}}")
    if "messages" in row:
        return _chat_row(row, where, tokenizer)
    if not {"prompt", "response"} <= row.keys():
        raise ValueError(f"{where} has {sorted(row)}; a row is {{prompt, response}} or {{messages}}")
    if unknown := sorted(row.keys() - {"prompt", "response", "answer"}):
        raise ValueError(f"{where} has {', '.join(unknown)} beside `prompt` and `response`; known there is answer")
    row = {"answer": row["response"], **row}
    for key in ("prompt", "response", "answer"):
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: `{key}` is {_kind(row[key])}, it should be text")
    if not row["response"].strip():
        raise ValueError(f"{where}: the response is empty")
    return {**row, "where": where}


_ANY_MESSAGE = ("role", "content", "tool_calls", "tool_call_id", "name")  # may have these, whatever the template is
_NOTHING = (None, "", [])
_MARK = "0f6b2d"  # stands for an answer where a template's turn end is looked for


def _chat_row(row: dict, where: str, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The last answer is the response, with what the chat template puts after it."""
    messages, tools = row["messages"], row.get("tools")
    if unknown := sorted(row.keys() - {"messages", "tools", "answer"}):
        raise ValueError(f"{where} has {', '.join(unknown)} beside `messages`; known there are tools, answer")
    _check_messages(messages, where)
    _check_objects(tools, "tools", where)
    if not tokenizer.chat_template:
        raise ValueError(f"{where}: `messages` need a chat template, which this model's tokenizer lacks")
    if not isinstance(row.get("answer", ""), str):
        raise ValueError(f"{where}: `answer` is {_kind(row['answer'])}, it should be text")

    def written(messages: list[dict], tools: list[dict] | None = tools, **how: Any) -> str:
        try:
            return rendered(tokenizer, messages, tools, **how)
        except Exception as error:  # a template is a program: it raises what it likes
            raise ValueError(f"{where}: the chat template refuses these messages: {error}") from None

    prompt, whole = written(messages[:-1], add_generation_prompt=True), written(messages)
    marked = written([*messages[:-1], {"role": "assistant", "content": _MARK}])
    if not whole.startswith(prompt) or _MARK not in marked:
        raise ValueError(
            f"{where}: the chat template does not continue its own prompt when the answer is added "
            f"({prompt[-40:]!r}), so training would see another prompt than generation"
        )
    _check_written(whole, messages, tools, tokenizer, where)
    response, end = whole[len(prompt) :], marked.rpartition(_MARK)[2]
    end = end if response.endswith(end) else ""
    if not response.removesuffix(end).strip():
        raise ValueError(f"{where}: the response is empty")
    return {
        "prompt": prompt,
        "response": response,
        "answer": row.get("answer", response.removesuffix(end) if messages[-1].get("content") else None),
        "turn_end": end,
        "rendered": True,
        "where": where,
    }


def _check_written(
    text: str, messages: list[dict], tools: list[dict] | None, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Raise ValueError if a template's text lacks a content, the name of a tool or of one that is called, or if the
    template knows nothing of a key of the messages.
    """
    known = json.dumps([tokenizer.chat_template, *_ANY_MESSAGE])
    for message in messages:
        if unknown := [key for key, value in message.items() if value not in _NOTHING and key not in known]:
            raise ValueError(f"{where}: the chat template does not write `{unknown[0]}` of a message: leave it out")
        content = (message.get("content") or "").rpartition("</think>")[2].strip()  # thoughts of earlier turns may go
        if not any(written in text for written in (content, json.dumps(content)[1:-1], repr(content)[1:-1])):
            raise ValueError(f"{where}: the chat template leaves out the message {content[:100]!r}")
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    for key, functions in (("tools", tools or ()), ("tool_calls", calls)):
        for function in functions:
            inner = function.get("function")
            name = (inner if isinstance(inner, dict) else function).get("name")
            if isinstance(name, str) and name not in text:
                raise ValueError(f"{where}: the chat template leaves out `{key}`: it does not write {name!r}")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: `messages` is {_kind(messages)}, it should be a list of objects")
    for message in messages:
        _check_objects(message.get("tool_calls"), "tool_calls", where)
        content = message.get("content")
        calls = content is None and message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not (calls or isinstance(content, str)):
            seen = json.dumps(message)[:100]
            raise ValueError(f"{where}: a message has a role and a content, both text, not {seen}")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last of `messages` must have the role assistant")


def _check_objects(value: Any, name: str, where: str) -> None:
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise ValueError(f"{where}: `{name}` is {_kind(value)}, it should be a list of objects")


def _kind(value: Any) -> str:
    """What a value of a JSON file is, with an article."""
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value}")


def read_rows(path: str | Path) -> list:
    """The rows of a JSON or JSONL file. Raises ValueError naming the file, and the line that is not valid."""
    # The loader of datasets 5.2 reads 63 of the 90 faulty files of tests/test_bad_data.py without an error, among them
    # Latin-1 and two objects on a line, names the file in none of the other 27, and makes a datetime of text like one.
    path = Path(path)
    text = read_text(path)
    if "\0" in text:  # as in UTF-16, and after a crash
        raise ValueError(f"{path} is not UTF-8 text: it holds NUL bytes")
    if path.suffix.lower() == ".json":
        rows = _parsed(text, path)
        if not isinstance(rows, list):
            raise ValueError(f"{path} is {_kind(rows)}, it should be a list of rows")
        return rows
    lines = enumerate(text.split("\n"), 1)  # JSON strings hold other line ends
    return [_parsed(line, f"{path}, line {i},") for i, line in lines if line.strip()]


def _parsed(text: str, where: str | Path) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a character (\\ud800 to \\udfff), which is not valid text") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number there")
