"""The comparison script on a tiny model: rows, resuming, the table and the plot."""

import json

import numpy as np
import pytest
import torch
from compare import Teacher, compare, quantized, read
from compare_report import interval, plot, summary, table
from conftest import tiny
from test_trim import TEXT, byte_level, wrapped

import basis_select as bs
from basis_select.checkpoint.targets import targets
from basis_select.training.data import Batches
from basis_select.training.loss import log_probabilities


@pytest.mark.slow
def test_a_grid_is_measured_once_and_reported(tokenizer, tmp_path):
    bs.save(tiny(tied=True), tokenizer, tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(12) for b in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = {
        "model": str(tmp_path / "model"),
        "seeds": [0],
        "sizes": [2],
        "steps": 4,
        "choose": {"at": 2, "heal": [0.5, 2]},
        "base": {"decompose.examples": 16, "heal.batch_size": 4, "learn.batch_size": 4, "prune.multiple_of": 1},
        "tasks": {"sums": {"task": str(tmp_path / "data.jsonl"), "data.test": 20, "data.validation": 10}},
        "methods": {
            "default": {"decompose.embedding": True, "then": "int8"},
            "learned": {"learn.steps": 2, "learn.rounds": 2, "learn.lr": [1e-3, 1e30]},
            "FWSVD": {"decompose.metric": "fisher", "decompose.share": False},
            "Taylor": {"decompose.metric": "plain", "prune.score": "taylor"},
        },
    }
    results = tmp_path / "results.jsonl"
    compare(grid, tmp_path / "runs", results)
    found = read(results)
    assert len(found) == 3 + 5
    by_name = {(r["method"], r["size"]): r for r in found}
    assert len({len(r["nll"]) for r in found}) == 1
    dense = by_name["parent", 1]["sizes"]
    allowed = dense["parameters"] - dense["targeted"] / 2
    for name in ("default", "learned", "FWSVD", "Taylor"):
        assert by_name[name, 2]["sizes"]["parameters"] <= allowed
        assert sum(by_name[name, 2]["steps"].values()) == 4
    assert by_name["default, int8", 2]["sizes"]["bytes"] < by_name["default", 2]["sizes"]["bytes"]
    assert by_name["int4", 1]["sizes"]["bytes"] < by_name["int8", 1]["sizes"]["bytes"]
    for name, count in (("FWSVD", 2), ("learned", 4)):
        row = by_name[name, 2]
        tried = {tuple(c.items())[:-1]: c["validation_nll"] for c in row["candidates"]}
        assert len(tried) == count
        best = min(nll for nll in tried.values() if nll is not None)
        assert tried[tuple({**row["chosen"], "heal": row["heal"]}.items())] == best
        # the row at the size of the choice is that candidate once more
        assert row["validation_nll"]["healed"] == pytest.approx(best, abs=1e-4)
    assert None in tried.values()  # a rate at which nothing stays finite

    with results.open("a") as file:
        file.write('{"task": "sums", "seed": 0, "meth')  # killed while writing
    text = results.read_text().rpartition("\n")[0] + "\n"
    compare(grid, tmp_path / "runs", results)
    assert results.read_text() == text  # everything was there

    lines = table(found).splitlines()
    assert sum(line.startswith("| learned |") for line in lines) == 1
    value = sum(by_name["Taylor", 2]["nll"]) / sum(by_name["Taylor", 2]["tokens"])
    assert any(line.startswith("| Taylor |") and f"{value:.3f} (" in line for line in lines)
    assert any("best other row" in line for line in lines)
    assert f"| Taylor | {value:.3f} |" in summary(found, sizes=(2,)).splitlines()
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("own", [{}, pytest.param({"every token": {"trim.tokens": "all"}}, marks=pytest.mark.slow)])
def test_a_base_that_trims_trims_for_all_but_the_parent_and_counts_tokens_as_it_does(own, tmp_path):
    tokenizer = wrapped(byte_level())
    bs.save(tiny(vocab_size=len(tokenizer), tied=True), tokenizer, tmp_path / "model")
    rows = [{"prompt": line[:-9], "response": line[-9:]} for line in TEXT[:40]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    grid = {
        "model": str(tmp_path / "model"),
        "seeds": [0],
        "sizes": [4],
        "steps": 1,
        "base": {
            "trim.tokens": "task",
            "decompose.examples": 8,
            "decompose.embedding": True,
            "heal.batch_size": 4,
            "prune.multiple_of": 1,
        },
        "tasks": {"words": {"task": str(tmp_path / "data.jsonl"), "data.test": 12, "data.validation": 4}},
        "methods": {"default": {"then": "int8"}, **own},
    }
    compare(grid, tmp_path / "runs", tmp_path / "results.jsonl")
    found = {r["method"]: r for r in read(tmp_path / "results.jsonl")}
    assert [*found] == ["parent", "trimmed", "int8", "int4", "default", "default, int8", *own]
    assert len({tuple(r["tokens"]) for r in found.values()}) == 1
    counts = {name: r["sizes"]["parameters"] for name, r in found.items()}
    assert counts["trimmed"] == counts["int4"] < counts["parent"]
    assert len({r["sizes"]["parameters_dense"] for r in found.values()}) == 1
    assert all(counts[name] == pytest.approx(counts["default"], rel=0.02) for name in own)
    assert sum(found["trimmed"]["nll"]) == pytest.approx(sum(found["parent"]["nll"]), rel=0.2)
    assert "| trimmed |" in table([*found.values()])


def test_a_teacher_answers_for_its_own_weights_and_positions(task, tmp_path):
    batches = Batches(task.train, 8, 1, seed=0)
    batch = batches[0]
    others = {**batch, "positions": batch["positions"].flip(0)}
    for parent in (tiny(seed=0), tiny(seed=1)):
        teacher = Teacher(parent, tmp_path)
        for _ in range(2):  # computed, then read
            for b in (batch, others):
                assert torch.allclose(teacher(b), log_probabilities(parent, b), atol=1e-2)
    assert len(list(tmp_path.iterdir())) == 4


def by_rows(weight):
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    return torch.where(scale > 0, (weight / scale).round() * scale, 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("width", "bits"), [("int8", 8), ("int4", 4)])
def test_a_dense_table_is_rounded_as_ours_is(width, bits, tied):
    model, before = tiny(tied=tied), tiny(tied=tied)
    table, inner = before.get_input_embeddings().weight, [m.weight for m in targets(before).values()]
    bytes_, what = quantized(model, width)
    assert torch.allclose(model.get_input_embeddings().weight, by_rows(table), atol=1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    count = sum(w.numel() for w in inner)
    scales = sum(len(w) for w in inner) if width == "int8" else count // 32
    norms = sum(p.numel() for p in before.parameters()) - count - table.numel()
    assert bytes_ == count * bits // 8 + table.numel() + 2 * (scales + len(table) + norms)
    assert what == {"layers": width, "embedding and tied head": "int8"}


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
