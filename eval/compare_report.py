"""Tables and plot of a results file of compare.py: RESULTS.md, RESULTS.html and RESULTS.png beside it.

python eval/compare_report.py RESULTS.jsonl
"""

import functools
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from compare import read
from matplotlib.figure import Figure

from basis_select.evaluation import html
from basis_select.evaluation.accuracy import pooled
from basis_select.evaluation.figures import legend, quality, svg
from basis_select.evaluation.report import markdown

DENSE = ("parent", "trimmed", "int8", "int4")
DEFAULT = "default"
LABEL = "test NLL per response token"
CAPTIONS = (
    "NLL with its 95 % interval, methods by how many times fewer parameters the linear layers have",
    "The dense parent and its quantized weights",
    "How many bytes the default needs for the NLL of the best other row of a size",
)
EXPLANATION = (
    "All rows of a task start from the same parent and train for the same steps, at rates that each method has chosen "
    "on the validation split. An interval is a bootstrap over test items; a row is worse or better where the 95 % "
    "interval of its paired difference from the default excludes zero. Rows that also cut the embedding have fewer "
    "bytes at the same reduction. An empty cell was not run. The command writes this page from the file of results."
)


def interval(rows, against=None):
    """Pooled NLL per token of rows of one task, method and size (one row a seed): value, low, high.

    With `against` (rows of the same seeds), of the difference, item by item. 95 %, bootstrap over items.
    """
    nll, tokens = (_mean(rows, key) for key in ("nll", "tokens"))
    if against:
        nll = nll - _mean(against, "nll")
    return tuple(pooled(nll, tokens).values())


def _nll(rows):
    """What `interval` has first, without the draws that its bounds take."""
    return _mean(rows, "nll").sum() / _mean(rows, "tokens").sum()


def _mean(rows, key):
    """Of every test item, over seeds."""
    return np.mean([row[key] for row in rows], 0)


def tables(results):
    """`{task: (note, [(head, rows, align), ...])}`: methods by sizes, what is not factored, and bytes for a quality.

    *better*, *worse*: surely not the default.
    """
    cells, found = _cells(results), {}
    for task in dict.fromkeys(r["task"] for r in results):
        rows = {m: v for (t, m, s), v in cells.items() if t == task and s == 1}
        base = rows.get("parent")
        seeds = ", ".join(map(str, sorted({r["seed"] for r in results if r["task"] == task})))
        sizes = sorted({s for t, _, s in cells if t == task and s != 1})
        weights = {
            size: statistics.mode(
                round(v[0]["sizes"]["bytes"] / 1e6) for (t, _, s), v in cells.items() if (t, s) == (task, size)
            )
            for size in sizes
        }
        lines = []
        for method in dict.fromkeys(m for t, m, s in cells if t == task and s != 1):
            line = [method]
            for size in sizes:
                now, default = cells.get((task, method, size)), cells.get((task, DEFAULT, size))
                own = round(now[0]["sizes"]["bytes"] / 1e6) if now else weights[size]
                text = _cell(now, default if method != DEFAULT else None) if now else ""
                line.append(text if own == weights[size] else f"{text} at {own} MB")
            lines.append(line)
        dense = [
            [_dense(rows[method]), f"{rows[method][0]['sizes']['bytes'] / 1e6:.0f} MB", _cell(rows[method], None)]
            for method in DENSE
            if method in rows
        ]
        found[task] = (
            f"{len(base[0]['nll'])} test items, seeds {seeds}." if base else f"Seeds {seeds}.",
            [
                (["method", *(f"{s:g}x ({weights[s]} MB)" for s in sizes)], lines, "l" * (1 + len(sizes))),
                (["not factored", "bytes", "NLL"], dense, "lrl"),
                (
                    ["best other row", "NLL", "bytes", "the default needs", "so many times fewer"],
                    [line for size in sizes for line in _smaller(cells, task, size)],
                    "lrrrr",
                ),
            ],
        )
    return found


def table(results):
    """The tables as Markdown, one block per task."""
    lines = []
    for task, (note, blocks) in tables(results).items():
        lines += [f"### {task}", "", note, *(f"\n{markdown(*block)[:-1]}" for block in blocks), ""]
    return "\n".join(lines)


def summary(results, sizes=(4, 8)):
    """The NLL alone, as one Markdown table of all tasks at some sizes; models that are not factored have their own."""
    cells = _cells(results)
    columns = [(task, size) for task in dict.fromkeys(r["task"] for r in results) for size in sizes]
    columns = [(task, size) for task, size in columns if any((t, s) == (task, size) for t, _, s in cells)]
    lines = []
    for method in dict.fromkeys(r["method"] for r in results):
        found = [cells.get((task, method, 1 if method in DENSE else size)) for task, size in columns]
        if any(found):
            own = next(filter(None, found))
            name = f"{_dense(own)}, {own[0]['sizes']['bytes'] / 1e6:.0f} MB" if method in DENSE else method
            lines.append([name, *(f"{_nll(rows):.3f}" if rows else "" for rows in found)])
    return markdown(["", *(f"{task} {size}x" for task, size in columns)], lines, "l" + "r" * len(columns))


def _dense(rows):
    """The name of a row that is not factored, with what is rounded to other than its name says."""
    method, others = rows[0]["method"], defaultdict(list)
    for what, width in rows[0].get("rounded", {}).items():
        if width != method:
            others[width].append(what)
    return ", ".join([method, *(f"{' and '.join(what)} {width}" for width, what in others.items())])


def _smaller(cells, task, size):
    """The bytes at which the default, interpolated between its sizes, has the NLL of the best other row of `size`."""
    points = {
        m: (v[0]["sizes"]["bytes"] / 1e6, _nll(v))
        for (t, m, s), v in cells.items()
        if (t, s) == (task, size) and not m.startswith(DEFAULT)
    }
    own = sorted((_nll(v), v[0]["sizes"]["bytes"] / 1e6) for (t, m, s), v in cells.items() if (t, m) == (task, DEFAULT))
    if not points or not own:
        return []
    method, (weight, nll) = min(points.items(), key=lambda item: item[1][1])
    quality, bytes_ = zip(*own, strict=True)
    if nll < quality[0]:
        needs = f"more than {bytes_[0]:.0f} MB", ""
    elif nll > quality[-1]:
        needs = f"less than {bytes_[-1]:.0f} MB", f"more than {weight / bytes_[-1]:.2f}"
    else:
        needed = np.exp(np.interp(nll, quality, np.log(bytes_)))
        needs = f"{needed:.0f} MB", f"{weight / needed:.2f}"
    return [[f"{method} at {size:g}x", f"{nll:.3f}", f"{weight:.0f} MB", *needs]]


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


def series(results, task):
    """`{method: [(bytes, NLL, low, high), ...]}` of a task, for figures.quality."""
    found = defaultdict(list)
    for (t, method, _), rows in _cells(results).items():
        if t == task:
            found[method].append((rows[0]["sizes"]["bytes"], *interval(rows)))
    return found


def plot(results, path):
    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure = Figure(figsize=(5.2 * len(tasks), 5.2), layout="constrained")
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        quality(ax, series(results, task), LABEL, strong=DEFAULT)
        ax.set_title(task)
        ax.grid(alpha=0.3, which="both")
    legend(figure)
    figure.savefig(path, dpi=130)


def report(results, name):
    """The tables and plots as one HTML document."""
    sections = []
    for task, (note, blocks) in tables(results).items():
        title = f"{task}: {LABEL} against bytes of the weights"
        drawn = svg(title, functools.partial(quality, strong=DEFAULT), series(results, task), LABEL, size=(6.4, 5))
        body = [html.figures((drawn, f"{title}; left and down is better, bars are 95 % intervals."))]
        for (head, rows, align), caption in zip(blocks, CAPTIONS, strict=True):
            body.append(html.table(head, rows, align, caption))
        sections.append((task, note, body))
    sections.append(("How to read it", EXPLANATION, [html.code(f"python eval/compare_report.py {name}.jsonl")]))
    return html.page(f"basis_select: {name}", verdict(results), "", sections, [])


def verdict(results):
    """One sentence: of how many rows of other methods the default is surely better or worse at the same reduction."""
    found = []
    for task, (_, blocks) in tables(results).items():
        others = [c for method, *line in blocks[0][1] if not method.startswith(DEFAULT) for c in line if c]
        worse, better = (sum(f"*{word}*" in cell for cell in others) for word in ("worse", "better"))
        found.append(f"on {task} {worse} of {len(others)} rows of other methods are surely worse and {better} better")
    text = "; ".join(found)
    return f"Against the default at the same reduction of the linear layers, {text}."


if __name__ == "__main__":
    source = Path(sys.argv[1])
    results = read(source)
    source.with_suffix(".md").write_text(table(results), encoding="utf-8")
    source.with_suffix(".html").write_text(report(results, source.stem), encoding="utf-8")
    plot(results, source.with_suffix(".png"))
