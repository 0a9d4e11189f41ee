"""Blocks of a report as HTML: plain data in, markup out. Nothing is fetched from elsewhere.

The templates beside this file write every tag and escape every text; functions here compute what they show.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SHADES = (238, 245, 252), (84, 150, 206), (8, 48, 107)  # of the heat map: nothing kept, a quarter, everything
KEY = (0, 0.05, 0.1, 0.25, 0.5, 1)  # shares of full rank that the caption of the heat map explains

_templates = Environment(
    loader=PackageLoader("basis_select.evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_templates.filters["key"] = lambda heading: re.sub(r"\W+", "-", heading.lower())
# Lines break before what is in brackets, not within it; a marked word has its own colour.
_templates.filters["parts"] = lambda text: re.split(r"(\([^)]*\)|\*(?:better|worse)\*)", text)
_blocks = _templates.get_template("blocks.html").module


def page(
    title: str,
    verdict: str,
    numbers: str,
    sections: Sequence[tuple[str, str, list[Markup]]],
    left_out: Sequence[tuple[str, str]],
) -> str:
    """A document: a sentence, a block with its numbers, `[(heading, explanation, blocks)]`, `[(heading, why not)]`."""
    style = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    return _templates.get_template("page.html").render(
        title=title, verdict=verdict, numbers=numbers, sections=sections, left_out=left_out, style=style
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str, caption: str) -> Markup:
    """A table that scrolls by itself where the page is narrow; the first cell of a row is its header.

    `align` has an l or r for every column; *better* and *worse* in a cell get their colours.
    """
    return _blocks.table(head, rows, align, caption)


def bars(head: Sequence[str], rows: Sequence[tuple], caption: str) -> Markup:
    """Bars under their numbers: rows are `(name, text, value, low, high)`, low and high None where nothing spreads."""
    longest = max(high or value for _, _, value, _, high in rows) or 1
    lines = []
    for name, text, value, low, high in rows:
        spread = None if high is None else (f"{low / longest:.2%}", f"{(high - low) / longest:.2%}")
        lines.append((name, text, f"{value / longest:.2%}", spread))
    return _blocks.bars(head, lines, caption)


def heat(modules: Iterable[Mapping], extra: Iterable[Mapping], caption: str) -> Markup:
    """Ranks as a map, a row for every layer of the model and a column for every kind of module in it.

    modules, and `extra` for what gets a row of its own: `[{name, rank (None: dense), full, leader}, ...]`, `full` the
    rank that loses nothing, `leader` the name of the module whose v this one shares, or its own where others do.
    """
    grid, alone = {}, [(module["name"], _cell(module)) for module in extra]
    for module in modules:
        found = re.fullmatch(r".*?\.(\d+)\.(.+)", module["name"])
        if found:
            grid.setdefault(int(found[1]), {})[found[2]] = _cell(module)
        else:
            alone.append((module["name"], _cell(module)))
    kinds = list(dict.fromkeys(kind for row in grid.values() for kind in row))
    above = [(name, len(list(same))) for name, same in groupby(kind.rpartition(".")[0] for kind in kinds)]
    key = [(_shade(share), f"{share:.0%}") for share in KEY]
    return _blocks.heat(above, kinds, sorted(grid.items()), alone, key, caption)


def _cell(module: Mapping) -> dict:
    """Text, note, class and style of a module's square in the heat map."""
    rank, full, leader = module["rank"], module["full"], module["leader"]
    kept = 1 if rank is None else rank / full
    note = f"{module['name']}: " + ("dense" if rank is None else f"rank {rank} of {full} ({kept:.0%})")
    if leader and rank is not None:
        note += ", its v is shared" if leader == module["name"] else f", shares v of {leader}"
    kind = "dense" if rank is None else "shared" if leader else ""
    return {"text": "dense" if rank is None else rank, "note": note, "kind": kind, "style": _shade(kept)}


def _shade(kept: float) -> str:
    """Background for a share between 0 and 1, and black or white letters, whichever contrasts more."""
    depth = 2 * min(kept, 1) ** 0.5  # most layers keep little, and differ there
    pale, deep = SHADES[:2] if depth < 1 else SHADES[1:]
    colour = [round(a + (b - a) * (depth if depth < 1 else depth - 1)) for a, b in zip(pale, deep, strict=True)]
    return f"background:rgb{tuple(colour)};color:{'#000' if luminance(colour) > 0.179 else '#fff'}"


def luminance(rgb: Sequence[int]) -> float:
    """Relative luminance (WCAG 2) of three bytes."""
    linear = [c / 12.92 if (c := byte / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for byte in rgb]
    return sum(x * w for x, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def items(summary: str, found: Sequence[Mapping[str, str]], limit: int = 40, clip: int = 2000) -> Markup:
    """Test items behind a line that opens: `[{label: text}, ...]`, at most `limit` of them, long texts cut."""
    shown = [
        {label: text if len(text) <= clip else f"{text[:clip]} […]" for label, text in item.items()}
        for item in found[:limit]
    ]
    return details(summary, _blocks.items(shown, len(found) - len(shown)))


def details(summary: str, body: Markup, opened: bool = False) -> Markup:
    """A block behind a line that opens it."""
    return _blocks.details(summary, body, opened)


def figures(*drawn: tuple[Markup, str]) -> Markup:
    """`(SVG, caption)` side by side."""
    return beside(*([_blocks.figure(svg, caption)] for svg, caption in drawn))


def beside(*columns: Sequence[Markup]) -> Markup:
    """As many columns of blocks in a line as fit."""
    return _blocks.beside(columns)


def code(text: str) -> Markup:
    """Text whose lines stay as they are."""
    return _blocks.code(text)


def facts(pairs: Iterable[tuple]) -> Markup:
    """Names and values."""
    return _blocks.facts(pairs)


def paragraph(text: str) -> Markup:
    """A sentence of its own."""
    return _blocks.paragraph(text)
