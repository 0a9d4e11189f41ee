"""How fast to heal: what rates, as multiples of heal's rule, have cost above the best one, on validation splits.

python eval/healing_rate.py RESULTS.jsonl ...      files of compare.py; eval/tables.py writes the same table into docs

A comparison tries several rates before it takes one. `heal.rate_at`, the rate that heal takes by itself, is chosen from
these trials, and so never from test items.
"""

import json
import sys
from pathlib import Path

from compare import read

from basis_select.evaluation.report import markdown
from basis_select.heal import ROUNDED_RATE, rate_at

TIMES = (0.3, 1, 3, 10, 30)
NAMES = ("heal", "kl", "lr", "validation_nll")  # of a candidate; its other keys are what else was to choose


def trials(paths):
    """One dict for every start from which several rates were tried: what it was, and nats above the best by TIMES."""
    found = {}
    for row in (row for path in paths for row in read(path) if row.get("candidates")):
        starts = {}
        for tried in row["candidates"]:
            starts.setdefault(tuple((k, v) for k, v in tried.items() if k not in NAMES), []).append(tried)
        for own, tried in starts.items():
            nll = {_times(t): t["validation_nll"] for t in tried if t["lr"] and t["validation_nll"] is not None}
            if len(nll) < 2:
                continue
            what = " ".join([row["method"], *(f"{key}={value:g}" for key, value in own)])
            size = row["chosen_at"]["size"] if row["size"] else None
            name = row["task"], row["seed"], what, size, row["chosen_at"]["trained"]
            best = min(nll.values())
            same = row["task"], json.dumps(tried)  # rows of other seeds may repeat the trials of the first
            if same in found and found[same]["name"] <= name:
                continue
            found[same] = {
                "rounded": bool(row["sizes"].get("bits")),
                "name": name,
                "kl": tried[0]["kl"],
                "above": {n: value - best for n, value in nll.items()},
            }
    return list(found.values())


def _times(tried):
    """The member of TIMES nearest to this candidate's rate over that of the rule for weights of 16 bits."""
    times = tried["lr"] / rate_at(tried["kl"] or 0.0, rounded=False)
    return min(TIMES, key=lambda n: max(n / times, times / n))


def table(paths):
    lines = []
    for trial in sorted(trials(paths), key=lambda t: (t["rounded"], t["name"][4], t["kl"] or 0.0)):
        task, seed, what, size, trained = trial["name"]
        kl = "under 0.04" if trial["kl"] is None else f"{trial['kl']:.2g}"
        own = ROUNDED_RATE if trial["rounded"] else 1
        cells = [f"{trial['above'][n]:.3f}" if n in trial["above"] else "" for n in TIMES]
        cells = [f"**{cell}**" if n == own and cell else cell for n, cell in zip(TIMES, cells, strict=True)]
        where = f"{what}, {size}" if size else what
        bits = "8 and fewer" if trial["rounded"] else "16"
        lines.append([bits, f"{task}, seed {seed}", where, f"{trained:,}", kl, *cells])
    head = ["bits", "task", "start", "tokens", "KL", *(f"{n:g} times" for n in TIMES)]
    return markdown(head, lines, "lll" + "r" * (len(head) - 3))


if __name__ == "__main__":
    print(table(map(Path, sys.argv[1:])))
