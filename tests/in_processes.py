"""Trains what tests/test_processes.py prepared, one folder per case; under torchrun in all processes.

python in_processes.py IN OUT [--dies STEP] CASE ...
"""

import argparse
import os
import signal
from pathlib import Path

from basis_select import heal, learn, load, load_task, processes, save, tune
from basis_select.training import engine, precision

CASES = {  # what is trained, whether it is sharded, how
    "tune": (tune, "parent", True, {"steps": 8, "lr": 1e-3}),
    "learn": (learn, "weighted", False, {"steps": 8, "keep": 0.4, "rounds": 3, "multiple_of": 2}),
    "learn all": (learn, "weighted", False, {"steps": 6, "lr": 1e-3, "new": 2, "rest": True, "square": True}),
    "heal": (heal, "cut", False, {"steps": 12, "lr": 1e-3}),
    "heal sharded": (heal, "cut", True, {"steps": 12}),
    "heal all": (heal, "cut", True, {"steps": 6, "lr": 1e-3, "embeddings": True}),
    "heal few rows": (heal, "cut", True, {"steps": 6, "lr": 1e-3, "batch_size": 3}),
    "heal plus": (heal, "cut", False, {"steps": 12, "lr": 1e-3, "precision": "plus"}),
    "heal plus sharded": (heal, "cut", True, {"steps": 12, "lr": 1e-3, "precision": "plus", "checkpointing": True}),
    "heal embedding": (heal, "table", True, {"steps": 6, "lr": 1e-3}),
    "heal adapters": (heal, "cut", False, {"steps": 6, "lr": 1e-2, "lora": 2}),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--dies", type=int)
    args = parser.parse_args()
    processes.join()
    engine.SAVE_EVERY = 0.0 if args.dies is not None else 1e9
    # What differs between one process and several is then the order of fp32 sums, nothing else.
    precision.fast_bf16 = lambda device: False
    if args.dies and processes.index() == processes.count() - 1:
        engine.task_loss = dying(engine.task_loss, args.dies)
    for case in args.cases:
        if (args.out / case / "model").exists():
            continue
        verb, source, sharded, options = CASES[case]
        sharded = sharded and processes.count() > 1
        parent, tokenizer = load(args.source / "parent", sharded=sharded)
        task = load_task(str(args.source / "data.jsonl"), tokenizer, validation=10, test=20)
        model, _ = load(args.source / source, sharded=sharded)
        teacher = [] if verb is tune else [parent]
        verb(model, task, *teacher, folder=args.out / case, **{"batch_size": 6, **options})
        save(model, tokenizer, args.out / case / "model")


def dying(function, step):
    left = [step]

    def counted(*args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return counted


if __name__ == "__main__":
    main()
