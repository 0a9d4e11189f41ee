"""Writes tables of result files into README.md and docs/, between `<!-- table: FILE -->` and `<!-- end -->`.

python eval/tables.py

`<!-- front: FILE -->` is the short table of a comparison at sizes on disk.
`<!-- beside: PEER -->` is how many times as fast our models are as a row of runtimes.py.
`<!-- gallery: RECIPE -->` is what a recipe has made, `<!-- quotes: RECIPE -->` what its parent and its result answer.
"""

import json
import re
import statistics
from pathlib import Path

import healing_rate
from compare import read
from compare_report import answered, interval, nll_of, summary

from basis_select.evaluation.report import HEAD, cells, markdown

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
    reads = [what for what in next(iter(result["rows"].values())) if what.startswith("first token")]
    writes = [f"decode at batch {n}" for n in result["options"]["batches"]]
    lines = []
    for name, row in result["rows"].items():
        first = (f"{1000 * row[what]['median']:.0f}" for what in reads)
        speed = ("{median:.1f} ({low:.1f} to {high:.1f})".format(**row[what]) for what in writes)
        lines.append(
            [name, *(f"{row[key] / 1e6:.0f}" for key in ("bytes", "resident")), *first, *speed, f"{row['nll']:.3f}"]
        )
    head = ["model, runtime", "MB", "resident MB", *(f"{what}, ms" for what in reads)]
    head += [*(f"{what}, tokens/s" for what in writes), "NLL"]
    return markdown(head, lines, "l" + "r" * (len(head) - 1))


BESIDE = {  # results of runtimes.py with the same options, but for the number of threads
    "AVX2, one thread": "runtimes_avx2_long",
    "AVX2, two threads": "runtimes_avx2_two_long",
    "AMX, one thread": "runtimes_long",
}


def beside(peer):
    """How many times as fast as `peer` our models are, loaded with `fast=True`."""
    lines = []
    for machine, stem in BESIDE.items():
        rows = json.loads((REPO / "eval" / "results" / f"{stem}.json").read_text())["rows"]
        theirs = next(row for name, row in rows.items() if name.endswith(peer))
        measured = [what for what, found in theirs.items() if isinstance(found, dict)]
        for name, ours in rows.items():
            if name.endswith("MB, load(fast=True)"):
                pairs = ((ours[what]["median"], theirs[what]["median"], what) for what in measured)
                times = [f"{a / b if what.startswith('decode') else b / a:.2f}" for a, b, what in pairs]
                quality = (f"{x['nll']:.3f}" for x in (ours, theirs))
                lines.append([f"{machine}, {name.split(',')[0]}", *times, *quality])
    return markdown(["CPU, our model", *measured, "NLL", f"NLL of {peer}"], lines, "l" + "r" * (len(measured) + 2))


def kernel_speed(result):
    names, cases = list(result["speeds"]), next(iter(result["speeds"].values()))
    lines = []
    for case in cases:
        ranges = [result["speeds"][name][case].values() for name in names]
        lines.append([case.replace(" 1 tokens", " 1 token"), *(f"{min(r):.1f} to {max(r):.1f}" for r in ranges)])
    return markdown(["weights, tokens at once", *names], lines, "l" + "r" * len(names))


def stage_speed(result):
    lines = []
    for row in result["stages"]:
        speed, floor = (f"{row['tokens'] / row[key]:,.0f}" for key in ("seconds", "floor"))
        name = f"{row['row']}, {row['stage'].replace('_', ' ')}"
        lines.append([name, f"{row['tokens']:,}", speed, floor, f"{row['floor'] / row['seconds']:.0%}"])
    return markdown(["stage", "tokens", "tokens/s", "tokens/s of its products", "share"], lines, "lrrrr")


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


FRONT = {  # name of the row: method and size in the results
    "parent": ("parent", None),
    "ours": ("default", "67MB"),
    "the dense parent at 4 bits": ("int4", None),
    "best published method, SVD-LLM": ("SVD-LLM", "67MB"),
    "ours, a sixth": ("default", "45MB"),
    "the dense parent at 3 bits": ("int3", None),
    "ours, a tenth": ("default", "27MB"),
}


def front(results):
    """The rows that trained longest of those of one name: answers where a task has them, or else the likelihood."""
    tasks = dict.fromkeys(r["task"] for r in sorted(results, key=lambda r: "correct" not in r))
    scored = {r["task"] for r in results if "correct" in r}
    lines = []
    for name, (method, size) in FRONT.items():
        found = [r for r in results if (r["method"], r["size"]) == (method, size)]
        found = [r for r in found if r["trained"] == max(x["trained"] for x in found)]
        sizes = sorted({f"{r['sizes']['bytes'] / 1e6:.0f}" for r in found})
        by_task = [[r for r in found if r["task"] == task] for task in tasks]
        cell = [(answered if rows[0]["task"] in scored else _nll)(rows) if rows else "" for rows in by_task]
        lines.append([name, f"{' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} MB", *cell])
    heads = [f"{task}, {'answered rightly' if task in scored else 'NLL'}" for task in tasks]
    return markdown(["", "size", *heads], lines, "lr" + "r" * len(tasks))


def _nll(rows):
    return "{:.3f} ({:.3f} to {:.3f})".format(*interval(rows))


def on_disk(results):
    """Rows of sizes on disk, largest first: what healing changed on the validation split, and the test split's NLL.

    Not every row has every seed: each is compared with the parents of its own.
    """
    cells, lines = {}, []
    parents = {(r["task"], r["seed"]): nll_of([r]) for r in results if r["method"] == "parent"}
    for r in results:
        cells.setdefault((r["task"], r["method"], r["size"], r["trained"]), []).append(r)
    for (task, method, _, trained), rows in sorted(cells.items(), key=lambda x: (x[0][0], -_size(x[1]), x[0][3])):
        healing = rows[0].get("validation_nll")
        change = f"{healing['unhealed']:.3f} to {healing['healed']:.3f}" if healing and trained else ""
        seeds = ", ".join(map(str, sorted(r["seed"] for r in rows)))
        above = statistics.fmean(nll_of([r]) - parents[r["task"], r["seed"]] for r in rows)
        above = "" if method == "parent" else f"{above:+.3f}"
        size = f"{_size(rows) / 1e6:.1f}"
        lines.append([task, method, size, f"{trained:,}", seeds, change, _nll(rows), above, answered(rows)])
    head = ["task", "model", "MB", "tokens of healing", "seeds", "validation NLL, healing", "test NLL"]
    return markdown([*head, "above its parent's", "answered rightly"], lines, "llrrrrrrr")


def _size(rows):
    return rows[0]["sizes"]["bytes"]


def forms(rows):
    """Validation NLL of every choice of forms, sizes as columns."""
    sizes = dict.fromkeys(row["size"] for row in rows)
    found = {(row["forms"], row["size"]): row["validation_nll"] for row in rows}
    lines = []
    for name in dict.fromkeys(row["forms"] for row in rows):
        values = [found[name, size] for size in sizes]
        lines.append([name, *("cannot be" if isinstance(value, str) else f"{value:.3f}" for value in values)])
    return markdown(["", *sizes], lines, "l" + "r" * len(sizes))


def sizes_speed(result):
    """Tokens a second of every form, and how many times its parent's."""
    lines, base = [], result["rows"]["parent"]["tokens_per_second"]["median"]
    for name, row in result["rows"].items():
        speed = row["tokens_per_second"]
        cells = "{median:.0f} ({low:.0f} to {high:.0f})".format(**speed), f"{speed['median'] / base:.2f}"
        lines.append([name, f"{row['bytes'] / 1e6:.1f}", *cells])
    return markdown(["model", "MB", "decode, tokens/s", "times the parent's"], lines, "lrrr")


def rounding(rows):
    """Validation NLL of every form, ways of rounding as columns."""
    ways = dict.fromkeys(row["rounding"] for row in rows)
    found = {(row["what"], row["rounding"]): f"{row['validation_nll']:.3f}" for row in rows}
    lines = [[what, *(found[what, way] for way in ways)] for what in dict.fromkeys(row["what"] for row in rows)]
    return markdown(["", *ways], lines, "l" + "r" * len(ways))


def vllm(result):
    """How far what vLLM computes is from what `load` does: the largest difference in nats."""
    rows = [(row, row["form"]) for row in result["cases"]]
    rows += [(row, f"{row['form']}, two devices") for row in result["parallel"]]
    lines = []
    for row, form in sorted(rows, key=lambda found: (found[0]["architecture"], found[1])):
        found = [row["max_difference"].get(dtype) for dtype in ("float32", "bfloat16")]
        lines.append([row["architecture"], form, *("" if value is None else f"{value:.0e}" for value in found)])
    return markdown(["architecture", "what is stored", "float32", "bfloat16"], lines, "llrr")


def vllm_speed(result):
    batches, lines = result["rows"][0]["tokens_per_second"], []
    for row in result["rows"]:
        speeds = (
            "{median:.1f} ({range[0]:.1f} to {range[1]:.1f})".format(**s) for s in row["tokens_per_second"].values()
        )
        lines.append([row["model"], f"{row['bytes'] / 1e6:.0f}", *speeds])
    return markdown(["", "MB", *(f"batch {n}, tokens/s" for n in batches)], lines, "l" + "r" * (1 + len(batches)))


def forms_by_runtime(result):
    """How far each runtime is from `load`, and below the table what it refuses."""
    forms, lines, refused = list(next(iter(result["rows"].values()))), [], {}
    for runtime, row in result["rows"].items():
        lines.append([runtime, *map(_agreement, row.values())])
        for form, found in row.items():
            if "refused" in found:
                refused.setdefault((runtime, found["refused"].split(". ")[0]), []).append(form)
    text = markdown(["", *forms], lines, "l" + "r" * len(forms))
    for (runtime, sentence), names in refused.items():
        text += f'\n{runtime}, {" and ".join(names)}: "{sentence}"\n'
    return text


def _agreement(found):
    if "refused" in found:
        return "refused"
    if not found:
        return "not measured"
    if found["max_difference"] is None:
        return "other tokens of prompts"
    difference = found["max_difference"]
    return (f"{difference:.0e}" if difference else "0") + (
        "" if found.get("same_greedy_tokens", True) else ", other tokens"
    )


def exports(result):
    """Sizes of exported files, and how far what they compute is from `load`."""
    lines = [
        [name, f"{row['bytes'] / 1e6:.1f}", _agreement(row) if "max_difference" in row else ""]
        for name, row in result["rows"].items()
    ]
    return markdown(["", "MB", "largest difference, nats"], lines, "lrr")


def gallery(run):
    """Parent, result and compared rows of a recipe, and what it took."""
    rows = []
    for name, row in run["results"].items():
        made = dict(zip(HEAD, cells(name, row), strict=True))
        rows.append([made[key] for key in ("model", "weight bytes", *HEAD[1:4], "decode tokens/s")])
    head = ["", "on disk", *HEAD[1:4], "decode tokens/s"]
    minutes = sum(stage["seconds"] for stage in run["results"]["result"]["stages"]) / 60
    text = markdown(head, rows, "lrlllr")
    text += f"\nThe result took {minutes:.0f} minutes, tuning its parent among them ({run['machine']}). "
    text += f"The training split has {run['examples']:,} examples."
    if run["other_keys"]:
        keys = " and ".join(f"`{key}`" for key in run["other_keys"])
        text += f" This was without the hub: {keys} named local copies."
    return f"{text}\n"


def quotes(run):
    lines = []
    for quote in run["quotes"]:
        prompt, right, parent, result = (f"`{quote[key].strip()}`" for key in ("prompt", "answer", "parent", "result"))
        lines.append(f"- {prompt}<br>right {right}, parent {parent}, result {result}\n")
    return "".join(lines)


TABLES = {
    "forms_by_runtime": forms_by_runtime,
    "exports": exports,
    "llama_cpp": exports,
    "vllm": vllm,
    "vllm_speed": vllm_speed,
    "parity": parity,
    "healing_speed": healing_speed,
    "healing_labels": healing_speed,
    "plan_check": plan_check,
    "runtimes": runtimes,
    "runtimes_long": runtimes,
    "runtimes_avx2": runtimes,
    "runtimes_avx2_long": runtimes,
    "runtimes_avx2_two": runtimes,
    "runtimes_avx2_two_long": runtimes,
    "runtimes_avx2_two_peers": runtimes,
    "kernel_speed": kernel_speed,
    "stage_speed": stage_speed,
    "bench": bench,
    "forms": forms,
    "sizes_speed": sizes_speed,
    "rounding": rounding,
}


def fill(text):
    def block(match):
        kind, source = match[1], REPO / match[2]
        if kind == "beside":
            lines = beside(match[2])
        elif kind == "rates":
            lines = healing_rate.table(sorted(source.glob("*.jsonl")))
        elif kind in ("gallery", "quotes"):
            runs = json.loads((REPO / "eval" / "results" / "gallery.json").read_text())
            lines = {"gallery": gallery, "quotes": quotes}[kind](runs[match[2]])
        elif source.suffix == ".jsonl":
            rows = read(source)
            lines = front(rows) if kind == "front" else summary(rows) if source.stem == "short" else on_disk(rows)
        else:
            lines = TABLES[source.stem](json.loads(source.read_text()))
        return f"<!-- {kind}: {match[2]} -->\n{lines}<!-- end -->"

    kinds = "table|front|rates|beside|gallery|quotes"
    return re.sub(rf"<!-- ({kinds}): (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))):
        page.write_text(fill(page.read_text()))
