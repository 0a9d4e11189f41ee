"""Rows of messages: what a chat template has to write of them, and what becomes the prompt, response and answer."""

import pytest
from rows import CALL, CALLS, TURNS, chatting, lines, loaded, talk

from basis_select.data.tasks import load_task

TEMPLATES = [
    ("{{ 1 / 0 }}", "row 1: the chat template refuses these messages: division by zero"),
    ("{{ messages[0].nothing.more }}", "row 1: the chat template refuses"),
    ("{% for m in messages %}", "row 1: the chat template refuses"),
    ("{{ messages[7]['content'] }}", "row 1: the chat template refuses"),
    ("{{ messages|tojson|int + 'a' }}", "row 1: the chat template refuses"),
    ("{% for i in range(999999999) %}{% endfor %}", "row 1: the chat template refuses"),
    ("the same", "row 1: the chat template does not continue its own prompt"),
    (TURNS.replace("{% for", "{{ messages|length }}{% for"), "row 1: the chat template does not continue its own"),
    (TURNS.replace("{{ tools|tojson }}", ""), "row 1: the chat template leaves out `tools`"),
    (TURNS, 5),
    (TURNS.replace("END\n", ""), 5),
    (TURNS.replace("END\n", "</s>\n"), 5),
    (CALLS, 5),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_a_chat_template_fits_its_rows_or_is_refused(template, expected, tmp_path):
    rows = [{"messages": talk(f"q{i}"), "tools": [{"name": "lookup"}]} for i in range(5)]
    (tmp_path / "a.jsonl").write_text(lines(*rows, good=0))
    if isinstance(expected, int):
        assert loaded(tmp_path / "a.jsonl", chatting(template)) == expected
        return
    with pytest.raises(ValueError, match=expected):
        load_task(str(tmp_path / "a.jsonl"), chatting(template))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "Answer in French."}, "leaves out the message 'Answer in French.'"),
        (
            {"role": "user", "content": "hi", "reasoning_content": "so"},
            "does not write `reasoning_content` of a message",
        ),
        ({"role": "user", "content": "hi", "weight": 0}, "does not write `weight` of a message"),
        ({"role": "user", "content": "hi", "refusal": None}, 5),
        ({"role": "user", "content": "hi", "name": "Ann"}, 5),
        ({"role": "assistant", "content": "<think>so</think>\n\nhello"}, 5),
    ],
)
def test_what_a_template_does_not_write_of_a_message_is_refused(message, expected, tmp_path):
    template = TURNS.replace("in messages", "in messages if m.role != 'system'")
    template = template.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}")
    assert template.count("</think>") == 1
    rows = [{"messages": [message, *talk(f"q{i}")]} for i in range(5)]
    (tmp_path / "a.jsonl").write_text(lines(*rows, good=0))
    if isinstance(expected, int):
        assert loaded(tmp_path / "a.jsonl", chatting(template)) == expected
        return
    with pytest.raises(ValueError, match=f"row 1: the chat template {expected}"):
        load_task(str(tmp_path / "a.jsonl"), chatting(template))


def test_a_template_that_writes_the_date_writes_the_same_on_any_day(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*({"messages": talk(f"q{i}")} for i in range(5)), good=0))
    task = load_task(str(tmp_path / "a.jsonl"), chatting("Today is {{ strftime_now('%d %b %Y') }}.\n" + TURNS))
    assert all(e.prompt.startswith("Today is 26 Jul 2024.\n") for e in task.train)


def test_the_answer_is_what_the_template_makes_of_the_last_message(tmp_path):
    """Qwen 3's template writes an empty thought before it."""
    thinks = TURNS.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    (tmp_path / "a.jsonl").write_text(lines(*({"messages": talk(f"q{i}", f"word{i}x")} for i in range(5)), good=0))
    task = load_task(str(tmp_path / "a.jsonl"), chatting(thinks))
    assert all(e.answer.startswith("<think></think>word") for e in task.train)


def test_a_row_without_an_answer_is_said_and_refused_where_a_score_is_asked_for(tmp_path, caplog):
    rows = [
        {"messages": talk(f"q{i}", *((None,) if i == 2 else (f"{i}",)), **({"tool_calls": [CALL]} if i == 2 else {}))}
        for i in range(5)
    ]
    (tmp_path / "a.jsonl").write_text(lines(*rows, good=0))
    assert load_task(str(tmp_path / "a.jsonl"), chatting(CALLS)).score is None
    assert "1 of 5 rows have no answer: accuracy is not measured" in caplog.text
    with pytest.raises(ValueError, match="row 3 has no answer to score: leave out the row, or `score`"):
        load_task(str(tmp_path / "a.jsonl"), chatting(CALLS), score="number")


def test_tool_calls_that_the_template_writes_are_trained(tmp_path):
    rows = [{"messages": talk(f"q{i}", None, tool_calls=[CALL])} for i in range(5)]
    (tmp_path / "a.jsonl").write_text(lines(*rows, good=0))
    task = load_task(str(tmp_path / "a.jsonl"), chatting(CALLS))
    assert all("'name': 'lookup'" in e.response and e.response.endswith("END\n") for e in task.train)
    assert task.score is None  # a call is no text to compare
