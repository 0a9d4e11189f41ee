"""Several processes give what one gives: torchrun and gloo, on this machine."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import in_processes, make_tokenizer, start_no_process, tiny
from in_processes import CASES, NODES, average, command, train
from kill_resume import hashes
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessException

import basis_select as bs
from basis_select.run import pipeline
from basis_select.run import recipe as recipes
from basis_select.training import precision

HERE = Path(__file__).parent
PATHS = os.pathsep.join((str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A task, its dense model, and that model weighted, cut, cut with its embedding as bases, and with few bits."""
    folder, tokenizer = tmp_path_factory.mktemp("source"), make_tokenizer()
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b) * (1 + a % 3)} for a in range(12) for b in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = bs.load_task(str(folder / "data.jsonl"), tokenizer, validation=10, test=20)
    parent = tiny(tied=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "fast_bf16", lambda device: False)
        bs.tune(parent, task, steps=20, batch_size=8, lr=5e-3)
        weighted = bs.decompose(copy.deepcopy(parent), task, examples=16)
        cut = bs.prune(copy.deepcopy(weighted), keep=0.4, multiple_of=2)
        table = bs.decompose(copy.deepcopy(parent), task, examples=16, embedding=True)
        rounded = bs.prune(copy.deepcopy(table), task, size="4x", bits="auto")
        rounded_table = bs.prune(copy.deepcopy(weighted), size="4x", bits="auto")
        bs.prune(table, keep=0.4, keep_embedding=0.5, multiple_of=2)
    models = {"parent": parent, "weighted": weighted, "cut": cut, "table": table}
    models |= {"rounded": rounded, "rounded table": rounded_table}
    for name, model in models.items():
        bs.save(model, tokenizer, folder / name)
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def together(nodes, processes, *arguments):
    """`in_processes.train` on so many processes of so many nodes, all of them here."""
    in_processes(train, nodes, processes, free_port(), *arguments, count=nodes * processes)


def torchrun(*arguments):
    """Exit status and what was printed, of the command line on two processes, which compute in fp32."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    run += ["--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "test", "-m", "in_fp32"]
    line = [sys.executable, *run, *map(str, arguments)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    return done.returncode, done.stdout


def commanded(printed, *arguments):
    """Exit statuses of the command line on two processes as torchrun starts them, which import nothing anew; what they
    print is in the file `printed`."""
    in_processes(command, free_port(), printed, list(map(str, arguments)))
    return [int(printed.with_suffix(f".{i}").read_text()) for i in range(2)], printed.read_text()


def trained(folder):
    """Losses, metrics that are known exactly, and weights of a case."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "model" / "model.safetensors")
    return [row["loss"] for row in rows], [(row["step"], row["tokens"]) for row in rows], weights


def run_alone(rank, recipe, folder):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        start_no_process(patch)
        patch.setattr(precision, "fast_bf16", lambda device: False)
        pipeline.run(recipes.read(recipe), folder)


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """Every case in one process, in two, and in two on each of two nodes."""
    out = tmp_path_factory.mktemp("runs")
    for nodes, processes, cases in ((1, 1, CASES), (1, 2, CASES), (2, 2, NODES)):
        together(nodes, processes, source, out / f"{nodes}x{processes}", [*cases])
    return out


@pytest.mark.parametrize(("size", "case"), [*(("1x2", case) for case in CASES), *(("2x2", case) for case in NODES)])
def test_several_processes_train_as_one_does(size, case, runs):
    losses, exact, weights = trained(runs / "1x1" / case)
    theirs = trained(runs / size / case)
    narrow = "plus" in case
    assert theirs[0] == pytest.approx(losses, rel=1e-3 if narrow else 1e-6)
    assert theirs[1] == exact
    assert {n: w.shape for n, w in theirs[2].items()} == {n: w.shape for n, w in weights.items()}
    for name, w in weights.items():
        # Where rounding decides a gradient's sign, the first step of AdamW goes one rate, 1e-3, either way.
        assert w.allclose(theirs[2][name], rtol=0, atol=3e-3 if narrow else 1e-6), name


def test_a_parameter_that_the_loss_of_one_process_does_not_depend_on_has_a_gradient_of_zeros():
    in_processes(average, free_port())


def test_after_one_process_was_killed_the_same_command_ends_with_the_same_weights(source, runs, tmp_path):
    cases = ["learn", "heal plus sharded"]
    for case, steps in zip(cases, (6, 6), strict=True):
        with pytest.raises(ProcessException):
            together(1, 2, source, tmp_path, cases, steps)
        assert list((tmp_path / case / "training").glob("checkpoint-*/complete"))
        assert not (tmp_path / case / "model").exists()
    together(1, 2, source, tmp_path, cases, 0)
    for case in cases:
        (losses, exact, weights), calm = trained(tmp_path / case), trained(runs / "1x2" / case)
        assert (losses, exact) == calm[:2]
        for name, w in weights.items():
            assert w.equal(calm[2][name]), (case, name)


def test_a_recipe_has_the_same_stages_on_several_processes(source, tmp_path):
    content = {
        "model": str(source / "parent"),
        "task": str(source / "data.jsonl"),
        "data": {"test": 20, "validation": 10},
        "tune": {"steps": 4, "batch_size": 6},
        "decompose": {"examples": 16},
        "learn": {"steps": 6, "batch_size": 6, "rounds": 3},
        "prune": {"keep": 0.4, "multiple_of": 2},
        "heal": {"steps": 6, "batch_size": 6},
        "soft_labels": 16,
        "compare": {
            "taught": {"soft_labels": 0, "learn.steps": 0},
            "rounded": {"prune.keep": None, "prune.size": "5x", "prune.bits": "auto", "learn.steps": 0},
        },
    }
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(content))
    in_processes(run_alone, recipe, tmp_path / "one", count=1)
    status, printed = torchrun("run", recipe, "--shard", "--out", tmp_path / "two")
    assert status == 0, printed
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert hashes(tmp_path / "one").keys() == hashes(tmp_path / "two").keys()
    for row in ("result", "taught", "rounded"):
        assert two[row]["nll"]["value"] == pytest.approx(one[row]["nll"]["value"], rel=0.02)
        assert two[row]["sizes"] == one[row]["sizes"]
    less = ("heal.steps=0", "learn.steps=0", "compare={}")
    statuses, printed = commanded(tmp_path / "both.txt", "run", recipe, *less, "--out", tmp_path / "both")
    assert statuses == [0, 0], printed
    one, both = (next((tmp_path / name / "stages").glob("decompose-*/stage.json")) for name in ("one", "both"))
    one, both = (json.loads(path.read_text()) for path in (one, both))
    assert both["validation_nll"] == pytest.approx(one["validation_nll"], rel=1e-3)
    assert both["sizes"] == one["sizes"]
    shutil.rmtree(tmp_path / "two" / "stages")
    statuses, printed = commanded(tmp_path / "two.txt", "run", recipe, "prune.keep=7", "--out", tmp_path / "two")
    assert statuses[0] == 1
    assert printed.count("error: ") == 1
    assert "prune.keep is 7" in printed
