"""A dense model and what it was made into, in every runtime: bytes, memory, response NLL, first token, decoding.

python eval/runtimes.py DENSE RECIPE FOLDER OUT.json RESULT ... [--llama-cpp SOURCE] [--items N] [--tokens N]
    [--rounds N] [--threads N] [--prompts 32,128,512] [--batches 1,8,32] [--rows PATTERN]

RECIPE names the task, a RESULT is a checkpoint made from DENSE; its rows are named by its size on disk. FOLDER keeps
the exports, so that a killed run does not repeat them. In a round each row reads a prompt of each length at batch 1 and
one of a length that it has not read before, and at each batch size decodes `--tokens` tokens after prompts of 16, all
rows in turn, or those alone in whose names PATTERN is found. Each row has a process of its own, stopped while others
have their turn: threads that wait for work would take the cores from them. Needs llama-cpp-python, built for this
machine, and its source, whose converter writes the GGUF files; nncf; torchao; and the package's `export` extra.
eval/tables.py writes the table; how a row is made: runtimes_rows.py.
"""

import argparse
import contextlib
import copy
import functools
import gc
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import torch
from runtimes_rows import rows_of

from basis_select import load, load_task
from basis_select.evaluation.speed import spread, take_turns
from basis_select.run.recipe import read
from basis_select.system.machine import forget_peak_memory, resident_memory
from basis_select.system.writing import replace_text


@torch.no_grad()
def score(model, examples):
    """Nats per response token; item by item, so that padding plays no part."""
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.input_ids)[None]
        logits = model(input_ids=ids).logits[0].float()
        wanted = ids[0, example.start :, None]
        total -= logits[example.start - 1 : -1].log_softmax(-1).gather(1, wanted).double().sum().item()
        tokens += len(wanted)
    return total / tokens


def prompt(batch, length):
    return torch.arange(3, length + 3)[None].repeat(batch, 1) % 300


def reading(model, length):
    """What `take_turns` prepares and times: the first token after a prompt, at batch 1."""

    @torch.no_grad()
    def run():
        return model(input_ids=prompt(1, length)).logits[:, -1].argmax(-1)

    return lambda: run


def reading_anew(model, lengths):
    """The same, of another length every time."""
    lengths = iter(lengths)
    return lambda: reading(model, next(lengths))()


def decoding(model, batch, tokens):
    """What `take_turns` prepares and times, of anything called like a model: greedy tokens after prompts of 16."""

    @torch.no_grad()
    def prepare():
        out = model(input_ids=prompt(batch, 16))

        @torch.no_grad()
        def run():
            nonlocal out
            for _ in range(tokens):
                out = model(input_ids=out.logits[:, -1:].argmax(-1), cache=out.cache)

        return run

    return prepare


class Row:
    """A row in a process of its own, which runs while it is asked and is stopped otherwise.

    facts: its bytes and so on; runs: what it can be asked to do.
    """

    def __init__(self, name, a, examples):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=answer, args=(theirs, name, a, examples), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed
        self.facts, self.runs = self.pipe.recv()
        self.stop()

    def stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def prepare(self, what):
        """What `take_turns` prepares and times; the time is with the messages' way there and back."""
        os.kill(self.process.pid, signal.SIGCONT)
        self.pipe.send(what)
        self.pipe.recv()

        def run():
            self.pipe.send("go")
            self.pipe.recv()
            self.stop()

        return run


def answer(pipe, name, a, examples):
    """Load a row of `rows_of` and do what it is asked, in a process of its own."""
    quiet()
    torch.set_num_threads(a.threads)
    source, make, *how = rows_of(a)[name]
    forget_peak_memory()
    before, began = resident_memory(), time.perf_counter()
    model, size = make(source, a, *how)
    ready = time.perf_counter() - began
    nll = score(model, examples)
    gc.collect()
    runs = {f"first token of {n}": reading(model, n) for n in a.prompts}
    runs[f"first token of lengths unseen from {a.unseen[0]}"] = reading_anew(model, a.unseen)
    runs |= {f"decode at batch {n}": decoding(model, n, a.tokens) for n in a.batches}
    facts = {"bytes": size, "resident": resident_memory() - before, "ready in": ready, "nll": nll}
    pipe.send((facts, list(runs)))
    while True:
        prepared = runs[pipe.recv()]()
        pipe.send(None)
        pipe.recv()
        prepared()
        pipe.send(None)


def quiet():
    for name in ("torch._dynamo", "onnxruntime.quantization", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("dense", str), ("recipe", str), ("folder", Path), ("out", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--llama-cpp")
    for name, default in (("items", 32), ("tokens", 16), ("rounds", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("prompts", "32,128,512"), ("batches", "1,8,32")):
        parser.add_argument(f"--{name}", type=lambda text: [int(n) for n in text.split(",")], default=default)
    parser.add_argument("--rows", type=re.compile, default="")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.folder.mkdir(parents=True, exist_ok=True)
    recipe = read(a.recipe)
    data = copy.copy(vars(recipe.data)) | {"test": a.items}
    examples = load_task(recipe.task, load(a.dense)[1], recipe.seed, **data).test
    seen = {*a.prompts, *(len(example.input_ids) for example in examples)}
    a.longest = max(seen)
    a.unseen = [n for n in range(min(a.prompts) + 1, a.longest) if n not in seen]
    rows, runs = {}, {}
    with contextlib.ExitStack() as ended:
        for name in rows_of(a):
            row = Row(name, a, examples)
            ended.callback(row.process.kill)  # a stopped process does not end by itself
            rows[name] = row.facts
            runs |= {(name, what): functools.partial(row.prepare, what) for what in row.runs}
            print(name, json.dumps(row.facts), flush=True)
        times = take_turns(runs, a.rounds)
    for (name, what), seconds in times.items():
        batch = int(what.rpartition(" ")[2])
        found = [batch * a.tokens / s for s in seconds] if what.startswith("decode") else seconds
        rows[name][what] = spread(found)
    options = {key: getattr(a, key) for key in ("items", "tokens", "rounds", "threads", "prompts", "batches")}
    replace_text(a.out, json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    quiet()
    main()
