"""How OpenMP's threads should wait for each other: healing steps and decoding, alone and beside a busy process.

python eval/waiting.py OUT.json [--rounds 7] [--threads 2]

Every way to wait is a process of its own, with the environment below, in which a random model is healed for three steps
and then writes 16 tokens. They take turns, and so do "alone" and "beside": with one more process that computes without
end. Seconds are medians of one step, and of one token. torch's wheels carry libgomp, which reads GOMP_SPINCOUNT.
"load" is the system's at the start: other work makes "alone" a wish.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = {
    "as set up": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEPS, TOKENS, WIDTH, LAYERS, VOCABULARY = 3, 16, 384, 4, 4096


def child():
    """For every line of input, the seconds of one step of healing and of one token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from basis_select.data.tasks import Example, Task
    from basis_select.heal import heal

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, vocab_size=VOCABULARY))
    rows = torch.randint(3, VOCABULARY, (32, 48)).tolist()
    task = Task("random", [Example("", "", None, tuple(row), 24) for row in rows], [], [], None, 0)
    prompt = torch.tensor(rows[:1])
    how = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def timed(work, count):
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / count

    for _ in sys.stdin:
        step = timed(lambda: heal(model, task, steps=STEPS, batch_size=8, lr=1e-4), STEPS)
        print(json.dumps({"step": step, "token": timed(lambda: model.generate(prompt, **how), TOKENS)}), flush=True)


@contextlib.contextmanager
def process(command, **env):
    """A process of Python that runs while the block does."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, *command], env=clean | env, **pipes) as made:
        try:
            yield made
        finally:
            made.kill()


def measure(worker):
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help="internal: be measured")
    a = parser.parse_args()
    if a.child:
        child()
        return
    load, found = os.getloadavg()[0], {way: {"alone": [], "beside": []} for way in WAYS}
    with contextlib.ExitStack() as stack:
        workers = {}
        for way, env in WAYS.items():
            env = {"OMP_NUM_THREADS": str(a.threads), **env}
            workers[way] = stack.enter_context(process([__file__, "--child"], **env))
            measure(workers[way])  # the first compiles kernels
        for _ in range(a.rounds):
            for state in ("alone", "beside"):
                with process(["-c", "while True: pass"]) if state == "beside" else contextlib.nullcontext():
                    for way, worker in workers.items():
                        found[way][state].append(measure(worker))
                        print(state, way, found[way][state][-1], flush=True)
    result = {"threads": a.threads, "cores": os.cpu_count(), "load": load, "rounds": a.rounds}
    for way, states in found.items():
        result[way] = {
            state: {
                what: {"median": statistics.median(seconds), "longest": max(seconds)}
                for what in ("step", "token")
                for seconds in [[row[what] for row in rows]]
            }
            for state, rows in states.items()
        }
    a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
