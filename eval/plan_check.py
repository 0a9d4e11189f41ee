"""What `plan` says against what happens, FLOPs of training and peak memory of stages, and what it says of large models.

python eval/plan_check.py TASK OUT.json      TASK is a folder written by eval/prepare_data.py
python eval/plan_check.py TASK OUT.md        plans of Llama-3.1-8B and 70B

Every stage runs in a process of its own, so that its peak is its own; its FLOPs are counted in a second process,
since counting slows it down. The plans of large models are from their configs alone, with the small model's
tokenizer, which counts somewhat more tokens than theirs would.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from public_configs import SMOLLM2
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from basis_select.checkpoint.files import save
from basis_select.checkpoint.models import config_and_tokenizer, load
from basis_select.run import plan
from basis_select.run.disk import OnDisk
from basis_select.run.recipe import Recipe, override
from basis_select.system import reading
from basis_select.system.machine import peak_memory, resident_memory
from basis_select.training.cost import Flops

STAGES = ("tune", "decompose", "learn", "heal")
CHANGES = {
    "soft_labels": 0,  # the parent is in memory too
    "data.train": 400,
    "data.validation": 1,
    "data.test": 1,
    "tune.steps": 4,
    "tune.batch_size": 16,
    "decompose.examples": 32,
    "learn.steps": 4,
    "learn.batch_size": 16,
    "learn.rounds": 1,
    "learn.unpruned": 0.99,
    "heal.steps": 4,
    "heal.lr": 1e-4,
    "prune.keep": 0.25,
}


def recipe(model, task, **changes):
    return override(Recipe(model=str(model), task=str(task)), {**CHANGES, **changes}, "check")


def child(model, task, folder, stage, counting):
    """Run one stage, those before it being there, and print its FLOPs or its peak memory."""
    disk = OnDisk(recipe(model, task), folder)
    with Flops() if counting else contextlib.nullcontext() as count:
        found = disk.row(until=stage)["model"]
    facts = reading.read_json(found / "stage.json")
    print(json.dumps({"flops": count.flops if counting else None, **facts}))


def check(model, task, scratch, base):
    said = {step.name: step.cost for step in plan.plan(recipe(model, task)).steps}
    rows = {}
    for kind in ("memory", "flops"):
        folder = scratch / kind
        (folder / "stages").mkdir(parents=True)
        for stage in ("load", *STAGES):
            command = [sys.executable, __file__, str(model), str(task), "--child", str(folder), stage, kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            facts = json.loads(done.stdout.splitlines()[-1])
            if stage in STAGES:
                row = rows.setdefault(stage, {})
                key = "flops" if kind == "flops" else "peak_memory_bytes"
                row[kind] = {"measured": facts[key]}
                row["seconds"] = {"measured": facts["seconds"], "said": round(said[stage].seconds, 1)}
    for stage, row in rows.items():
        row["memory"]["said"] = base + said[stage].memory
        row["flops"]["said"] = said[stage].flops
        if stage == "decompose":  # eigenvectors are no products, sums into a moment are not seen
            del row["flops"]
        for kind in row:
            row[kind]["said / measured"] = round(row[kind]["said"] / row[kind]["measured"], 3)
        print(stage, json.dumps(row), flush=True)
    return rows


def small(tokenizer):
    """Another architecture of another shape, weights random: biases, a head of its own."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def llama(hidden, intermediate, layers, heads):
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def main(task, out):
    base = resident_memory() + plan.LIBRARIES
    tokenizer = config_and_tokenizer(SMOLLM2)[1]
    result = {"command": f"eval/plan_check.py {Path(task).name} {out.name}"}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        save(small(tokenizer), tokenizer, scratch / "qwen2-shaped")
        save(load(SMOLLM2)[0], tokenizer, scratch / "SmolLM2-135M")
        for name in ("SmolLM2-135M", "qwen2-shaped"):
            result[name] = check(scratch / name, task, scratch / f"{name}-run", base)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def plans(task, out):
    tokenizer = config_and_tokenizer(SMOLLM2)[1]
    steps = {"tune.steps": 200, "learn.steps": 0, "heal.steps": 200, "decompose.examples": 256}
    bf16 = {"tune.precision": "plus", "heal.precision": "plus", "data.train": 3000, "teacher": "bfloat16"}
    text = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in (
            ("Llama-3.1-8B", llama(4096, 14336, 32, 32)),
            ("Llama-3.1-70B", llama(8192, 28672, 80, 64)),
        ):
            folder = Path(scratch) / name
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for ranks in (1, 8):
                began = time.monotonic()
                written = plan.text(plan.plan(recipe(folder, task, **steps, **bf16), ranks))
                written = written.replace(str(folder), name).replace(str(task), Path(task).name)
                took = f"Planned in {time.monotonic() - began:.0f} s, {peak_memory() / 2**30:.1f} GiB."
                text += [
                    f"## {name}, {ranks} process{'es' if ranks > 1 else ''}",
                    "",
                    took,
                    "",
                    "```",
                    written,
                    "```",
                    "",
                ]
                out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    if "--child" in sys.argv:
        model, task, _, folder, stage, kind = sys.argv[1:]
        child(model, task, Path(folder), stage, kind == "flops")
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("task")
        parser.add_argument("out", type=Path)
        a = parser.parse_args()
        (plans if a.out.suffix == ".md" else main)(a.task, a.out)
