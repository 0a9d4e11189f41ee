"""The notebooks run from top to bottom, and what is committed is what they say."""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

import basis_select as bs

REPO = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.name for p in (REPO / "notebooks").glob("*.ipynb"))
LESS = {  # what the test runs with less of, because all of it takes minutes
    "1_bases.ipynb": {
        "kept = [0.6, 0.4, 0.25, 0.15, 0.1, 0.07]": "kept = [0.6, 0.07]",
        "keep=0.1, steps=80, rounds=4": "keep=0.1, steps=8, rounds=4",
        "bs.load_task(small.data([skill]), tokenizer)": "bs.load_task(small.data([skill]), tokenizer, test=32)",
    },
    "2_compress.ipynb": {
        "TUNE, HEAL, EXAMPLES, ITEMS = 30, 12, 64, 60": "TUNE, HEAL, EXAMPLES, ITEMS = 2, 2, 8, 4",
        "validation=32": "validation=4",
    },
    "3_inspect.ipynb": {
        "data: {{validation: 60, test: 200}}": "data: {{validation: 20, test: 40}}",
        "heal: {{steps: 60}}": "heal: {{steps: 4}}",
        "validation=60, test=200": "validation=20, test=40",
    },
}


def texts(notebook):
    """`[(kind of output, its text), ...]`; pictures have no text that repeats."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            found.append((output["output_type"], text))
    return found


def kinds(notebook):
    """Which kinds of output every code cell has; into how many pieces a stream is cut depends on the time it takes."""
    return [{o["output_type"] for o in cell.outputs} for cell in notebook.cells if cell.cell_type == "code"]


def two_layers_of(source, folder):
    """The folder of a pretrained model with its first two layers only."""
    model, tokenizer = bs.load(source)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    return bs.save(model, tokenizer, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy, so that runs/ does not appear in the repository; the small model is trained once for all notebooks, by
    fewer steps."""
    home = tmp_path_factory.mktemp("repo")
    shutil.copytree(REPO / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    text = (home / "notebooks" / "small.py").read_text(encoding="utf-8")
    assert "steps=500" in text
    (home / "notebooks" / "small.py").write_text(text.replace("steps=500", "steps=150"), encoding="utf-8")
    (home / "tests").mkdir()
    shutil.copy(REPO / "tests" / "hub_server.py", home / "tests")
    return home / "notebooks"


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("nbclient"), reason="notebooks are run by the dev extra")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, folder, monkeypatch):
    from execute import execute

    paths = [str(REPO), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    text = (folder / name).read_text(encoding="utf-8")
    changes = dict(LESS.get(name, {}))
    if model := re.search(r'wheel:[^"\\]+', text):
        changes[model[0]] = str(two_layers_of(model[0], folder.parent / "model"))
    for its, less in changes.items():
        assert its in text
        text = text.replace(its, less)
    (folder / name).write_text(text, encoding="utf-8")
    ran = execute(folder / name)
    committed = nbformat.read(REPO / "notebooks" / name, as_version=4)
    assert kinds(ran) == kinds(committed)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_was_run_and_names_no_machine(name):
    notebook = nbformat.read(REPO / "notebooks" / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs) or name == "4_push.ipynb"
    said = "\n".join(text for _, text in texts(notebook))
    assert not re.search(r"/(home|root|tmp|work|Users)/|127\.0\.0\.1|it/s\b", said)
    assert all(o["output_type"] != "error" and o.get("name") != "stderr" for c in code for o in c.outputs)
    assert (REPO / "notebooks" / name).stat().st_size < 700_000
