"""Runs a recipe undisturbed, then again with SIGKILL at random moments, and compares the weights of every stage.

python eval/kill_resume.py RECIPE [key=value ...] --out FOLDER [--kills 5] [--save-every 10] [--result FILE]

Exits with 1 if any stage's weights differ.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import sys
from basis_select.training import engine
engine.SAVE_EVERY = float(sys.argv.pop(1))
from basis_select.cli import main
main()
"""


def hashes(out):
    """`{stage folder: sha256 of its weights}` of the finished stages of a run."""
    return {p.parent.name: json.loads(p.read_text()).get("weights_sha256") for p in out.glob("stages/*/stage.json")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--save-every", default="10", help="seconds between checkpoints within a stage")
    parser.add_argument("--result", type=Path)
    args = parser.parse_intermixed_args()
    command = [sys.executable, "-c", PROGRAM, args.save_every, "run", args.recipe, *args.changes, "--out"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.monotonic()
    subprocess.run([*command, str(args.out / "calm")], check=True, **quiet)
    length = time.monotonic() - began
    rng, kills = random.Random(0), []
    for _ in range(args.kills):
        process = subprocess.Popen([*command, str(args.out / "killed")], start_new_session=True, **quiet)
        began = time.monotonic()
        try:
            process.wait(rng.uniform(0.2, 0.6) * length)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            stages = sorted(p.name for p in (args.out / "killed" / "stages").glob("*"))
            kills.append({"after_seconds": round(time.monotonic() - began, 1), "unfinished": stages[:1]})
    subprocess.run([*command, str(args.out / "killed")], check=True, **quiet)
    calm, killed = hashes(args.out / "calm"), hashes(args.out / "killed")
    result = {
        "command": f"eval/kill_resume.py {Path(args.recipe).name} {' '.join(args.changes)}",
        "undisturbed_seconds": round(length, 1),
        "kills": kills,
        "identical": calm == killed,
        "weights_sha256": killed,
    }
    print(json.dumps(result, indent=1))
    if args.result:
        args.result.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(calm != killed)


if __name__ == "__main__":
    main()
