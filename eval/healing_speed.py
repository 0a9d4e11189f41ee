"""Healing, tokens per second and peak memory: transformers' Trainer as it is against ours, in fp32 and in bfloat16.

python eval/healing_speed.py TASK OUT.json [--runs 5] [--steps 20] [--keep 0.25] [--kinds KIND ...]

TASK is a folder written by eval/prepare_data.py. Every measurement is a process of its own and kinds alternate. "stock"
trains on the model's own loss: logits of the whole vocabulary for every token. "+ teacher" learns from the dense
parent too; stock the way a subclass of Trainer usually does it, with the divergence at every token; "+ labels" from
64 tokens for each of its own, found before ("labels": seconds for the examples of all steps). "ours mixed" is
`precision: fp32` on a machine with native bfloat16: fp32 weights, bfloat16 products. Padding does not count as tokens.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from public_configs import SMOLLM2
from transformers import Trainer, TrainerCallback, TrainingArguments

from basis_select.checkpoint.files import save
from basis_select.checkpoint.models import load
from basis_select.data.tasks import load_task
from basis_select.decompose import decompose
from basis_select.heal import heal
from basis_select.prune import prune
from basis_select.system.machine import forget_peak_memory, peak_memory, resident_memory
from basis_select.training import precision
from basis_select.training.soft_labels import SoftLabels, seen, soft_labels

KINDS = (
    "stock fp32",
    "ours fp32",
    "ours mixed",
    "ours plus",
    "stock fp32 + teacher",
    "ours plus + teacher",
    "ours plus + labels",
)
WARM = 5  # steps that are not timed: the first of each shape compiles kernels
BATCH = 16


def child(kind, folder, task, steps):
    """One healing of `kind` in this process."""
    who, dtype = kind.split()[:2]
    model, tokenizer = load(folder / "start", "float32")
    task = load_task(task, tokenizer, 0, validation=16, test=16)
    empty = resident_memory()  # libraries, data and the model before it trains
    forget_peak_memory()
    teacher = None
    if kind.endswith("teacher"):
        teacher = load(folder / "parent", "bfloat16" if dtype == "plus" else "float32")[0]
    elif kind.endswith("labels"):
        teacher = SoftLabels.load(folder / "labels")
    rows = (_stock if who == "stock" else _ours)(model, task, teacher, steps, dtype)[WARM:]
    tokens, seconds = (sum(r[key] for r in rows) for key in ("tokens", "seconds"))
    return {"tokens_per_second": tokens / seconds, "peak_bytes": peak_memory(), "bytes_before": empty}


def label(folder, task, steps):
    """Seconds that the parent takes to say what `_ours` then learns from, in this process."""
    parent, tokenizer = load(folder / "parent", "bfloat16")
    task = load_task(task, tokenizer, 0, validation=16, test=16)
    examples = [task.train[i] for i in seen(task, BATCH, steps, 1)]  # heal draws with the seed after its own
    (folder / "labels").mkdir()
    began = time.monotonic()
    soft_labels(parent, dataclasses.replace(task, train=examples)).save(folder / "labels")
    return {"seconds": time.monotonic() - began, "examples": len(examples)}


def _ours(model, task, teacher, steps, dtype):
    if dtype == "fp32":
        precision.fast_bf16 = lambda device: False
    with tempfile.TemporaryDirectory() as out:
        options = {"batch_size": BATCH, "lr": 1e-4, "precision": "plus" if dtype == "plus" else "fp32"}
        heal(model, task, teacher, out, steps=steps, kl=float(teacher is not None), **options)
        return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def _stock(model, task, teacher, steps, dtype):
    rows = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.monotonic()

        def on_step_end(self, *args, **kwargs):
            rows[-1]["seconds"] = time.monotonic() - self.began

    class Stock(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rows.append({"tokens": int(inputs["attention_mask"].sum())})
            out = model(**inputs)
            if teacher is None:
                return out.loss
            with torch.no_grad():
                target = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            divergence = F.kl_div(out.logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none")
            return out.loss + divergence.sum(-1)[inputs["labels"] >= 0].mean()

    def collate(items):
        length = max(len(e.input_ids) for e in items)
        padded = [list(e.input_ids) + [task.pad_id] * (length - len(e.input_ids)) for e in items]
        mask = [[1] * len(e.input_ids) + [0] * (length - len(e.input_ids)) for e in items]
        ids, mask = torch.tensor(padded), torch.tensor(mask)
        labels = ids.masked_fill(mask == 0, -100)
        for row, e in zip(labels, items, strict=True):
            row[: e.start] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)  # as heal leaves it
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )
        Stock(model, args, collate, task.train, callbacks=[Clock()]).train()
    return rows


def main(a):
    runs = {kind: [] for kind in a.kinds}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, tokenizer = load(SMOLLM2)
        save(model, tokenizer, folder / "parent")
        decompose(model, metric="plain", share=False)
        save(prune(model, keep=a.keep, budget="uniform"), tokenizer, folder / "start")
        del model

        def measured(kind):
            command = [sys.executable, __file__, a.task, kind, "--steps", str(a.steps), "--child", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(kind, found, flush=True)
            return found

        labels = measured("labels")
        for _ in range(a.runs):
            for kind in a.kinds:
                runs[kind].append(measured(kind))
    command = ["eval/healing_speed.py", a.task, Path(a.out).name, *sys.argv[3:]]
    result = {"command": " ".join(command), "threads": torch.get_num_threads()}
    result["labels"] = labels
    result["cpu"] = torch.backends.cpu.get_cpu_capability()
    result["native_bf16"] = precision.fast_bf16(torch.device("cpu"))
    for kind, found in runs.items():
        middle = {key: statistics.median(r[key] for r in found) for key in found[0]}
        result[kind] = {**middle, "runs": found}
    Path(a.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("out")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--child", type=Path, help="internal: measure the kind named in place of OUT")
    a = parser.parse_args()
    if a.child:
        found = label(a.child, a.task, a.steps) if a.out == "labels" else child(a.out, a.child, a.task, a.steps)
        print(json.dumps(found))
    else:
        main(a)
