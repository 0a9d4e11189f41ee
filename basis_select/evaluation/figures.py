"""Figures of the reports: painters of matplotlib axes, and SVG that takes its ink from the page around it.

Numbers in, axes painted; `svg` makes the text that goes into HTML: letters stay letters, so that they can be searched,
and axes and grid follow the page from light to dark.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
except ImportError:
    raise ValueError("reports need the eval extra: pip install 'basis-select[eval]'") from None

INK, GRID = "#010203", "#040506"  # stand for the page's own colours until `svg` puts those in
STYLE = {
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "text.parse_math": False,  # rows are named by users, who may write a $
    "svg.fonttype": "none",
}
# Each has a contrast of at least 3 with a white and with a nearly black page.
BLUE, ORANGE, GREY = "#1f77b4", "#d96b00", "#7f7f7f"
COLOURS = (BLUE, ORANGE, "#2c9f2c", "#d62728", "#9467bd", "#0f94a3", "#d055aa", "#8c6d31", GREY, "#8f9000")
COLOURS += ("#00895f", "#5566dd")
MARKERS = "osD^vP*X<>ph"
DRAWN = 250  # points of one spectrum: more cannot be told apart


def svg(title: str, paint: Callable, *data: Any, size: tuple[float, float] = (4.6, 3.3)) -> Markup:
    """One figure as an <svg> element for HTML: `paint(axes, *data)`; `title` is read to who cannot see it."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        paint(axes, *data)
        if axes.get_legend() is None:
            legend(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML knows what an <svg> is: no namespaces, which are URLs
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if given.get("id") not in used:
            given.pop("id", None)
        if "style" in given:
            style = given["style"].replace(INK, "currentColor").replace(GRID, "var(--grid)")
            given["style"] = re.sub(r"font: (\S+) [^;]+", r"font-size: \1", style)
        element.attrib.clear()
        element.attrib.update(given)
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.attrib |= {"role": "img", "aria-label": title}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def quality(
    ax: Axes,
    series: Mapping[str, Sequence[tuple]],
    label: str,
    strong: str | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Quality against bytes: `series` is `{name: [(bytes, value, low, high), ...]}`, joined where it has several.

    Logarithmic upwards where values differ much; `label` "Accuracy" is in percent. `strong` names the thicker line.
    `names` are those of all axes of a figure, so that a name looks alike on each; None where there is one axis.
    """
    values = [value for points in series.values() for _, value, _, _ in points]
    names = list(series) if names is None else names
    for name, points in series.items():
        i = names.index(name)
        bounded = [(x, y, y if low is None else low, y if high is None else high) for x, y, low, high in points]
        x, y, low, high = zip(*sorted(bounded), strict=True)
        error = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        ax.errorbar(
            [b / 1e6 for b in x],
            y,
            error,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markerfacecolor="none",  # rows of one size lie on top of each other
            markersize=7,
            capsize=3,
            linewidth=2.5 if name == strong else 1.3,
        )
    ax.set(xlabel="weight bytes (MB)", ylabel=label)
    if label == "Accuracy":
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif min(values) > 0 and max(values) > 3 * min(values):
        _log(ax)


def legend(figure: Figure) -> None:
    """One legend below all axes, in which every name is once."""
    named = {}
    for ax in figure.axes:
        named |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    columns = 3 if len(named) > 6 else 2
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize=9)


def spectrum(ax: Axes, before: Sequence[float], after: Sequence[float] | None, kept: Sequence[bool] | None) -> None:
    """Weights s of one layer's bases, largest first: as decomposed, as learned (or None), and which ones stay.

    `kept` has a truth value for every basis, or is None where that is not known.
    """
    every = sorted({round(len(before) ** (i / DRAWN)) - 1 for i in range(DRAWN + 1)})  # as dense on a log axis
    ax.plot([i + 1 for i in every], [before[i] for i in every], color=GREY, label="decomposed", linewidth=1.3)
    now = before if after is None else after
    for wanted, name, colour, marker in ((True, "kept", BLUE, "o"), (False, "removed", ORANGE, "x")):
        chosen = [i for i in every if kept is not None and kept[i] == wanted]
        if chosen:
            text = name if after is None else f"learned, {name}"
            y = [abs(now[i]) for i in chosen]
            ax.plot([i + 1 for i in chosen], y, marker, color=colour, markersize=3, label=text)
    if kept is None and after is not None:
        ax.plot([i + 1 for i in every], [abs(now[i]) for i in every], ".", color=BLUE, label="learned")
    ax.set(xlabel="basis", ylabel="weight s", xscale="log")
    ax.xaxis.set_major_formatter("{x:g}")
    _log(ax)
    ax.legend(fontsize=8, loc="lower left")


def training(ax: Axes, runs: Mapping[str, Sequence[dict]]) -> None:
    """Loss of every step, and within it the distance to the parent where there is one: `{name: metrics}`."""
    for i, (name, rows) in enumerate(runs.items()):
        steps, colour = [row["step"] for row in rows], COLOURS[i % len(COLOURS)]
        ax.plot(steps, [row["loss"] for row in rows], color=colour, label=f"{name}: loss", linewidth=1.5)
        if any(row["kl"] for row in rows):
            ax.plot(steps, [row["kl"] for row in rows], "--", color=colour, label=f"{name}: KL", linewidth=1.2)
    ax.set(xlabel="step", ylabel="nats per response token")
    ax.set_ylim(bottom=0)


def _log(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
