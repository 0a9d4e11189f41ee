"""Results as a Markdown table, and the curve of quality against size."""

import csv


def table(results):
    """One row per model of a run's results: quality with 95 % intervals, the four sizes, speed, gained and lost."""
    head = (
        "| model | accuracy | response NLL | gained / lost (p) | bases | targeted parameters | all parameters "
        "| weight bytes | decode tokens/s | peak memory |"
    )
    lines = [head, "|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for name, row in results.items():
        s, paired, speed = row["sizes"], row["paired"], row["decode_tokens_per_second"]
        change = f"{paired['gained']} / {paired['lost']} ({paired['p']:.2g})" if paired else "-"
        cells = [
            name,
            f"{_interval(row['accuracy'], '.1%')} of {row['n']}" if row["accuracy"] else "-",
            _interval(row["nll"], ".3f"),
            change,
            f"{s['bases']:,}",
            f"{s['targeted'] / 1e6:.2f} M ({s['targeted_dense'] / s['targeted']:.2f}x fewer)",
            f"{s['parameters'] / 1e6:.2f} M ({s['parameters_dense'] / s['parameters']:.2f}x fewer)",
            f"{s['bytes'] / 1e6:.1f} MB",
            f"{speed['median']:.1f} ({speed['low']:.1f} to {speed['high']:.1f})",
            f"{max(stage['peak_memory_bytes'] for stage in row['stages']) / 2**30:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curve(results, folder):
    """Write curve.csv and curve.png: NLL with its 95 % interval, and accuracy, against bytes, smallest model first.

    The parent is among the points; rows of `results` that are no size of one family are for the caller to leave out.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

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
    figure, ax = plt.subplots(figsize=(6, 4))
    x, y = [p["bytes"] / 1e6 for p in points], [p["nll"] for p in points]
    error = [[p["nll"] - p["nll_low"] for p in points], [p["nll_high"] - p["nll"] for p in points]]
    ax.errorbar(x, y, error, marker="o", capsize=3)
    for p in points:
        ax.annotate(p["model"], (p["bytes"] / 1e6, p["nll"]), textcoords="offset points", xytext=(6, 6), fontsize=8)
    ax.set(xlabel="weight bytes (MB)", ylabel="test NLL per response token")
    ax.grid(alpha=0.3)
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def _interval(x, form):
    return f"{x['value']:{form}} ({x['low']:{form}} to {x['high']:{form}})"
