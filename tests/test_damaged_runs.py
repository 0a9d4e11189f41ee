"""Folders of runs that were damaged, killed or shared with somebody else's files: what is said, kept and taken up."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import addition_recipe, make_task, make_tokenizer, sampled, start_no_process, tiny
from damages import cut, edit, into_folder
from typer.testing import CliRunner

from basis_select.checkpoint import checks
from basis_select.cli import app
from basis_select.run import directory, disk, pipeline
from basis_select.run import recipe as recipes
from basis_select.run.room import in_tokens
from basis_select.system import machine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`(recipe file, folder of its finished run)`: two steps of healing, a score that needs derivatives."""
    home = tmp_path_factory.mktemp("run")
    content = {
        "data": {"test": 1, "validation": 2},
        "decompose": {"metric": "plain"},
        "prune": {"keep": 0.5, "multiple_of": 2, "score": "taylor"},
        "heal": {"steps": 2, "batch_size": 4, "lr": 1e-3},
        "soft_labels": 0,
    }
    recipe = addition_recipe(home, tiny(num_hidden_layers=1), 6, **content)
    with pytest.MonkeyPatch.context() as patch:
        start_no_process(patch)
        patch.setattr(pipeline, "report", lambda folder: None)
        pipeline.run(recipes.read(recipe), home / "run")
    return recipe, home / "run"


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """`(recipe file, copy of the run)`, in which no stage may do any work."""
    shutil.copytree(made[1], tmp_path / "run")

    def works(*args):
        raise AssertionError("a stage began")

    start_no_process(monkeypatch)
    monkeypatch.setattr(disk, "forget_peak_memory", works)
    monkeypatch.setattr(pipeline, "report", lambda folder: None)
    return made[0], tmp_path / "run"


def said(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(done.exception, SystemExit), done.output
    assert done.exit_code == 1, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.output
    return lines[0]


def state(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def stage(run, name):
    return next(p for p in sorted((run / "stages").iterdir()) if p.name.startswith(f"{name}-"))


def into_file(path):
    shutil.rmtree(path)
    path.write_text("text")


def into_link(path):
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


DAMAGES = {  # what happens to the folder of a run, and words of the sentence
    "stage.json is gone": (lambda r: (stage(r, "load") / "stage.json").unlink(), "stage.json is missing"),
    "stage.json is cut": (lambda r: cut(stage(r, "heal") / "stage.json"), "stage.json is not valid JSON"),
    "stage.json is empty": (lambda r: cut(stage(r, "prune") / "stage.json", 0), "stage.json is not valid JSON"),
    "stage.json is binary": (
        lambda r: (stage(r, "heal") / "stage.json").write_bytes(b"\xff\xfe\x00"),
        "stage.json is not UTF-8",
    ),
    "stage.json is a list": (lambda r: (stage(r, "heal") / "stage.json").write_text("[]"), "it should be an object"),
    "stage.json is deep": (
        lambda r: (stage(r, "heal") / "stage.json").write_text("[" * 100_000),
        "is nested too deeply",
    ),
    "stage.json is a folder": (lambda r: into_folder(stage(r, "heal") / "stage.json"), "stage.json is a folder"),
    "stage.json has no upstream": (
        lambda r: edit(stage(r, "heal") / "stage.json", lambda c: c.pop("upstream")),
        "it has no upstream",
    ),
    "upstream is a number": (
        lambda r: edit(stage(r, "heal") / "stage.json", lambda c: c.update(upstream=[1])),
        "upstream[0] is 1, it should be str",
    ),
    "seconds are text": (
        lambda r: edit(stage(r, "heal") / "stage.json", lambda c: c.update(seconds="1")),
        "seconds is '1', it should be float",
    ),
    "sizes are gone": (
        lambda r: edit(stage(r, "save") / "stage.json", lambda c: c["sizes"].pop("bytes")),
        "sizes has no bytes",
    ),
    "stage.json is of another stage": (
        lambda r: shutil.copy(stage(r, "load") / "stage.json", stage(r, "heal") / "stage.json"),
        "is of another stage, load",
    ),
    "the hash is another": (
        lambda r: edit(stage(r, "heal") / "stage.json", lambda c: c.update(weights_sha256="0")),
        "holds other weights than",
    ),
    "weights are gone": (
        lambda r: (stage(r, "heal") / "model" / "model.safetensors").unlink(),
        "holds no .safetensors file",
    ),
    "weights are cut": (
        lambda r: cut(stage(r, "heal") / "model" / "model.safetensors"),
        "is not a whole safetensors file",
    ),
    "weights are empty": (
        lambda r: cut(stage(r, "decompose") / "model" / "model.safetensors", 0),
        "is not a whole safetensors file",
    ),
    "the model is gone": (lambda r: shutil.rmtree(stage(r, "save") / "model"), "holds no .safetensors file"),
    "the model is a file": (lambda r: into_file(stage(r, "save") / "model"), "holds no .safetensors file"),
    "the config is gone": (lambda r: (stage(r, "load") / "model" / "config.json").unlink(), "config.json is missing"),
    "the sidecar is gone": (
        lambda r: (stage(r, "load") / "model" / checks.SIDECAR).unlink(),
        f"has no {checks.SIDECAR}",
    ),
    "the sidecar is cut": (lambda r: cut(stage(r, "load") / "model" / checks.SIDECAR), "is not valid JSON"),
    "the evaluation is cut": (lambda r: cut(stage(r, "evaluate") / "evaluation.json"), "evaluation.json is not valid"),
    "the evaluation is gone": (
        lambda r: (stage(r, "evaluate") / "evaluation.json").unlink(),
        "evaluation.json is missing",
    ),
    "the evaluation has no items": (
        lambda r: edit(stage(r, "evaluate") / "evaluation.json", lambda c: c.pop("items")),
        "it has no items",
    ),
    "the speeds are cut": (lambda r: cut(stage(r, "time") / "speed.json"), "speed.json is not valid JSON"),
    "the speeds are text": (
        lambda r: (stage(r, "time") / "speed.json").write_text('{"a": "b"}'),
        "should be an object",
    ),
    "the derivatives are cut": (
        lambda r: cut(stage(r, "derivatives") / "derivatives.safetensors"),
        "is not a whole safetensors file",
    ),
    "the derivatives are gone": (
        lambda r: (stage(r, "derivatives") / "derivatives.safetensors").unlink(),
        "holds no .safetensors file",
    ),
    "the metrics are cut": (lambda r: cut(stage(r, "heal") / "metrics.jsonl", 0.8), "metrics.jsonl, line 2, is not"),
    "the metrics are text": (
        lambda r: (stage(r, "heal") / "metrics.jsonl").write_text('"text"\n'),
        "metrics.jsonl, line 1, is damaged",
    ),
    "a stage is a file": (lambda r: into_file(stage(r, "heal")), "is not the folder of a stage"),
    "a stage is a link": (lambda r: into_link(stage(r, "heal")), "is not the folder of a stage"),
    "an unfinished stage is a file": (
        lambda r: (r / "stages" / ".heal-0123456789").write_text(""),
        "is not the folder of a stage",
    ),
    "the stages are a file": (lambda r: into_file(r / "stages"), "but no run made it"),
    "the recipe is a folder": (lambda r: into_folder(r / "recipe.yaml"), "recipe.yaml is no file that a run wrote"),
    "the results are a folder": (lambda r: into_folder(r / "results.json"), "is no file that a run wrote"),
    "final has a file more": (lambda r: (r / "final" / ".env").write_text("KEY=1"), ".env was not written by a run"),
    "final has a folder more": (lambda r: (r / "final" / "notes").mkdir(), "notes was not written by a run"),
    "final was edited": (
        lambda r: edit(r / "final" / "config.json", lambda c: c.update(a=1)),
        "config.json is not the file that was saved",
    ),
    "final lost a file": (lambda r: (r / "final" / "config.json").unlink(), "config.json is missing"),
    "final is a file": (lambda r: into_file(r / "final"), "is no checkpoint that a run wrote"),
    "final is a link": (lambda r: into_link(r / "final"), "is no checkpoint that a run wrote"),
    "final is the user's": (
        lambda r: (shutil.rmtree(r / "final"), (r / "final").mkdir(), (r / "final" / "thesis.txt").write_text("x")),
        "is no checkpoint that a run wrote",
    ),
}


@pytest.mark.parametrize("name", sampled(DAMAGES, 3))
def test_a_damaged_run_is_said_before_any_work(name, copy):
    recipe, run = copy
    damage, words = DAMAGES[name]
    damage(run)
    before = state(run)
    sentence = said("run", recipe, "--out", run)
    assert words in sentence
    assert str(run) in sentence
    assert state(run) == before


def test_what_is_told_to_be_removed_is_made_again(copy, monkeypatch):
    recipe, run = copy
    monkeypatch.setattr(disk, "forget_peak_memory", machine.forget_peak_memory)
    before = json.loads((run / "results.json").read_text())["result"]["weights_sha256"]
    shutil.rmtree(stage(run, "heal"))
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(run)])
    assert done.exit_code == 0, done.output
    assert json.loads((run / "results.json").read_text())["result"]["weights_sha256"] == before


REPORTS = {
    "results are cut": (lambda r: cut(r / "results.json"), "results.json is not valid JSON"),
    "results are empty": (lambda r: (r / "results.json").write_text("{}"), "it has no parent"),
    "results are a list": (lambda r: (r / "results.json").write_text("[]"), "it should be an object"),
    "results have no sizes": (
        lambda r: edit(r / "results.json", lambda c: c["result"].pop("sizes")),
        "result has no sizes",
    ),
    "an interval is text": (
        lambda r: edit(r / "results.json", lambda c: c["parent"].update(nll="low")),
        "parent.nll is 'low', it should be an object",
    ),
    "a pair is damaged": (
        lambda r: edit(r / "results.json", lambda c: c["result"].update(paired={"p": 1})),
        "result.paired has no both",
    ),
    "a history is empty": (
        lambda r: edit(r / "results.json", lambda c: c["result"].update(stages=[])),
        "result.stages is empty",
    ),
    "the recipe is cut": (lambda r: (r / "recipe.yaml").write_text("model: ["), "recipe.yaml is not valid YAML"),
    "the recipe is a list": (lambda r: (r / "recipe.yaml").write_text("[]"), "is not a mapping"),
    "the metrics are cut": (lambda r: cut(r / "metrics.jsonl", 0.9), "metrics.jsonl, line 2, is not valid"),
    "the metrics are others": (lambda r: (r / "metrics.jsonl").write_text('{"a": 1}\n'), "it has no stage"),
    "the manifest is cut": (lambda r: cut(r / "manifest.json"), "manifest.json is not valid JSON"),
    "a stage is damaged": (lambda r: cut(stage(r, "evaluate") / "stage.json"), "stage.json is not valid JSON"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_of_a_damaged_run_gets_one_sentence(name, copy):
    damage, words = REPORTS[name]
    damage(copy[1])
    assert words in said("report", copy[1])


OWN = ["final/thesis.txt", "final-2x/a", "recipe.yaml", "results.json", "metrics.jsonl", "curve.png", "stages/mine.txt"]


@pytest.mark.parametrize("name", OWN)
def test_a_folder_with_files_of_ones_own_is_refused(name, copy, tmp_path):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert "but no run made it: name another folder with --out, or move that" in said(
        "run", copy[0], "--out", tmp_path / "mine"
    )
    assert state(tmp_path / "mine") == {Path(name): b"mine"}


def test_a_run_that_fails_leaves_what_an_earlier_one_published(copy):
    recipe, run = copy
    before = state(run)
    assert "the smallest possible is" in said("run", recipe, "prune.keep=0.001", "--out", run)
    assert state(run) == before


def test_versions_are_those_that_the_stages_were_made_with(copy):
    recipe, run = copy
    edit(stage(run, "heal") / "stage.json", lambda c: c["made_with"]["versions"].update(torch="1.0"))
    assert CliRunner().invoke(app, ["run", str(recipe), "--out", str(run)]).exit_code == 0
    versions = json.loads((run / "manifest.json").read_text())["versions"]
    assert sorted(versions["torch"].split(", ")) == sorted(["1.0", str(torch.__version__)])


@pytest.mark.parametrize("file", ["model/model.safetensors", "model/tokenizer.json", "data.jsonl"])
def test_an_edit_that_keeps_size_and_time_is_noticed(file, made, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(made[0].parent, home, ignore=shutil.ignore_patterns("run"))
    recipe = recipes.read(home / "tiny.yaml", [f"model={home / 'model'}", f"task={home / 'data.jsonl'}"])
    keys = []
    for text in (b"", b"0+1"):
        path = home / file
        if text:
            stat, content = path.stat(), path.read_bytes()
            middle = content.index(b"0+0") if b"0+0" in content else len(content) - 8
            path.write_bytes(
                content[:middle] + bytes(b ^ 1 for b in content[middle : middle + 1]) + content[middle + 1 :]
            )
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        task = make_task() if file.startswith("model") else in_tokens(recipe, make_tokenizer())
        keys.append((directory.fingerprint(recipe.model), disk.data_key(recipe, task)))
    assert keys[0] != keys[1]


def test_the_base_of_an_adapter_is_part_of_its_fingerprint(tmp_path):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"one")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    before = directory.fingerprint(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"two")
    assert directory.fingerprint(tmp_path / "adapter") != before


def test_what_killed_runs_leave_is_swept(copy):
    recipe, run = copy
    before = state(run)
    partial = run / "stages" / ".heal-0123456789"
    for folder in (partial / ".model-ab12", stage(run, "heal") / ".model-cd34", run / ".final.new", run / ".final.old"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    (run / ".results.json.partial").write_text("{")
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(run)])
    assert done.exit_code == 0, done.output
    assert state(run).keys() == before.keys()
    assert not list(run.rglob(".model-*"))


def kinds(run):
    return {p.name for p in run.iterdir() if "final" in p.name}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("dies", ["copytree", "check", "settle", "rename 1", "rename 2", "rmtree 1"])
def test_a_kill_while_publishing_leaves_a_whole_final(dies, exchange, made, tmp_path, monkeypatch):
    """Whatever the moment, and whether or not the system can exchange folders."""
    (tmp_path / "stages").mkdir()
    save = [p for p in (made[1] / "stages").iterdir() if p.name.startswith("save-")]
    directory.publish(save[0], tmp_path / "final")
    calls = []

    def killed(what, function):
        def counted(*args, **kwargs):
            calls.append(what)
            if dies in (what, f"{what} {calls.count(what)}"):
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        if not exchange:
            patch.setattr(directory, "_exchange", lambda one, other: False)
        patch.setattr(directory, "check", killed("check", directory.check))
        patch.setattr(directory, "settle", killed("settle", directory.settle))
        patch.setattr(directory.Path, "rename", killed("rename", Path.rename))
        patch.setattr(shutil, "copytree", killed("copytree", shutil.copytree))
        patch.setattr(shutil, "rmtree", killed("rmtree", shutil.rmtree))
        try:
            directory.publish(save[1], tmp_path / "final")
        except KeyboardInterrupt:
            assert exchange is False or (tmp_path / "final").exists()
    directory.sweep(tmp_path)
    checks.check(tmp_path / "final")
    directory.publish(save[1], tmp_path / "final")
    assert kinds(tmp_path) == {"final"}
    assert checks.weight_hash(tmp_path / "final") == checks.weight_hash(save[1] / "model")
