import csv
import io
import json
import logging
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import addition_recipe, start_no_process, tiny
from filelock import FileLock
from kill_resume import hashes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import basis_select as bs
from basis_select.cli import app
from basis_select.publish.push import contents
from basis_select.run import recipe as recipes
from basis_select.run.disk import OnDisk
from basis_select.system import machine
from basis_select.training import engine

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A whole run on a tiny random model: addition of digits, seconds long. No test changes the file."""
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
    return addition_recipe(tmp_path_factory.mktemp("recipe"), tiny(tied=True), 12, **content)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """`(folder, what was printed, what was told of its stages)` of the whole run, made once; what changes a run changes
    a `copy`.
    """
    out, told = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("basis_select").addHandler(handler)
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(out)])
    logging.getLogger("basis_select").removeHandler(handler)
    assert result.exit_code == 0, result.output
    return out, result.output, told.getvalue()


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """A copy of the run, to go on with; the fresh process that loads what was saved was started for the first one."""
    start_no_process(monkeypatch)
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def stage_names(run):
    return [p.name.rpartition("-")[0] for p in (run / "stages").iterdir()]


@pytest.mark.slow
def test_one_command_does_it_all(whole):
    out, printed, told = whole
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["parent", "result", "plain"]
    for name, row in results.items():
        assert row["n"] == 20
        assert row["nll"]["low"] <= row["nll"]["value"] <= row["nll"]["high"]
        if name != "parent":
            assert row["sizes"]["targeted"] <= 0.4 * row["sizes"]["targeted_dense"]
            assert sum(row["paired"][k] for k in ("both", "gained", "lost", "neither")) == 20
    assert results["result"]["reloaded"] == {"bit_equal": True, "max_difference": 0.0, "hashes_match": True}
    stages = stage_names(out)
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
    assert re.search(rf"│ result +│ +{results['result']['accuracy']['value']:.1%}", printed)
    assert f"basis-select push {out} USER/NAME" in printed
    assert "decompose (result): write 8 groups of 14 layers as bases" in told


@pytest.mark.slow
def test_the_same_command_repeats_only_what_changed(recipe, copy):
    stages = stage_names(copy)
    written = {p: p.stat().st_mtime_ns for p in (copy / "stages").rglob("*")}
    again = CliRunner().invoke(app, ["run", str(recipe), "--out", str(copy)])
    assert again.exit_code == 0
    assert written == {p: p.stat().st_mtime_ns for p in (copy / "stages").rglob("*")}
    changed = CliRunner().invoke(app, ["run", str(recipe), "heal.steps=7", "compare={}", "--out", str(copy)])
    assert changed.exit_code == 0
    assert not set(stage_names(copy)) - set(stages)
    assert len(list((copy / "stages").glob("heal-*"))) == 3
    assert len(list((copy / "stages").glob("learn-*"))) == 1


@pytest.mark.slow
def test_one_learning_gives_a_family_of_checkpoints(recipe, copy):
    before = stage_names(copy)
    result = CliRunner().invoke(app, ["run", str(recipe), "sizes=[0.7, 1.5x]", "compare={}", "--out", str(copy)])
    assert result.exit_code == 0, result.output
    results = json.loads((copy / "results.json").read_text())
    assert list(results) == ["parent", "result", "result at 0.7", "result at 1.5x"]
    stages = stage_names(copy)
    assert stages.count("learn") == 1
    assert stages.count("prune") == before.count("prune") + 2
    assert stages.count("soft_labels") == 2  # what learning has seen, and what all three sizes heal on
    sizes = {name: row["sizes"] for name, row in results.items()}
    assert sizes["result at 0.7"]["targeted"] <= 0.7 * sizes["parent"]["targeted"]
    assert sizes["result at 1.5x"]["parameters"] <= sizes["parent"]["parameters"] / 1.5
    assert sizes["result"]["targeted"] < sizes["result at 1.5x"]["targeted"] < sizes["result at 0.7"]["targeted"]
    with (copy / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bytes"]) for row in rows] == sorted(s["bytes"] for s in sizes.values())
    assert (copy / "curve.png").stat().st_size > 5000
    for size in ("0.7", "1.5x"):
        assert bs.sizes(bs.load(copy / f"final-{size}")[0])["targeted"] == sizes[f"result at {size}"]["targeted"]
        card = contents(copy / f"final-{size}", "me/small")["README.md"]
        assert f"| {sizes[f'result at {size}']['bytes']:,} | {sizes['parent']['bytes']:,} |" in card
    again = CliRunner().invoke(app, ["run", str(recipe), "compare={}", "--out", str(copy)])
    assert again.exit_code == 0, again.output
    assert not [*copy.glob("final-*"), *copy.glob("curve.*")]  # of sizes that the recipe no longer names


@pytest.mark.slow
def test_every_choice_runs_through_the_pipeline(recipe, copy, tmp_path):
    """A score that needs derivatives, Basel, refinement, the embedding as bases, max_drop: what others leave out."""
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
    path = tmp_path / "every.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "compare": rows}))
    read = recipes.read(path)
    disk = OnDisk(read, copy)
    made = {n: bs.load(disk.row(row, until="heal")["model"] / "model")[0] for n, row in read.variants().items()}
    sizes = {name: bs.sizes(model) for name, model in made.items()}
    for name in ("taylor", "basel", "all"):
        assert 0.3 < sizes[name]["targeted"] / sizes[name]["targeted_dense"] <= 0.4
    assert len({s["parameters_dense"] for s in sizes.values()}) == 1
    assert sizes["all"]["parameters"] < sizes["taylor"]["parameters"]
    assert sizes["drop"]["targeted"] < sizes["drop"]["targeted_dense"]


@pytest.mark.slow
def test_inspect_and_verify(whole):
    final = whole[0] / "final"
    text = CliRunner().invoke(app, ["inspect", str(final)]).output
    assert re.search(
        r"layers.0.self_attn.k_proj +64 -> 32 +rank \d+  shares v of model.layers.0.self_attn.q_proj", text
    )
    assert f"{(final / 'model.safetensors').stat().st_size:,}" in text
    assert "bit-equal" in CliRunner().invoke(app, ["verify", str(final)]).output


@pytest.mark.slow
def test_plan(recipe):
    there = sorted(recipe.parent.rglob("*"))
    text = CliRunner().invoke(app, ["plan", str(recipe), "--processes", "4"]).output
    assert "GiB of memory a process" in text
    assert re.search(r"result: 0.0\d M targeted parameters \(2.50x fewer\)", text)
    assert sorted(recipe.parent.rglob("*")) == there


class Killed(BaseException):
    pass


STAGES = ("load", "tune", "decompose", "soft_labels", "learn", "prune", "extend", "heal")


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tune", "learn", "heal"])
def test_a_stage_stopped_in_its_middle_continues_bit_for_bit(stage, recipe, whole, copy, monkeypatch):
    for path in (copy / "stages").iterdir():
        if path.name.rpartition("-")[0] not in STAGES[: STAGES.index(stage)]:
            shutil.rmtree(path)
    read = recipes.read(recipe, ["compare={}"])
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    loss, calls = engine.task_loss, []

    def dies(model, batch, teacher=None, kl=1.0):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return loss(model, batch, teacher, kl)

    monkeypatch.setattr(engine, "task_loss", dies)
    with pytest.raises(Killed):
        OnDisk(read, copy).row(until="heal")
    partial = next((copy / "stages").glob(f".{stage}-*"))
    assert list(partial.glob("training/checkpoint-3"))
    OnDisk(read, copy).row(until="heal")
    assert set(stage_names(copy)) == set(STAGES)
    assert hashes(copy).items() <= hashes(whole[0]).items()
    calm, killed = losses(whole[0]), losses(copy)
    assert len(killed) == 3 * 6
    assert killed == calm[: len(killed)]


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
        (["prune.size=2x"], "prune: keep and size are given: give exactly one of keep, size, max_drop, mass"),
        (["prune.keep=null"], "prune: nothing says how much stays"),
        (["prune.keep=null", "prune.size=twice"], "size='twice' should read like 4x, 90M or 120MB"),
        (["prune.keep=null", "prune.mass=0.5"], "it goes with prune.budget=mass"),
        (["prune.rounding=0.1"], "prune.rounding has an effect only with prune.bits=auto"),
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
@pytest.mark.slow
def test_a_stage_does_not_start_with_what_others_have_freed():
    torch.ones(2**23 - 2**10)  # freed at once: from now on glibc keeps blocks of this size
    blocks = [torch.ones(2**18) for _ in range(512)]
    last = blocks.pop()  # stays, above the others on the heap
    blocks.clear()
    before = machine.resident_memory()
    machine.forget_peak_memory()
    assert machine.peak_memory() < before - 2**28
    assert last.sum() == 2**18
