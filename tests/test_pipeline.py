import csv
import json
import platform
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import addition_recipe, tiny
from filelock import FileLock
from kill_resume import hashes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import basis_select as bs
from basis_select import recipe as recipes
from basis_select.checkpoint.hub import contents
from basis_select.cli import app
from basis_select.run import directory
from basis_select.run.disk import OnDisk
from basis_select.training import engine

REPO = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path):
    """A whole run on a tiny random model: addition of digits, seconds long."""
    content = {
        "data": {"test": 20, "validation": 10},
        "tune": {"steps": 6, "batch_size": 8},
        "decompose": {"examples": 16},
        "learn": {"steps": 6, "batch_size": 8, "rounds": 3},
        "prune": {"keep": 0.4, "multiple_of": 2},
        "extend": {"rank": 2},
        "heal": {"steps": 6, "batch_size": 8},
        "compare": {"plain": {"decompose.metric": "plain", "learn.steps": 0, "prune.budget": "uniform"}},
    }
    return addition_recipe(tmp_path, tiny(tied=True), 12, **content)


def test_one_command_does_it_all(recipe, tmp_path, caplog):
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(out)])
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["parent", "result", "plain"]
    for name, row in results.items():
        assert row["n"] == 20
        assert row["nll"]["low"] <= row["nll"]["value"] <= row["nll"]["high"]
        if name != "parent":
            assert row["sizes"]["targeted"] <= 0.4 * row["sizes"]["targeted_dense"]
            assert sum(row["paired"][k] for k in ("both", "gained", "lost", "neither")) == 20
    stages = sorted(p.name.rpartition("-")[0] for p in (out / "stages").iterdir())
    assert stages.count("tune") == 1  # rows share what they have in common
    assert stages.count("decompose") == stages.count("heal") == 2
    final, _ = bs.load(out / "final")
    assert bs.sizes(final, out / "final") == results["result"]["sizes"]
    stock = AutoModelForCausalLM.from_pretrained(out / "final")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(stock(ids).logits, final(ids).logits)
    for stage in (out / "stages").iterdir():
        if (stage / "model").exists():
            bs.load(stage / "model")
    assert yaml.safe_load((out / "recipe.yaml").read_text())["heal"]["kl"] == 1.0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["versions"]["torch"].startswith(torch.__version__)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 6 + 6 + 2 * 6
    assert re.search(rf"│ result +│ +{results['result']['accuracy']['value']:.1%}", result.stdout)
    assert f"basis-select push {out} USER/NAME" in result.stdout
    assert "decompose (result): write 8 groups of 14 layers as bases" in caplog.text

    written = {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*")}
    again = CliRunner().invoke(app, ["run", str(recipe), "--out", str(out)])
    assert again.exit_code == 0
    assert written == {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*")}
    changed = CliRunner().invoke(app, ["run", str(recipe), "heal.steps=7", "compare={}", "--out", str(out)])
    assert changed.exit_code == 0
    new = {p.name.rpartition("-")[0] for p in (out / "stages").iterdir()} - set(stages)
    assert not new
    assert len(list((out / "stages").glob("heal-*"))) == 3
    assert len(list((out / "stages").glob("learn-*"))) == 1


def test_one_learning_gives_a_family_of_checkpoints(recipe, tmp_path):
    out = tmp_path / "run"
    changes = ["sizes=[0.7, 1.5x]", "compare={}", "prune.multiple_of=1", "data.test=8"]
    result = CliRunner().invoke(app, ["run", str(recipe), *changes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["parent", "result", "result at 0.7", "result at 1.5x"]
    stages = [p.name.rpartition("-")[0] for p in (out / "stages").iterdir()]
    assert (stages.count("learn"), stages.count("prune")) == (1, 3)
    assert stages.count("soft_labels") == 2  # what learning has seen, and what all three sizes heal on
    sizes = {name: row["sizes"] for name, row in results.items()}
    assert sizes["result at 0.7"]["targeted"] <= 0.7 * sizes["parent"]["targeted"]
    assert sizes["result at 1.5x"]["parameters"] <= sizes["parent"]["parameters"] / 1.5
    assert sizes["result"]["targeted"] < sizes["result at 1.5x"]["targeted"] < sizes["result at 0.7"]["targeted"]
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bytes"]) for row in rows] == sorted(s["bytes"] for s in sizes.values())
    assert (out / "curve.png").stat().st_size > 5000
    for size in ("0.7", "1.5x"):
        assert bs.sizes(bs.load(out / f"final-{size}")[0])["targeted"] == sizes[f"result at {size}"]["targeted"]
        card = contents(out / f"final-{size}", "me/small")["README.md"]
        assert f"| {sizes[f'result at {size}']['bytes']:,} | {sizes['parent']['bytes']:,} |" in card


def test_every_choice_runs_through_the_pipeline(recipe, tmp_path):
    """A score that needs derivatives, Basel, refinement, the embedding as bases, max_drop: what others leave out."""
    out = tmp_path / "run"
    rows = {
        "taylor": {"prune.score": "taylor", "learn.steps": 0, "extend.init": "gradient", "teacher": "bfloat16"},
        "basel": {
            "decompose.metric": "plain",
            "decompose.share": False,
            "learn.square": True,
            "learn.new": 2,
            "learn.rest": True,
            "learn.unpruned": 0.34,
            "prune.budget": "mass",
            "prune.score": "magnitude",
            "extend.rank": 0,
            "heal.embeddings": True,
        },
        "all": {
            "decompose.metric": "whitened",
            "decompose.embedding": True,
            "prune.keep_embedding": 0.5,
            "refine.steps": 3,
            "extend.init": "residual",
        },
        "drop": {"prune.keep": None, "prune.max_drop": 0.5, "extend.rank": 0},
    }
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "compare": rows}))
    (out / "stages").mkdir(parents=True)
    read = recipes.read(recipe)
    disk = OnDisk(read, out)
    made = {n: bs.load(disk.row(row, until="heal")["model"] / "model")[0] for n, row in read.variants().items()}
    sizes = {name: bs.sizes(model) for name, model in made.items()}
    for name in ("taylor", "basel", "all"):
        assert 0.3 < sizes[name]["targeted"] / sizes[name]["targeted_dense"] <= 0.4
    assert len({s["parameters_dense"] for s in sizes.values()}) == 1
    assert sizes["all"]["parameters"] < sizes["taylor"]["parameters"]
    assert sizes["drop"]["targeted"] < sizes["drop"]["targeted_dense"]


def test_inspect_verify_and_plan(recipe, tmp_path):
    out = tmp_path / "run"
    runner = CliRunner()
    assert "GiB of memory a process" in runner.invoke(app, ["plan", str(recipe), "--processes", "4"]).output
    text = runner.invoke(app, ["plan", str(recipe)]).output
    assert re.search(r"result: 0.0\d M targeted parameters \(2.50x fewer\)", text)
    assert not out.exists()
    assert runner.invoke(app, ["run", str(recipe), "compare={}", "--out", str(out)]).exit_code == 0
    text = runner.invoke(app, ["inspect", str(out / "final")]).output
    assert re.search(
        r"layers.0.self_attn.k_proj +64 -> 32 +rank \d+  shares v of model.layers.0.self_attn.q_proj", text
    )
    assert f"{(out / 'final' / 'model.safetensors').stat().st_size:,}" in text
    assert "bit-equal" in runner.invoke(app, ["verify", str(out / "final")]).output


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["tune", "learn", "heal"])
def test_a_stage_stopped_in_its_middle_continues_bit_for_bit(stage, recipe, tmp_path, monkeypatch):
    read = recipes.read(recipe, ["compare={}"])

    def compress(read, folder):
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        OnDisk(read, folder).row(until="heal")

    compress(read, tmp_path / "calm")
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    loss, calls = engine.task_loss, []

    def dies(model, batch, teacher=None, kl=1.0):
        calls.append(1)
        if len(calls) == {"tune": 4, "learn": 10, "heal": 16}[stage]:
            raise Killed
        return loss(model, batch, teacher, kl)

    monkeypatch.setattr(engine, "task_loss", dies)
    with pytest.raises(Killed):
        compress(read, tmp_path / "killed")
    partial = next((tmp_path / "killed" / "stages").glob(f".{stage}-*"))
    assert list(partial.glob("training/checkpoint-3"))
    compress(read, tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "calm")
    a, b = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("calm", "killed"))
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (a, b)]
    assert losses[0] == losses[1]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    loss, calls = engine.task_loss, []

    def poisoned(*args):
        calls.append(1)
        parts = loss(*args)
        return [p * (float("nan") if len(calls) == 4 else 1) for p in parts]

    monkeypatch.setattr(engine, "task_loss", poisoned)
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "error: the loss became nan at step 4" in result.output
    assert (next((tmp_path / "run" / "stages").glob(".tune-*")) / "training" / "checkpoint-3" / "complete").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.yaml"], "there is no recipe at gone.yaml"),
        (["heal.step=3"], "command line: heal.step is not a recipe key; did you mean heal.steps?"),
        (["healing.steps=3"], "command line: healing.steps is not a recipe key"),
        (["prune.keep"], "'prune.keep' should read key=value, for example prune.keep=0.25"),
        (
            ["prune.keep=lots"],
            "command line: prune.keep is 'lots', it should be a fraction above 0 and up to 1",
        ),
        (["heal.steps=-1"], "command line: heal.steps is -1, it should be a whole number from 0 to 2147483647"),
        (["heal.lr=0"], "command line: heal.lr is 0, it should be a number above 0"),
        (["prune.keep=0.001"], "the smallest possible is"),
        (["prune.keep=1.5"], "prune.keep is 1.5, it should be a fraction"),
        (["prune.size=2x"], "prune names keep and size: give exactly one of keep, size, max_drop, mass"),
        (["prune.keep=null"], "prune names no size"),
        (["prune.keep=null", "prune.size=twice"], "size='twice' should read like 4x, 90M or 120MB"),
        (["prune.keep=null", "prune.mass=0.5"], "it goes with prune.budget=mass"),
        (["prune.keep_embedding=0.5"], "it goes with decompose.embedding"),
        (["prune.score=best"], "prune.score is 'best', it should be energy, magnitude, taylor or random"),
        (["extend.init=best"], "extend.init is 'best', it should be random, residual or gradient"),
        (["learn.rounds=99"], "learn.rounds=99 prunings do not fit into 6 steps of learning"),
        (["decompose.metric=cubic"], "decompose.metric is 'cubic', it should be plain, fisher, whitened or kronecker"),
        (["prune.budget=best"], "prune.budget is 'best', it should be global, uniform or mass"),
        (["dtype=int9"], "dtype is 'int9', it should be float32, bfloat16 or float16"),
        (["task=gone.jsonl"], "there is no data file at gone.jsonl"),
        (["model=./gone"], "there is no model folder at ./gone"),
        (["compare={a: {heal.stepz: 1}}"], "compare.a: heal.stepz is not a recipe key; did you mean heal.steps?"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, recipe, tmp_path):
    if arguments[0] != "gone.yaml":
        arguments = [str(recipe), *arguments]
    result = CliRunner().invoke(app, ["run", *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    error = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "run" / "final").exists()


def test_a_full_disk_is_said_and_leaves_no_half_checkpoint(recipe, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "No space" in result.output or "GB are free" in result.output
    assert [p.name.split("-")[0] for p in (tmp_path / "run" / "stages").iterdir()] == ["load"]


def test_two_runs_do_not_share_a_folder(recipe, tmp_path):
    (tmp_path / "run" / "stages").mkdir(parents=True)
    with FileLock(tmp_path / "run" / ".lock"):
        result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert "another run is using" in result.output


def test_every_recipe_is_valid_and_survives_writing():
    for path in sorted((REPO / "recipes").glob("*.yaml")):
        read = recipes.read(path)
        assert (
            recipes.override(recipes.Recipe("a", "b"), recipes._flat(yaml.safe_load(recipes.write(read)), path), "x")
            == read
        )


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators give memory back by themselves or not at all"
)
def test_a_stage_does_not_start_with_what_others_have_freed():
    torch.ones(2**23 - 2**10)  # freed at once: from now on glibc keeps blocks of this size
    blocks = [torch.ones(2**18) for _ in range(512)]
    last = blocks.pop()  # stays, above the others on the heap
    blocks.clear()
    before = directory.resident_memory()
    directory.forget_peak_memory()
    assert directory.peak_memory() < before - 2**28
    assert last.sum() == 2**18
