"""Results as a Markdown table."""


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


def _interval(x, form):
    return f"{x['value']:{form}} ({x['low']:{form}} to {x['high']:{form}})"
