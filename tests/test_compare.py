"""The comparison script on a tiny model: rows, resuming, the table and the plot."""

import json

import numpy as np
from compare import compare, read
from compare_report import interval, plot, summary, table
from conftest import tiny

import basis_select as bs


def test_a_grid_is_measured_once_and_reported(tokenizer, tmp_path):
    bs.save(tiny(tied=True), tokenizer, tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(12) for b in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = {
        "model": str(tmp_path / "model"),
        "seeds": [0],
        "sizes": [2],
        "steps": 4,
        "base": {"decompose.examples": 16, "heal.batch_size": 4, "learn.batch_size": 4, "prune.multiple_of": 1},
        "tasks": {"sums": {"task": str(tmp_path / "data.jsonl"), "data.test": 20, "data.validation": 10}},
        "methods": {
            "default": {"decompose.embedding": True, "then": "int8"},
            "learned": {"learn.steps": 2, "learn.rounds": 2},
            "BSI": {"decompose.metric": "plain", "prune.score": "taylor"},
        },
    }
    results = tmp_path / "results.jsonl"
    compare(grid, tmp_path / "runs", results)
    found = read(results)
    assert len(found) == 3 + 4
    by_name = {(r["method"], r["size"]): r for r in found}
    assert len({len(r["nll"]) for r in found}) == 1
    dense = by_name["parent", 1]["sizes"]
    allowed = dense["parameters"] - dense["targeted"] / 2
    for name in ("default", "learned", "BSI"):
        assert by_name[name, 2]["sizes"]["parameters"] <= allowed
        assert sum(by_name[name, 2]["steps"].values()) == 4
    assert by_name["default, int8", 2]["sizes"]["bytes"] < by_name["default", 2]["sizes"]["bytes"]
    assert by_name["int4", 1]["sizes"]["bytes"] < by_name["int8", 1]["sizes"]["bytes"]

    with results.open("a") as file:
        file.write('{"task": "sums", "seed": 0, "meth')  # killed while writing
    text = results.read_text().rpartition("\n")[0] + "\n"
    compare(grid, tmp_path / "runs", results)
    assert results.read_text() == text  # everything was there

    lines = table(found).splitlines()
    assert sum(line.startswith("| learned |") for line in lines) == 1
    value = sum(by_name["BSI", 2]["nll"]) / sum(by_name["BSI", 2]["tokens"])
    assert any(line.startswith("| BSI |") and f"{value:.3f} (" in line for line in lines)
    assert any("best other row" in line for line in lines)
    assert f"| BSI | {value:.3f} |" in summary(found, sizes=(2,)).splitlines()
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_intervals_pair_items():
    """Two rows that differ by the same amount on every item differ surely, however much the items do."""
    rng = np.random.default_rng(0)
    nll = rng.exponential(5, 50)
    one = [{"nll": nll.tolist(), "tokens": [10] * 50}]
    other = [{"nll": (nll + 0.1).tolist(), "tokens": [10] * 50}]
    value, low, high = interval(other, one)
    assert np.allclose([value, low, high], 0.01)
    value, low, high = interval(one)
    assert low < value < high
    assert np.isclose(value, nll.sum() / 500)
