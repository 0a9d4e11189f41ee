"""Trains what tests/test_processes.py prepared, one folder per case, in the processes that it starts."""

import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from conftest import start_no_process

from basis_select import cli, heal, learn, load, load_task, save, tune
from basis_select.system import processes
from basis_select.training import engine, precision

CASES = {  # what is trained, whether it is sharded, how
    "tune": (tune, "parent", True, {"steps": 8, "lr": 1e-3}),
    "learn": (learn, "weighted", False, {"steps": 8, "keep": 0.4, "rounds": 3, "multiple_of": 2}),
    "learn all": (learn, "weighted", False, {"steps": 6, "lr": 1e-3, "new": 2, "rest": True, "square": True}),
    "heal": (heal, "cut", False, {"steps": 6, "lr": 1e-3}),
    "heal sharded": (heal, "cut", True, {"steps": 6}),
    "heal all": (heal, "cut", True, {"steps": 6, "lr": 1e-3, "embeddings": True}),
    "heal few rows": (heal, "cut", True, {"steps": 6, "lr": 1e-3, "batch_size": 3}),
    "heal plus": (heal, "cut", False, {"steps": 6, "lr": 1e-3, "precision": "plus"}),
    "heal plus sharded": (heal, "cut", True, {"steps": 6, "lr": 1e-3, "precision": "plus", "checkpointing": True}),
    "heal embedding": (heal, "table", True, {"steps": 6, "lr": 1e-3}),
    "heal rounded": (heal, "rounded", False, {"steps": 8, "lr": 1e-3}),
    "heal rounded spread": (heal, "rounded", False, {"steps": 5, "sharded": True}),
    "heal rounded table plus spread": (
        heal,
        "rounded table",
        False,
        {"steps": 5, "sharded": True, "precision": "plus", "checkpointing": True},
    ),
    "heal adapters": (heal, "cut", False, {"steps": 6, "lr": 1e-2, "lora": 2}),
}
NODES = (  # which of them two nodes train, too: one of each way in which processes share their work
    "tune",
    "learn",
    "heal few rows",
    "heal plus sharded",
    "heal rounded table plus spread",
    "heal adapters",
)


def train(index, nodes, own, port, source, out, cases, dies=None):
    """Every case, in the process number `index` of all, `own` of a node's, as torchrun starts it; the last dies at step
    `dies`.
    """
    torch.set_num_threads(1)
    if nodes * own > 1:
        place(index, nodes, own, port)
    processes.join()
    engine.SAVE_EVERY = 0.0 if dies is not None else 1e9
    # What differs between one process and several is then the order of fp32 sums, nothing else.
    precision.fast_bf16 = lambda device: False
    if dies and processes.index() == processes.count() - 1:
        engine.task_loss = dying(engine.task_loss, dies)
    for case in cases:
        if (out / case / "model").exists():
            continue
        verb, start, sharded, options = CASES[case]
        sharded = sharded and processes.count() > 1
        parent, tokenizer = load(source / "parent", sharded=sharded)
        task = load_task(str(source / "data.jsonl"), tokenizer, validation=10, test=20)
        model, _ = load(source / start, sharded=sharded)
        teacher = [] if verb is tune else [parent]
        verb(model, task, *teacher, folder=out / case, **{"batch_size": 6, **options})
        save(model, tokenizer, out / case / "model")


def place(index, nodes, own, port):
    """Say where a process is, as torchrun does."""
    found = {"RANK": index, "LOCAL_RANK": index % own, "LOCAL_WORLD_SIZE": own}
    found |= {"WORLD_SIZE": nodes * own, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in found.items()}


def command(index, port, printed, arguments):
    """The command line in one of two processes; what it prints is added to a file, its status is in another."""
    torch.set_num_threads(1)
    place(index, 1, 2, port)
    start_no_process(pytest.MonkeyPatch())
    precision.fast_bf16 = lambda device: False
    sys.argv = ["basis-select", *arguments]
    with printed.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            cli.main()
        except SystemExit as end:
            printed.with_suffix(f".{index}").write_text(str(end.code or 0))


def average(index, port):
    """Gradients of three parameters, of which the loss of each of two processes depends on one or none."""
    place(index, 1, 2, port)
    processes.join()
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    (2 * parameters[index].sum()).backward()
    processes.average_gradients(parameters)
    assert [p.grad.tolist() for p in parameters] == [[1, 1], [1, 1], [0, 0]]


def dying(function, step):
    left = [step]

    def counted(*args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return counted
