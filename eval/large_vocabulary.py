"""A random model of Gemma 3's 270 M shape, with 262,144 tokens, tied and scaled, from trimming to exports.

python eval/large_vocabulary.py SCRATCH OUT.json [--layers N] [--width N] [--rows NAME ...]

Two rows, each in a process of its own: one is trimmed, the other keeps every token. Both are decomposed with their
tables as bases, pruned (to a sixth and to half of the parent), saved, loaded and exported. `moments` compares second
moments of the whole model with one forward and backward pass over the same tokens, in CPU seconds, since other work may
share the machine. `healing` labels 32 examples, and heals a result of half the size for two steps of 16 from the labels
and two from the parent. `--width` is the hidden size, to which other sizes follow: smaller than Gemma's 640 it shows
what a large vocabulary takes by itself. Peaks are of resident memory since the step began, the model itself included.
Rows that OUT.json has already stay.
"""

import argparse
import copy
import dataclasses
import json
import multiprocessing
import random
import shutil
import time
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

import basis_select as bs
from basis_select.checkpoint.targets import targets
from basis_select.linalg.metrics import METRICS
from basis_select.statistics.moments import second_moments
from basis_select.statistics.readers import same_input
from basis_select.system.machine import environment, forget_peak_memory, peak_memory
from basis_select.training.data import Batches
from basis_select.training.loss import response_logits

VOCABULARY = 262_144
SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TOGETHER, BATCHES = 8, 3  # examples of a batch, and batches, that moments are timed on
FORMATS = ("dense", "int8", "onnx")
HEALED = 32  # examples


def tokenizer():
    """Byte-level BPE in which words of four letters are tokens."""
    special = ["<pad>", "<bos>", "<eos>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = list(product(ascii_lowercase, repeat=2))
    merges = pairs + list(product(map("".join, pairs), repeat=2))
    merges = merges[: VOCABULARY - len(tokens)]
    tokens += map("".join, merges)
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def generate(folder, layers, width):
    """The parent, and rows of about 60 tokens, half of them the response."""
    torch.manual_seed(0)
    less = {key: SHAPE[key] * width // SHAPE["hidden_size"] // 2 * 2 for key in ("intermediate_size", "head_dim")}
    sizes = {**SHAPE, **less, "hidden_size": width, "num_hidden_layers": layers}
    config = Gemma3TextConfig(**sizes, vocab_size=VOCABULARY, eos_token_id=2)
    bs.save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tokenizer(), folder / "parent")
    draw = random.Random(0)
    words = ["".join(draw.choices(ascii_lowercase[:14], k=4)) for _ in range(4000)]
    rows = ({key: " ".join(draw.choices(words, k=15)) for key in ("prompt", "response")} for _ in range(400))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(facts, name, work, *args, **how):
    """What `work(*args, **how)` returns; its seconds and peak memory are noted under its name."""
    forget_peak_memory()
    began, used = time.perf_counter(), time.process_time()
    made = work(*args, **how)
    facts[name] = {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "peak_bytes": peak_memory(),
    }
    return made


def through(folder, trimmed):
    """The facts of one row: every step's, and bytes on disk."""
    facts, out = {}, folder / ("trimmed" if trimmed else "whole")
    pruned(facts, folder, trimmed, out)
    again, _ = step(facts, "load", bs.load, out / "saved")
    facts["sizes"] = bs.sizes(again, out / "saved")
    del again
    for to in FORMATS:
        step(facts, f"export {to}", bs.export, out / "saved", to, out / to)
        facts[f"export {to}"]["bytes"] = sum(path.stat().st_size for path in (out / to).iterdir())
    return facts


def pruned(facts, folder, trimmed, out):
    """Save the model of a row."""
    model, tokens = step(facts, "load the parent", bs.load, folder / "parent", "float32")
    task = bs.load_task(str(folder / "rows.jsonl"), tokens)
    if trimmed:
        model, tokens, facts["report"] = step(facts, "trim", bs.trim, model, tokens, task)
        task = bs.load_task(str(folder / "rows.jsonl"), tokens)
    how = {"examples": 32} if trimmed else {"metric": "plain"}
    step(facts, "decompose", bs.decompose, model, task, embedding=True, **how)
    step(facts, "prune", bs.prune, model, task, size="6x" if trimmed else "2x")
    step(facts, "save", bs.save, model, tokens, out / "saved", "bfloat16")


def moments(folder, _):
    """The facts of second moments, and of one forward and backward pass over the same tokens."""
    model, tokens = bs.load(folder / "parent", "float32")
    task = bs.load_task(str(folder / "rows.jsonl"), tokens)
    members = same_input(model, targets(model), task)
    facts = {"tokens": sum(len(e.input_ids) for e in task.train[: TOGETHER * BATCHES])}

    def passes():
        for batch in map(Batches(task.train[: TOGETHER * BATCHES], TOGETHER, BATCHES, 0).__getitem__, range(BATCHES)):
            model.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(response_logits(model, batch), batch["targets"])
            loss.backward()
        model.zero_grad(set_to_none=True)

    def look():
        second_moments(model, members, task, TOGETHER * BATCHES, METRICS["kronecker"], embedding=True)

    step(facts, "pass", passes)
    step(facts, "moments", look)
    return facts | {"times one pass": round(facts["moments"]["cpu_seconds"] / facts["pass"]["cpu_seconds"], 2)}


def healing(folder, _):
    """The facts of labels and of healing."""
    facts = {}
    parent, tokens = bs.load(folder / "parent", "float32")
    task = bs.load_task(str(folder / "rows.jsonl"), tokens)
    task = dataclasses.replace(task, train=task.train[:HEALED])
    facts["tokens"] = sum(len(e.input_ids) for e in task.train)
    model = bs.prune(bs.decompose(copy.deepcopy(parent), metric="plain"), keep=0.5)
    labels = step(facts, "soft labels", bs.soft_labels, parent, task)
    for name, teacher in (("labels", labels), ("the parent", parent)):
        step(facts, f"heal from {name}", bs.heal, model, task, teacher, steps=HEALED // 16, batch_size=16, lr=1e-4)
    return facts


def apart(work, *args):
    """What `work` returns, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


ROWS = {"moments": (moments, None), "healing": (healing, None), "trimmed": (through, True), "whole": (through, False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--width", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    a = parser.parse_args()
    if not (a.scratch / "rows.jsonl").exists():
        generate(a.scratch, a.layers, a.width)
    shape = {"layers": a.layers, "width": a.width}
    result = json.loads(a.out.read_text()) if a.out.exists() else {**environment(), **shape}
    for name in a.rows:
        work, of = ROWS[name]
        if name not in result:
            shutil.rmtree(a.scratch / name, ignore_errors=True)
            result[name] = apart(work, a.scratch, of)
            a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
