"""What README and docs say: tables are those of the result files, the example runs, every command is there."""

import json
import re
from pathlib import Path

import pytest
import recipes_table
import tables
from conftest import make_tokenizer, tiny

from basis_select.checkpoint.files import save
from basis_select.cli import app

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()


@pytest.mark.parametrize("page", [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_tables_are_those_of_the_result_files(page):
    assert tables.fill(page.read_text()) == page.read_text()


def test_costs_of_recipes_are_those_of_the_result_file():
    page = (REPO / "recipes" / "README.md").read_text()
    assert recipes_table.fill(page) == page


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tiny(vocab_size=128), make_tokenizer(), "parent")
    rows = [{"prompt": f"{i} and {i} is", "response": f" {2 * i}"} for i in range(60)]
    (tmp_path / "my_examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "parent").replace("steps=1000", "steps=2")
    code = code.replace("6x", "3x")  # ranks are multiples of 16, too large for a sixth of a tiny model
    names = {}
    exec(code, names)
    small = (tmp_path / "my-small-model" / "model.safetensors").stat().st_size
    assert small <= 2 * sum(p.numel() for p in names["parent"].parameters()) / 3


def test_every_command_is_described():
    described = (REPO / "docs" / "commands.md").read_text()
    for command in app.registered_commands:
        assert f"`basis-select {command.name or command.callback.__name__} " in described
