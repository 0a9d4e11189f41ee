"""Writes tables of result files into README.md and docs/, between `<!-- table: FILE -->` and `<!-- end -->`.

python eval/tables.py

`<!-- front: FILE -->` is the short table of a comparison: the parent, and three models of about the same bytes.
"""

import json
import re
from pathlib import Path

from compare import read
from compare_report import interval, summary

from basis_select.evaluation.report import markdown, table

REPO = Path(__file__).parents[1]


def healing_speed(result):
    rows = {kind: row for kind, row in result.items() if isinstance(row, dict) and "runs" in row}
    first = next(iter(rows))
    lines = [f"| healing | tokens/s, median (range) | times {first} | peak memory |", "|---|---:|---:|---:|"]
    for kind, row in rows.items():
        speeds = [r["tokens_per_second"] for r in row["runs"]]
        speed = f"{row['tokens_per_second']:.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB"
        times = row["tokens_per_second"] / rows[first]["tokens_per_second"]
        lines.append(f"| {kind} | {speed} | {times:.2f} | {memory} |")
    return "\n".join(lines) + "\n"


def plan_check(result):
    lines = ["| model | stage | TFLOP: said, counted | GiB at the peak: said, measured |", "|---|---|---|---|"]
    for model, stages in result.items():
        for stage, row in stages.items() if isinstance(stages, dict) else ():
            flops, memory = _pair(row.get("flops"), 1e12), _pair(row["memory"], 2**30)
            lines.append(f"| {model} | {stage} | {flops} | {memory} |")
    return "\n".join(lines) + "\n"


def _pair(found, unit):
    if found is None:
        return ""
    return f"{found['said'] / unit:.2f}, {found['measured'] / unit:.2f} ({found['said / measured'] - 1:+.0%})"


def runtimes(result):
    lines = ["| model, runtime | MB | decode tokens/s, median (range) | NLL | largest logit difference |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, row in result["rows"].items():
        speed = "{median:.1f} ({low:.1f} to {high:.1f})".format(**row["tokens per second"])
        difference = f"{row['largest logit difference']:.2g}"
        lines.append(f"| {name} | {row['bytes'] / 1e6:.1f} | {speed} | {row['nll']:.3f} | {difference} |")
    return "\n".join(lines) + "\n"


def bench(result):
    rows = {(r["what"], r["way"], r["model"]): r for r in result["rows"]}
    cuts = [model for model in dict.fromkeys(model for _, _, model in rows) if model != "dense"]
    lines = []
    for what, way in dict.fromkeys((what, way) for what, way, _ in rows):
        found = [rows[what, way, model] for model in cuts]
        speeds = (f"{r['times_faster']:.2f} ({r['share_of_ideal']:.0%} of {r['ideal']:.2f})" for r in found)
        lines.append([f"{what}, {way}", f"{1000 * rows[what, way, 'dense']['seconds']['median']:.0f} ms", *speeds])
    return markdown(["", "dense", *cuts], lines, "lr" + "r" * len(cuts))


def parity(result):
    lines = []
    for name, row in result["whitened, uniform"].items():
        lines.append([f"whitened, {name}", *(f"{row[size]['nll']:.3f}" for size in row), ""])
    for name, kept in result["kept by Basel's rule"].items():
        lines.append([f"Basel's rule, {name}", *[""] * (len(lines[0]) - 2), f"{kept['deployed']:.4f}"])
    sizes = next(iter(result["whitened, uniform"].values()))
    head = [f"parent {result['parent']:.3f}", *sizes, "of the dense layers left by K = 0.5"]
    return markdown(head, lines, "l" + "r" * (len(head) - 1))


FRONT = {  # at about the bytes of int4: name of the row, method and size in the results
    "parent": ("parent", 1),
    "ours, int8": ("default, int8", 2),
    "int4 of the whole model": ("int4", 1),
    "best published method, SVD-LLM": ("SVD-LLM", 8),
}


def front(results):
    tasks, lines = dict.fromkeys(r["task"] for r in results), []
    for name, which in FRONT.items():
        rows = [[r for r in results if (r["task"], r["method"], r["size"]) == (task, *which)] for task in tasks]
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*interval(found)) for found in rows]
        lines.append([name, f"{rows[0][0]['sizes']['bytes'] / 1e6:.0f} MB", *cells])
    return markdown(["model", "size", *tasks], lines, "lr" + "r" * len(tasks))


TABLES = {
    "parity": parity,
    "quickstart": table,
    "healing_speed": healing_speed,
    "healing_labels": healing_speed,
    "plan_check": plan_check,
    "runtimes": runtimes,
    "bench": bench,
}


def fill(text):
    def block(match):
        kind, source = match[1], REPO / match[2]
        if source.suffix == ".jsonl":
            lines = (front if kind == "front" else summary)(read(source))
        else:
            lines = TABLES[source.stem](json.loads(source.read_text()))
        return f"<!-- {kind}: {match[2]} -->\n{lines}<!-- end -->"

    return re.sub(r"<!-- (table|front): (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))):
        page.write_text(fill(page.read_text()))
