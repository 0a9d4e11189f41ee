"""Tables and plot of a results file of compare.py: RESULTS.md, RESULTS.html and RESULTS.png beside it.

python eval/compare_report.py RESULTS.jsonl
"""

import argparse
import functools
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from compare import read
from matplotlib.figure import Figure

from basis_select.evaluation import html
from basis_select.evaluation.accuracy import pooled, wilson
from basis_select.evaluation.figures import legend, quality, svg
from basis_select.evaluation.report import markdown

DEFAULT = "default"
LABEL = "test NLL per response token"
CAPTIONS = (
    "NLL with its 95 % interval, methods by size",
    "Test items answered rightly, with 95 % intervals",
    "The dense parent and its quantized weights",
    "How many bytes the default needs for the NLL of the best other row of a size",
)
EXPLANATION = (
    "All rows of a task start from the same parent and train on as many tokens, at rates that each method has chosen "
    "on the validation split. An interval is a bootstrap over test items; a row is worse or better where the 95 % "
    "interval of its paired difference from the default excludes zero. An empty cell was not run. The command writes "
    "this page from the file of results."
)


def comparisons(results):
    """`{title: rows}`: rows of one task that train on as many tokens, and the dense ones that do not train."""
    found = {}
    for task in dict.fromkeys(r["task"] for r in results):
        own = [r for r in results if r["task"] == task]
        for trained in sorted({r["trained"] for r in own if r["size"] or r["trained"]} or {0}):
            rows = [r for r in own if r["trained"] == trained]
            there = {r["method"] for r in rows}
            still = [r for r in own if not r["trained"] and not r["size"] and r["method"] not in there]
            how = f"trained on {trained:,} tokens" if trained else "not trained after the cut"
            found[f"{task}, {how}"] = still + rows
    return found


def interval(rows, against=None):
    """Pooled NLL per token of rows of one task, method and size (one row a seed): value, low, high.

    With `against` (rows of the same seeds), of the difference, item by item. 95 %, bootstrap over items.
    """
    nll, tokens = (_mean(rows, key) for key in ("nll", "tokens"))
    if against:
        nll = nll - _mean(against, "nll")
    return tuple(pooled(nll, tokens).values())


def nll_of(rows):
    """What `interval` has first, without the draws that its bounds take."""
    return _mean(rows, "nll").sum() / _mean(rows, "tokens").sum()


def _mean(rows, key):
    """Of every test item, over seeds."""
    return np.mean([row[key] for row in rows], 0)


def tables(results):
    """`{title: (note, [(caption, head, rows, align), ...])}` of every comparison.

    *better*, *worse*: surely not the default.
    """
    return {title: (_note(rows), _blocks(rows)) for title, rows in comparisons(results).items()}


def _note(rows):
    seeds = ", ".join(map(str, sorted({r["seed"] for r in rows})))
    return f"{len(rows[0]['nll'])} test items, seeds {seeds}."


def _blocks(rows):
    cells = _cells(rows)
    sizes = sorted({s for _, s in cells if s}, key=lambda size: -_megabytes(cells, size))
    found = []
    for caption, cell in zip(CAPTIONS, (_cell, answered), strict=False):
        lines = []
        for method in dict.fromkeys(m for m, s in cells if s):
            line = [method]
            for size in sizes:
                now, default = cells.get((method, size)), cells.get((DEFAULT, size))
                text, own = (cell(now, default if method != DEFAULT else None), _bytes(now)) if now else ("", None)
                line.append(f"{text} at {own} MB" if text and own != _megabytes(cells, size) else text)
            lines.append(line)
        if any(any(line[1:]) for line in lines):
            head = [f"{s} ({_megabytes(cells, s)} MB)" if s.endswith("x") else s for s in sizes]
            found.append((caption, ["method", *head], lines, "l" * (1 + len(sizes))))
    dense = [
        [method, f"{_bytes(own)} MB", f"{own[0]['trained']:,}", _cell(own, None), answered(own)]
        for (method, size), own in sorted(cells.items(), key=lambda cell: -cell[1][0]["sizes"]["bytes"])
        if not size
    ]
    if dense:
        found.append((CAPTIONS[2], ["not factored", "size", "tokens of training", "NLL", "right"], dense, "lrrll"))
    smaller = [line for size in sizes for line in _smaller(cells, size)]
    if smaller:
        head = ["best other row", "NLL", "size", "the default needs", "so many times fewer"]
        found.append((CAPTIONS[3], head, smaller, "lrrrr"))
    return found


def _bytes(rows):
    return round(rows[0]["sizes"]["bytes"] / 1e6)


def _megabytes(cells, size):
    """That most methods have at a size."""
    return statistics.mode(_bytes(rows) for (_, s), rows in cells.items() if s == size)


def table(results):
    """The tables as Markdown, one block per comparison."""
    lines = []
    for title, (note, blocks) in tables(results).items():
        lines += [f"### {title}", "", note]
        for _, head, rows, align in blocks:
            lines.append(f"\n{markdown(head, rows, align)[:-1]}")
        lines.append("")
    return "\n".join(lines)


def summary(results):
    """The NLL alone, as one Markdown table of all comparisons and sizes; those not factored have their own."""
    cells = {title: _cells(rows) for title, rows in comparisons(results).items()}
    columns = [(title, size) for title in cells for size in dict.fromkeys(s for _, s in cells[title] if s)]
    lines = []
    for method, dense in dict.fromkeys((r["method"], not r["size"]) for r in results):
        found = [cells[title].get((method, None if dense else size)) for title, size in columns]
        if any(found):
            name = f"{method}, {_bytes(next(filter(None, found)))} MB" if dense else method
            lines.append([name, *(f"{nll_of(rows):.3f}" if rows else "" for rows in found)])
    return markdown(["", *(f"{size}, {title}" for title, size in columns)], lines, "l" + "r" * len(columns))


def _smaller(cells, size):
    """The bytes at which the default, interpolated between its sizes, has the NLL of the best other row of `size`."""
    others = {m: v for (m, s), v in cells.items() if s == size and not m.startswith(DEFAULT)}
    points = {m: (v[0]["sizes"]["bytes"] / 1e6, nll_of(v)) for m, v in others.items()}
    own = sorted((nll_of(v), v[0]["sizes"]["bytes"] / 1e6) for (m, s), v in cells.items() if s and m == DEFAULT)
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
    return [[f"{method} at {size}", f"{nll:.3f}", f"{weight:.0f} MB", *needs]]


def _cells(rows):
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row["size"]].append(row)
    return cells


def _cell(rows, default):
    value, low, high = interval(rows)
    text = f"{value:.3f} ({low:.3f} to {high:.3f})"
    if default and len(default) == len(rows):
        _, low, high = interval(rows, default)
        text += " *worse*" if low > 0 else " *better*" if high < 0 else ""
    return text


def answered(rows, default=None):
    """The share of items that were answered rightly, those of all seeds together; nothing where none were asked."""
    correct = [c for row in rows for c in row.get("correct", [])]
    return "{value:.1%} ({low:.1%} to {high:.1%})".format(**wilson(correct)) if correct else ""


def series(rows):
    """`{method: [(bytes, NLL, low, high), ...]}` of a comparison, for figures.quality."""
    found = defaultdict(list)
    for (method, _), own in _cells(rows).items():
        found[method].append((own[0]["sizes"]["bytes"], *interval(own)))
    return found


def plot(results, path):
    found = {title: series(rows) for title, rows in comparisons(results).items()}
    names = list(dict.fromkeys(name for drawn in found.values() for name in drawn))
    figure = Figure(figsize=(5.2 * len(found), 5.2), layout="constrained")
    for ax, (title, drawn) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        quality(ax, drawn, LABEL, strong=DEFAULT, names=names)
        ax.set_title(title)
        ax.grid(alpha=0.3, which="both")
    legend(figure)
    figure.savefig(path, dpi=130)


def report(results, name):
    """The tables and plots as one HTML document."""
    sections, rows = [], comparisons(results)
    for title, (note, blocks) in tables(results).items():
        label = f"{title}: {LABEL} against bytes of the weights"
        drawn = svg(label, functools.partial(quality, strong=DEFAULT), series(rows[title]), LABEL, size=(6.4, 5))
        body = [html.figures((drawn, f"{label}; left and down is better, bars are 95 % intervals."))]
        body += [html.table(head, lines, align, caption) for caption, head, lines, align in blocks]
        sections.append((title, note, body))
    sections.append(("How to read it", EXPLANATION, [html.code(f"python eval/compare_report.py {name}.jsonl")]))
    return html.page(f"basis_select: {name}", verdict(results), "", sections, [])


def verdict(results):
    """One sentence: of how many rows of other methods the default is surely better or worse at the same size."""
    found = []
    for title, (_, blocks) in tables(results).items():
        lines = next((lines for caption, _, lines, _ in blocks if caption == CAPTIONS[0]), [])
        others = [c for method, *line in lines if not method.startswith(DEFAULT) for c in line if c]
        worse, better = (sum(f"*{word}*" in cell for cell in others) for word in ("worse", "better"))
        found.append(f"{title}: {worse} of {len(others)} rows of other methods are surely worse and {better} better")
    return f"Against the default at the same size. {'; '.join(found)}."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    source = parser.parse_args().results
    results = read(source)
    source.with_suffix(".md").write_text(table(results), encoding="utf-8")
    source.with_suffix(".html").write_text(report(results, source.stem), encoding="utf-8")
    plot(results, source.with_suffix(".png"))
