"""Tokens a second that vLLM decodes on the CPU, several checkpoints taking turns.

    FOLDER/bin/python eval/vllm_speed.py "dense=FOLDER" "bases=FOLDER" ... [--batches 1,8,32] [--tokens 16] [--rounds 2]
        [--dtype bfloat16]

Greedy decoding of a prompt of 16 tokens, eager, on OMP_NUM_THREADS threads. Writes
results/vllm_speed.json: the median of all rounds, and their range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "vllm_speed.json"


def measure(folder, batches, tokens, dtype):
    """`{batch: tokens a second}` of one engine, in this process."""
    from vllm import LLM, SamplingParams

    most = max(batches)
    llm = LLM(
        folder,
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=most,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
    )
    asked = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    found = {}
    for batch in batches:
        prompts = [{"prompt_token_ids": [*range(11 + i % 7, 27 + i % 7)]} for i in range(batch)]
        llm.generate(prompts[:1], asked, use_tqdm=False)
        began = time.perf_counter()
        llm.generate(prompts, asked, use_tqdm=False)
        found[batch] = batch * tokens / (time.perf_counter() - began)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="NAME=FOLDER")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no units for bfloat16")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a folder, measured in a process of its own
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.one:
        print("found", json.dumps(measure(args.one, batches, args.tokens, args.dtype)))
        return
    models, runs = dict(model.split("=", 1) for model in args.models), {}
    for _ in range(args.rounds):
        for name, folder in models.items():
            command = [
                sys.executable,
                __file__,
                "--one",
                folder,
                "--batches",
                args.batches,
                "--tokens",
                str(args.tokens),
                "--dtype",
                args.dtype,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
            runs.setdefault(name, []).append(json.loads(line.removeprefix("found ")))
            print(name, line, flush=True)
    rows = []
    for name, found in runs.items():
        size = sum(path.stat().st_size for path in Path(models[name]).glob("*.safetensors"))
        speeds = {b: sorted(run[str(b)] for run in found) for b in batches}
        told = {b: {"median": statistics.median(s), "range": [s[0], s[-1]]} for b, s in speeds.items()}
        rows.append({"model": name, "bytes": size, "tokens_per_second": told})
    threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    speed = {"threads": threads, "tokens": args.tokens, "dtype": args.dtype, "rows": rows}
    RESULTS.write_text(json.dumps(speed, indent=1) + "\n")


if __name__ == "__main__":
    main()
