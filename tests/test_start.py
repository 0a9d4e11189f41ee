"""What is imported when: a command's help costs no torch, a name of the package its module, transformers the format."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from conftest import make_tokenizer, tiny

import basis_select as bs
from basis_select.checkpoint import format
from basis_select.cli import app

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
MISTAKES = [
    *("run", "nothing", "bench m --rounds=0", "bench m --prompts=a", "profile m --device=tpu", "plan gone.yaml"),
    *("inspect gone", "verify gone", "eval m", "export m . --to=onnx"),
]


def fresh(code, *arguments):
    """What a fresh Python process writes that runs `code`: `(stdout, stderr)`."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_help_and_mistakes_import_neither_torch_nor_transformers():
    code = f"""
import sys
from typer.testing import CliRunner
from basis_select.cli import app
for line in {["", *COMMANDS]}:
    said = CliRunner().invoke(app, [*line.split(), "--help"])
    assert said.exit_code == 0 and "Usage:" in said.output, (line, said.output)
for line in {MISTAKES}:
    said = CliRunner().invoke(app, line.split())
    assert said.exit_code in (1, 2) and "rror" in said.output, (line, said.output)
print(sorted({{"torch", "transformers", "datasets", "numpy"}} & sys.modules.keys()))
"""
    assert fresh(code) == ("[]\n", "")


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "PASSIVE 3000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"), ({"GOMP_SPINCOUNT": "9"}, "None 9")],
)
def test_threads_spin_for_a_moment_while_they_wait_unless_the_user_wants_it_otherwise(given, found, monkeypatch):
    code = "import os, sys; from basis_select.cli import main; sys.argv = ['', '--help']\ntry: main()\n"
    code += "finally: print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert fresh(code)[0].endswith(f"\n{found}\n")


@pytest.mark.parametrize(("given", "found"), [(None, "8192"), ("16", "16")])
def test_code_is_kept_for_many_shapes_unless_the_user_wants_it_otherwise(given, found, monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    assert fresh(f"import os, basis_select; print(os.environ['{name}'])")[0] == f"{found}\n"


@pytest.mark.parametrize("name", bs.__all__)
def test_a_public_name_is_a_function_or_a_class(name):
    assert name in dir(bs)
    assert callable(getattr(bs, name))
    assert not isinstance(getattr(bs, name), ModuleType)


def test_a_verb_stays_a_function_when_its_module_is_imported():
    import_module("basis_select.tune")
    assert bs.tune is sys.modules["basis_select.tune"].tune
    assert bs.__dict__["tune"] is bs.tune


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'basis_select' has no attribute 'compress'"):
        _ = bs.compress


@pytest.mark.slow
def test_what_the_format_is_made_of_imports_no_transformers():
    """Else it would be half imported when transformers' import asks for the format."""
    source = Path(format.__file__).read_text()
    parts = [line.module for line in ast.parse(source).body if isinstance(line, ast.ImportFrom) and line.level]
    code = "import sys\n" + "\n".join(
        f"import basis_select.{'' if name.startswith('layers') else 'checkpoint.'}{name}" for name in parts
    )
    assert "layers.embedding" in parts
    assert fresh(code + "\nprint('transformers.modeling_utils' in sys.modules)") == ("False\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["basis_select, transformers", "transformers.modeling_utils, basis_select"])
def test_transformers_reads_the_format_after_the_import(order, tmp_path):
    model = tiny()
    bs.save(bs.prune(bs.decompose(model, metric="plain"), keep=0.5), make_tokenizer(), tmp_path / "small")
    code = f"""
import sys
import {order}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.down_proj).__name__)
"""
    assert fresh(code, str(tmp_path / "small"))[0] == "LowRankLinear\n"


@pytest.mark.slow
def test_a_command_shows_only_what_it_says_itself(tmp_path):
    bs.save(tiny(), make_tokenizer(), tmp_path / "model")
    command = [sys.executable, "-m", "basis_select", "inspect", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "all parameters" in done.stdout
