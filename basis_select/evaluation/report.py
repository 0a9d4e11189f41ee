"""Results as a Markdown table, and the curve of quality against size."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HEAD = (
    "model",
    "accuracy",
    "response NLL",
    "gained / lost (p)",
    "bases",
    "targeted parameters",
    "all parameters",
    "weight bytes",
    "decode tokens/s",
    "peak memory",
)
ALIGN = "llllrrrrrr"


def table(results: Mapping[str, dict]) -> str:
    """One row per model of a run's results: quality with 95 % intervals, the four sizes, speed, gained and lost."""
    return markdown(HEAD, [cells(name, row) for name, row in results.items()], ALIGN)


def cells(name: str, row: dict) -> list[str]:
    """The texts of one row under HEAD."""
    s, paired, speed = row["sizes"], row["paired"], row["decode_tokens_per_second"]
    return [
        name,
        f"{interval(row['accuracy'], '.1%')} of {row['n']}" if row["accuracy"] else "-",
        interval(row["nll"], ".3f"),
        f"{paired['gained']} / {paired['lost']} ({paired['p']:.2g})" if paired else "-",
        f"{s['bases']:,}",
        f"{s['targeted'] / 1e6:.2f} M ({s['targeted_dense'] / s['targeted']:.2f}x fewer)",
        f"{s['parameters'] / 1e6:.2f} M ({s['parameters_dense'] / s['parameters']:.2f}x fewer)",
        f"{s['bytes'] / 1e6:.1f} MB",
        f"{speed['median']:.1f} ({speed['low']:.1f} to {speed['high']:.1f})",
        f"{peak(row) / 2**30:.2f} GiB",
    ]


def peak(row: dict) -> int:
    """Bytes of memory at the worst moment of all stages of a row."""
    return max(stage["peak_memory_bytes"] for stage in row["stages"])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """A Markdown table; `align` has an l or r for every column."""
    rule = "".join("---|" if a == "l" else "---:|" for a in align)
    return "".join(line + "\n" for line in (_line(head), f"|{rule}", *map(_line, rows)))


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def curve(results: Mapping[str, dict], folder: Path) -> None:
    """Write curve.csv and curve.png: NLL with its 95 % interval, and accuracy, against bytes, smallest model first.

    The parent is among the points; rows of `results` that are no size of one family are for the caller to leave out.
    """
    from matplotlib.figure import Figure

    from .figures import quality

    points = []
    for name, row in sorted(results.items(), key=lambda item: item[1]["sizes"]["bytes"]):
        accuracy = row["accuracy"]["value"] if row["accuracy"] else None
        facts = {key: row["sizes"][key] for key in ("bytes", "parameters", "targeted", "bases")}
        nll = {"nll": row["nll"]["value"], "nll_low": row["nll"]["low"], "nll_high": row["nll"]["high"]}
        points.append({"model": name, **facts, **nll, "accuracy": accuracy})
    with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, points[0])
        writer.writeheader()
        writer.writerows(points)
    figure = Figure(figsize=(6, 4))
    ax = figure.subplots()
    line = [(p["bytes"], p["nll"], p["nll_low"], p["nll_high"]) for p in points]
    quality(ax, {"": line}, "test NLL per response token")
    for p in points:
        ax.annotate(p["model"], (p["bytes"] / 1e6, p["nll"]), textcoords="offset points", xytext=(6, 6), fontsize=8)
    ax.grid(alpha=0.3)
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")


def interval(x: dict, form: str) -> str:
    return f"{x['value']:{form}}" + ("" if x["low"] is None else f" ({x['low']:{form}} to {x['high']:{form}})")
