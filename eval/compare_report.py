"""Table and plot of a results file of compare.py: RESULTS.md and RESULTS.png beside it.

python eval/compare_report.py RESULTS.jsonl
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from compare import read

mpl.use("Agg")
import matplotlib.pyplot as plt

DENSE = ("parent", "int8", "int4")
DEFAULT = "default"


def interval(rows, against=None, draws=2000):
    """Pooled NLL per token of rows of one task, method and size (one row a seed): value, low, high.

    With `against` (rows of the same seeds), of the difference, item by item. 95 %, bootstrap over items.
    """
    rng = np.random.default_rng(0)
    nll, tokens = (np.mean([r[k] for r in rows], 0) for k in ("nll", "tokens"))
    if against:
        nll = nll - np.mean([r["nll"] for r in against], 0)
    picks = rng.integers(len(nll), size=(draws, len(nll)))
    means = nll[picks].sum(1) / tokens[picks].sum(1)
    return nll.sum() / tokens.sum(), *np.quantile(means, [0.025, 0.975])


def table(results):
    """One block per task: rows are methods, columns sizes; *better*, *worse*: surely not the default."""
    cells = _cells(results)
    lines = []
    for task in dict.fromkeys(r["task"] for r in results):
        rows = {m: v for (t, m, s), v in cells.items() if t == task and s == 1}
        base = rows.get("parent")
        seeds = sorted({r["seed"] for r in results if r["task"] == task})
        lines += [f"### {task}", ""]
        if base:
            lines.append(f"{len(base[0]['nll'])} test items, seeds {', '.join(map(str, seeds))}.")
        sizes = sorted({s for t, _, s in cells if t == task and s != 1})
        weights = {
            size: statistics.mode(
                round(v[0]["sizes"]["bytes"] / 1e6) for (t, _, s), v in cells.items() if (t, s) == (task, size)
            )
            for size in sizes
        }
        lines += ["", f"| method | {' | '.join(f'{s:g}x ({weights[s]} MB)' for s in sizes)} |"]
        lines.append("|---|" + "---|" * len(sizes))
        for method in dict.fromkeys(m for t, m, s in cells if t == task and s != 1):
            line = []
            for size in sizes:
                found, default = cells.get((task, method, size)), cells.get((task, DEFAULT, size))
                own = round(found[0]["sizes"]["bytes"] / 1e6) if found else weights[size]
                text = _cell(found, default if method != DEFAULT else None) if found else ""
                line.append(text if own == weights[size] else f"{text} at {own} MB")
            lines.append(f"| {method} | {' | '.join(line)} |")
        lines += ["", "| not factored | bytes | NLL |", "|---|---:|---|"]
        for method in DENSE:
            if method in rows:
                size = rows[method][0]["sizes"]["bytes"]
                lines.append(f"| {method} | {size / 1e6:.0f} MB | {_cell(rows[method], None)} |")
        lines += [
            "",
            "| best other row | NLL | bytes | the default needs | so many times fewer |",
            "|---|---:|---:|---:|---:|",
        ]
        for size in sizes:
            lines += _smaller(cells, task, size)
        lines.append("")
    return "\n".join(lines)


def _smaller(cells, task, size):
    """The bytes at which the default, interpolated between its sizes, has the NLL of the best other row of `size`."""
    points = {
        m: (v[0]["sizes"]["bytes"] / 1e6, interval(v)[0])
        for (t, m, s), v in cells.items()
        if (t, s) == (task, size) and not m.startswith(DEFAULT)
    }
    own = sorted(
        (interval(v)[0], v[0]["sizes"]["bytes"] / 1e6) for (t, m, s), v in cells.items() if (t, m) == (task, DEFAULT)
    )
    if not points or not own:
        return []
    method, (weight, nll) = min(points.items(), key=lambda item: item[1][1])
    quality, bytes_ = zip(*own, strict=True)
    if nll < quality[0]:
        needs = f"more than {bytes_[0]:.0f} MB |"
    elif nll > quality[-1]:
        needs = f"less than {bytes_[-1]:.0f} MB | more than {weight / bytes_[-1]:.2f}"
    else:
        needed = np.exp(np.interp(nll, quality, np.log(bytes_)))
        needs = f"{needed:.0f} MB | {weight / needed:.2f}"
    return [f"| {method} at {size:g}x | {nll:.3f} | {weight:.0f} MB | {needs} |"]


def _cells(results):
    cells = defaultdict(list)
    for row in results:
        cells[row["task"], row["method"], row["size"]].append(row)
    return cells


def _cell(rows, default):
    value, low, high = interval(rows)
    text = f"{value:.3f} ({low:.3f} to {high:.3f})"
    if default and len(default) == len(rows):
        _, low, high = interval(rows, default)
        text += " *worse*" if low > 0 else " *better*" if high < 0 else ""
    return text


def plot(results, path):
    cells = _cells(results)
    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4.4), squeeze=False, layout="constrained")
    methods = list(dict.fromkeys(r["method"] for r in results))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors, strict=False))
    for ax, task in zip(axes[0], tasks, strict=True):
        for method in methods:
            points = sorted(
                (v[0]["sizes"]["bytes"] / 1e6, *interval(v))
                for (t, m, _), v in cells.items()
                if (t, m) == (task, method)
            )
            if not points:
                continue
            x, y, low, high = map(np.array, zip(*points, strict=True))
            style = {"marker": "s", "linestyle": "none"} if method in DENSE else {"marker": "o"}
            if method == DEFAULT:
                style |= {"linewidth": 2.5}
            ax.errorbar(
                x, y, [y - low, high - y], label=method, capsize=2, markersize=4, color=colours[method], **style
            )
        ax.set(title=task, xlabel="weight bytes (MB)", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("test NLL per response token")
    labelled = {}
    for ax in axes[0]:
        labelled |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(labelled.values(), labelled.keys(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    results = read(source)
    source.with_suffix(".md").write_text(table(results), encoding="utf-8")
    plot(results, source.with_suffix(".png"))
