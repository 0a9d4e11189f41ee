"""Math, code, perplexity and the capability suite for a parent and the models made of it, paired item by item.

BASIS_SELECT_DATA=DATA python eval/full_evaluation.py OUT PARENT [LABEL=MODEL ...] [-- options of basis-select eval]

A step is one task for one model and writes OUT/LABEL/STEP.json (the parent's label is `parent`); a step whose file
is there is not measured again, so a run that was stopped continues with the same command. Code steps run programs
in the sandbox. Without BASIS_SELECT_DATA the data comes from the hub.
"""

import subprocess
import sys
import time
from pathlib import Path

DOMAINS = ("commonsense", "problem_solving", "math")
STEPS = {  # what matters most first, for whoever stops early
    "svamp_nll": ["svamp_nll"],
    "gsm_symbolic_nll": ["gsm_symbolic_nll"],
    "mbpp_zeroshot_nll": ["mbpp_zeroshot_nll"],
    "humaneval_nll": ["humaneval_nll"],
    "gsm8k_zeroshot_nll": ["gsm8k_zeroshot_nll"],
    "gsm8k_zeroshot": ["gsm8k_zeroshot", "--limit", "200"],
    "svamp": ["svamp", "--limit", "200"],
    "gsm_symbolic": ["gsm_symbolic", "--limit", "100"],
    "mbpp_zeroshot": ["mbpp_zeroshot", "--limit", "50", "--allow-code-execution"],
    "humaneval": ["humaneval", "--limit", "50", "--allow-code-execution"],
    **{f"{domain}_0_shots": [domain, "--limit", "50", "--shots", "0"] for domain in DOMAINS},
    "wikitext2": ["wikitext2"],
    "math500_nll": ["math500_nll"],
    "gsm8k": ["gsm8k", "--limit", "200"],
    "mbpp": ["mbpp", "--limit", "50", "--allow-code-execution"],
    "mbpp_nll": ["mbpp_nll"],
    **{f"{d}_{n}_shots": [d, "--limit", "50", "--shots", str(n)] for n in (1, 5) for d in DOMAINS},
}


def main(out, parent, models, options):
    failed = []
    for step, arguments in STEPS.items():
        for label, model in {"parent": parent, **models}.items():
            file = out / label / f"{step}.json"
            if file.exists():
                continue
            command = [sys.executable, "-m", "basis_select", "eval", model, "--tasks", *arguments, *options]
            command += ["--out", str(file)]
            if label != "parent":
                command += ["--against", str(out / "parent" / f"{step}.json")]
            print(f"== {label}: {step}", flush=True)
            began = time.monotonic()
            if subprocess.run(command).returncode:
                failed.append(f"{label}: {step}")
            print(f"== {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    sys.exit(f"not measured: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    out, parent, *labelled = arguments[:at]
    main(Path(out), parent, dict(item.split("=", 1) for item in labelled), arguments[at + 1 :])
