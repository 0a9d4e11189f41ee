"""Blocks of a report as HTML: plain data in, a string out, every text escaped. Nothing is fetched from elsewhere."""

import re
from html import escape
from pathlib import Path

SHADES = (238, 245, 252), (84, 150, 206), (8, 48, 107)  # of the heat map: nothing kept, a quarter, everything


class Raw(str):
    """HTML that is not escaped again."""


def page(title, verdict, numbers, sections, left_out):
    """A document: a sentence, HTML with its numbers, `[(heading, explanation, HTML)]`, `[(heading, why left out)]`."""
    parts, links = [], []
    for heading, explanation, body in sections:
        key = re.sub(r"\W+", "-", heading.lower())
        links.append(f'<li><a href="#{key}">{escape(heading)}</a></li>')
        parts.append(
            f'<section id="{key}"><h2>{escape(heading)}</h2><p class="why">{_text(explanation)}</p>{body}</section>'
        )
    if left_out:
        rest = "".join(f"<li><b>{escape(heading)}</b>: {escape(why)}</li>" for heading, why in left_out)
        parts.append(f'<section id="left-out"><h2>Left out</h2><ul>{rest}</ul></section>')
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="verdict">{_text(verdict)}</p>{numbers}</header>'
        f'<nav aria-label="sections"><ul>{"".join(links)}</ul></nav><main>{"".join(parts)}</main></body></html>\n'
    )


def table(head, rows, align, caption):
    """A table that scrolls by itself where the page is narrow; the first cell of a row is its header."""
    top = "".join(f'<th scope="col" class="{a}">{_text(text)}</th>' for text, a in zip(head, align, strict=True))
    lines = []
    for first, *rest in rows:
        cells = "".join(f'<td class="{a}">{unbroken(text)}</td>' for text, a in zip(rest, align[1:], strict=True))
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    return _scrolling(
        f"<table><caption><span>{_text(caption)}</span></caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>",
        caption,
    )


def bars(head, rows, caption):
    """Bars under their numbers: rows are `(name, text, value, low, high)`, low and high None where nothing spreads."""
    longest = max(high or value for _, _, value, _, high in rows) or 1
    lines = []
    for name, text, value, low, high in rows:
        spread = "" if high is None else f'<i style="left:{low / longest:.2%};width:{(high - low) / longest:.2%}"></i>'
        bar = f'<span class="bar" aria-hidden="true"><b style="width:{value / longest:.2%}"></b>{spread}</span>'
        lines.append([name, Raw(f"{escape(text)}{bar}")])
    return f'<div class="bars">{table(head, lines, "ll", caption)}</div>'


def heat(modules, extra, caption):
    """Ranks as a map, a row for every layer of the model and a column for every kind of module in it.

    modules, and `extra` for what gets a row of its own: `[{name, rank (None: dense), full, leader}, ...]`, `full` the
    rank that loses nothing, `leader` the name of the module whose v this one shares, or its own where others do.
    """
    grid, alone = {}, list(extra)
    for module in modules:
        found = re.fullmatch(r".*?\.(\d+)\.(.+)", module["name"])
        if found:
            grid.setdefault(int(found[1]), {})[found[2]] = module
        else:
            alone.append(module)
    kinds = list(dict.fromkeys(kind for row in grid.values() for kind in row))
    above = [kind.rpartition(".")[0] for kind in kinds]
    top, i = "", 0
    while i < len(kinds):
        same = next((j for j in range(i, len(kinds)) if above[j] != above[i]), len(kinds)) - i
        top += f'<th scope="colgroup" colspan="{same}">{escape(above[i])}</th>'
        i += same
    names = "".join(f'<th scope="col">{_short(kind)}</th>' for kind in kinds)
    lines = []
    for layer, row in sorted(grid.items()):
        cells = "".join(_cell(row[kind]) if kind in row else "<td></td>" for kind in kinds)
        lines.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
    for module in alone:
        lines.append(f'<tr><th scope="row">{_short(module["name"])}</th>{_cell(module, len(kinds))}</tr>')
    key = "".join(f'<span style="{_shade(x)}">{x:.0%}</span>' for x in (0, 0.05, 0.1, 0.25, 0.5, 1))
    return _scrolling(
        f'<table class="heat"><caption><span>{_text(caption)}: <b class="key">{key}</b> of full rank</span></caption>'
        f'<thead><tr><th scope="col" rowspan="2">layer</th>{top}</tr><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>",
        caption,
    )


def _short(name):
    return escape(name.rpartition(".")[2]).replace("_", "_<wbr>")


def _cell(module, span=1):
    rank, full, leader = module["rank"], module["full"], module["leader"]
    kept = 1 if rank is None else rank / full
    note = f"{module['name']}: " + ("dense" if rank is None else f"rank {rank} of {full} ({kept:.0%})")
    if leader and rank is not None:
        note += ", its v is shared" if leader == module["name"] else f", shares v of {leader}"
    kind = ("dense " if rank is None else "") + ("shared" if leader and rank is not None else "")
    text = "dense" if rank is None else str(rank)
    width = f' colspan="{span}"' if span > 1 else ""
    return f'<td class="{kind}" style="{_shade(kept)}" title="{escape(note)}"{width}>{text}</td>'


def _shade(kept):
    """Background for a share between 0 and 1, and black or white letters, whichever contrasts more."""
    depth = 2 * min(kept, 1) ** 0.5  # most layers keep little, and differ there
    pale, deep = SHADES[:2] if depth < 1 else SHADES[1:]
    colour = [round(a + (b - a) * (depth if depth < 1 else depth - 1)) for a, b in zip(pale, deep, strict=True)]
    return f"background:rgb{tuple(colour)};color:{'#000' if luminance(colour) > 0.179 else '#fff'}"


def luminance(rgb):
    """Relative luminance (WCAG 2) of three bytes."""
    linear = [c / 12.92 if (c := byte / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for byte in rgb]
    return sum(x * w for x, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def items(summary, found, limit=40, clip=2000):
    """Test items behind a line that opens: `[{label: text}, ...]`, at most `limit` of them, long texts cut."""
    shown = []
    for item in found[:limit]:
        lines = "".join(
            f"<dt>{escape(label)}</dt><dd>{escape(text if len(text) <= clip else text[:clip] + ' […]')}</dd>"
            for label, text in item.items()
        )
        shown.append(f"<li><dl>{lines}</dl></li>")
    more = f"<p>and {len(found) - limit} more</p>" if len(found) > limit else ""
    return details(summary, f'<ol class="items">{"".join(shown)}</ol>{more}')


def details(summary, body, opened=False):
    return f"<details{' open' if opened else ''}><summary>{_text(summary)}</summary>{body}</details>"


def figures(*drawn):
    """`(SVG, caption)` side by side."""
    return beside(*(f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>" for svg, caption in drawn))


def beside(*blocks):
    """As many blocks in a line as fit."""
    return f'<div class="beside">{"".join(f"<div>{block}</div>" for block in blocks)}</div>'


def code(text):
    return f'<pre tabindex="0">{escape(text)}</pre>'


def facts(pairs):
    """Names and values."""
    return f'<dl class="facts">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs)}</dl>'


def _scrolling(body, label):
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{body}</div>'


def unbroken(text):
    """Lines break before what is in brackets, not within it."""
    return text if isinstance(text, Raw) else re.sub(r"\([^)]*\)", r'<span class="whole">\g<0></span>', escape(text))


def _text(text):
    return text if isinstance(text, Raw) else escape(text)
