"""Math, code, perplexity and the capability suite for a parent and the models made of it, paired item by item.

BASIS_SELECT_DATA=DATA python eval/full_evaluation.py OUT PARENT [LABEL=MODEL ...] [-- options of basis-select eval]

A step is one task for one model and writes OUT/LABEL/STEP.json (the parent's label is `parent`); a step whose file
is there is not measured again, so a run that was stopped continues with the same command. Code steps run programs
in the sandbox. Without BASIS_SELECT_DATA the data comes from the hub. OUT.md is the table of whatever is there.
"""

import subprocess
import sys
import time
from pathlib import Path

from basis_select.evaluation.report import interval, markdown
from basis_select.system.reading import read_json
from basis_select.system.writing import replace_text

DOMAINS = ("commonsense", "problem_solving", "math")
STEPS = {  # what matters most first, for whoever stops early
    "svamp_nll": ["svamp_nll"],
    "gsm_symbolic_nll": ["gsm_symbolic_nll"],
    "mbpp_zeroshot_nll": ["mbpp_zeroshot_nll"],
    "humaneval_nll": ["humaneval_nll"],
    "gsm8k_zeroshot": ["gsm8k_zeroshot", "--limit", "200"],
    "svamp": ["svamp", "--limit", "200"],
    "gsm_symbolic": ["gsm_symbolic", "--limit", "100"],
    "mbpp_zeroshot": ["mbpp_zeroshot", "--limit", "50", "--allow-code-execution"],
    "humaneval": ["humaneval", "--limit", "50", "--allow-code-execution"],
    **{f"{domain}_0_shots": [domain, "--limit", "50", "--shots", "0"] for domain in DOMAINS},
    "gsm8k_zeroshot_nll": ["gsm8k_zeroshot_nll"],
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
    replace_text(out.with_suffix(".md"), table(out, models))
    sys.exit(f"not measured: {', '.join(failed)}" if failed else 0)


def table(out, labels):
    """Every measure of the parent beside that of each model made of it, and its items that were gained and lost."""
    text, forms = "", {"accuracy": ".1%", "nll": ".3f", "perplexity": ".2f", "repetition": ".1%", "empty": ".1%"}
    for label in labels:
        rows = []
        for step in STEPS:
            if not (file := out / label / f"{step}.json").exists():
                continue
            report = read_json(file)
            parent = report["against"]
            for name, result in report["tasks"].items():
                if name.endswith("_nll") and not step.endswith("_nll"):
                    continue  # of the few items that text was generated for: there is a step for all
                paired = report["paired"][name]
                changed = f"{paired['gained']} / {paired['lost']} ({paired['p']:.2g})" if "p" in paired else ""
                of = f"{result['n']:,} of {result['of']:,}"
                about = f"{name}, {result['shots']} shots" if result.get("shots") is not None else name
                for key, form in forms.items():
                    found = [r[key] for r in (parent["tasks"][name], result) if r.get(key)]
                    told = name == "wikitext2" or key != "perplexity"
                    if told and any(x["value"] for x in found):
                        pair = changed if key == "accuracy" else ""
                        rows.append([about, of, key, *(interval(x, form) for x in found), pair])
            for domain, mean in report["domains"].items():
                about = f"mean of {domain.replace('_', ' ')}, {report['settings']['shots']} shots"
                rows.append(
                    [about, "", "accuracy", interval(parent["domains"][domain], ".1%"), interval(mean, ".1%"), ""]
                )
        head = ["task", "items", "measure", "parent", label, "gained / lost (p)"]
        text += markdown(head, rows, "lrlrrr") + "\n"
    return text


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    out, parent, *labelled = arguments[:at]
    main(Path(out), parent, dict(item.split("=", 1) for item in labelled), arguments[at + 1 :])
