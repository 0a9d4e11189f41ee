"""Memory and time that `decompose_checkpoint` takes on a llama-shaped random model of 3 B parameters, plain metric.

python eval/decompose_memory.py SCRATCH OUT.json [--layers N] [--keep FRACTION]

SCRATCH receives the generated checkpoint (6.4 GB, bfloat16, shards of at most 1.5 GB; kept for the next call) and the
result (removed). Only the first N decoder layers are decomposed (default: all 28), all tensors pass through. The
peak is the kernel's VmHWM of a fresh process; of it, RssAnon is sampled: the rest are pages of mapped files, which the
kernel takes back at will. Time is that of one decoder layer, against LAPACK's `eigh` of the same matrices alone; mind
the CPU seconds where the machine is not idle.
"""

import argparse
import json
import multiprocessing
import shutil
import threading
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from basis_select import decompose_checkpoint, stream
from basis_select.checkpoint.targets import targets
from basis_select.decompose import factored
from basis_select.layers.group import Group
from basis_select.linalg.metrics import METRICS
from basis_select.system.machine import forget_peak_memory, linux_memory, peak_memory, resident_memory

SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def on_meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)


def shard_sizes(folder):
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


def generate(folder):
    """A checkpoint of random weights, made shard by shard."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model = on_meta()
    model.config.save_pretrained(partial)
    tensors = stream._tensors(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size="1.5GB"
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: torch.empty(tensors[name].shape, dtype=torch.bfloat16).normal_(0, 0.02) for name in names}
        save_file(shard, partial / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, merges=[])), eos_token="a").save_pretrained(
        partial
    )
    partial.rename(folder)


def measured(source, out, layers, keep, send):
    """Decompose, in a process of its own; sends the figures."""
    chosen = {f"layers.{i}" for i in range(layers)}
    stream.targets = lambda model: {n: m for n, m in targets(model).items() if ".".join(n.split(".")[1:3]) in chosen}
    work, groups = stream.factored, []

    def noted(dense, *args):
        groups.append({"names": dense.names, "size": (sum(dense.shape.outputs), dense.shape.inputs)})
        return work(dense, *args)

    stream.factored = noted
    anonymous, done = [], threading.Event()

    def sample():
        while not done.wait(0.02):
            anonymous.append(linux_memory("RssAnon"))

    before = resident_memory()
    forget_peak_memory()
    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    decompose_checkpoint(source, out, metric="plain", keep=keep, max_shard_size="1.5GB")
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    send.send(
        {
            "resident_before": before,
            "peak_resident": peak_memory(),
            "peak_anonymous": max(anonymous),
            "seconds": seconds,
            "groups": groups,
        }
    )


def against_lapack(source, groups):
    """CPU seconds, and seconds, of `factored` on these groups and of `eigh` alone on their matrices, taking turns."""
    files, found = stream._files(source), {}

    def timed(name, work):
        began, used = time.perf_counter(), time.process_time()
        work()
        for kind, spent in (("cpu_", time.process_time() - used), ("", time.perf_counter() - began)):
            found[f"{name}_{kind}seconds"] = found.get(f"{name}_{kind}seconds", 0) + spent

    for group in groups:
        linears = []
        for name in group["names"]:
            weight = stream._read(files, f"{name}.weight")
            linears.append(torch.nn.Linear(*weight.T.shape, bias=False, device="meta"))
            linears[-1].weight = torch.nn.Parameter(weight, requires_grad=False)
        w = torch.cat([m.weight for m in linears]).double()
        gram = w @ w.T if len(w) < w.shape[1] else w.T @ w
        timed("eigh_alone", lambda gram=gram: torch.linalg.eigh(gram))
        with torch.no_grad():
            timed("decompose", lambda g=group, m=linears: factored(Group(g["names"], m), None, METRICS["plain"]))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--keep", type=float)
    args = parser.parse_args()
    source, made = args.scratch / "llama-3b", args.scratch / "decomposed"
    context = multiprocessing.get_context("spawn")
    if not source.exists():
        child = context.Process(target=generate, args=(source,))
        child.start()
        child.join()
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=measured, args=(source, made, args.layers, args.keep, send))
    child.start()
    send.close()
    found = receive.recv()
    child.join()
    shards = {"in": shard_sizes(source), "out": shard_sizes(made)}
    shutil.rmtree(made)
    groups = found.pop("groups")
    # Weight and u, eigenvectors and a copy of them, in float64.
    workspace = max(16 * (rows * columns + min(rows, columns) ** 2) for rows, columns in (g["size"] for g in groups))
    largest = max(shards["in"])
    result = {
        "parameters": on_meta().num_parameters(),
        "layers_decomposed": args.layers,
        "keep": args.keep,
        "bytes_in": sum(shards["in"]),
        "bytes_out": sum(shards["out"]),
        "largest_shard": largest,
        "workspace": workspace,
        **found,
        "peak_over_shard_and_workspace": found["peak_resident"] / (largest + workspace),
        "peak_within_aim": found["peak_resident"] < 1.3 * largest + workspace,
        "one_layer": against_lapack(source, groups[:4]),
        "threads": torch.get_num_threads(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
