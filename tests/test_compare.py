"""The comparison script on a tiny model: rows, resuming, the table and the plot."""

import ast
import importlib
import json
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import bench_of, compare, read, read_grid, rows, stored
from compare_report import interval, plot, summary, table
from compare_rows import alone, answered, dense
from conftest import make_task, tiny
from vocabularies import TEXT, byte_level, wrapped

import basis_select as bs
from basis_select.checkpoint.targets import targets
from basis_select.heal import rate_at

EVAL = Path(__file__).parents[1] / "eval"


def grid_of(folder, tokenizer, rows, **more):
    bs.save(tiny(vocab_size=len(tokenizer), tied=True), tokenizer, folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = {"decompose.examples": 16, "heal.batch_size": 4, "learn.batch_size": 4, "prune.multiple_of": 1}
    task = {"task": str(folder / "data.jsonl"), "data.test": 20, "data.validation": 10}
    return {
        "model": str(folder / "model"),
        "seeds": [0],
        "sizes": ["2x"],
        "base": base,
        "tasks": {"sums": task},
        **more,
    }


def sums():
    return [{"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)} for a in range(12) for b in range(12)]


def test_a_grid_takes_what_it_leaves_out_from_another(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "seeds: [0]\nsizes: [2x]\ntasks: {x: {task: x, data.test: 9}, y: {task: y}}\n"
        "methods: {default: {prune.bits: auto}, int4: {dense: 4}}\n"
    )
    (tmp_path / "b.yaml").write_text(
        "like: a.yaml\nseeds: [1]\ntasks: {x: {data.test: 5}}\nmethods: {int4:, int3: {dense: 3}, default: {}}\n"
    )
    assert read_grid(tmp_path / "b.yaml") == {
        "seeds": [1],
        "sizes": ["2x"],
        "tasks": {"x": {"task": "x", "data.test": 5}},
        "methods": {"int4": {"dense": 4}, "int3": {"dense": 3}, "default": {}},
    }


def mean(row):
    return sum(row["nll"]) / sum(row["tokens"])


@pytest.mark.slow
def test_a_grid_is_measured_once_and_reported(tmp_path):
    grid = grid_of(
        tmp_path,
        wrapped(byte_level()),
        sums(),
        trained=[0, 100],
        choose={"size": "2x", "trained": 100, "heal": [0.5, 2]},
        answers={"sums": 6},
        methods={
            "default": {"prune.bits": "auto", "sizes": ["2x", "3x"]},
            "cut twice": {"prune.bits": "auto", "first": "1.5x"},
            "factors alone": {"prune.bits": "auto", "forms": "factors alone", "trained": [0]},
            "blind": {"prune.bits": "auto", "blind": True, "trained": [100]},
            "trimmed": {"dense": 16, "trained": [0]},
            "shipped": {"shipped": True, "trained": [0]},
            "int4": {"dense": 4},
            "int3": {"dense": 3, "trained": [0]},
            "learned": {"learned": 0.5, "learn.rounds": 1, "learn.lr": [1e-3, 1e30]},
            "FWSVD": {"decompose.metric": "fisher", "decompose.share": False},
            "Taylor": {"decompose.metric": "plain", "prune.score": "taylor"},
        },
    )
    results = tmp_path / "results.jsonl"
    assert compare(grid, tmp_path / "runs", results) == []
    found = read(results)
    assert len(found) == len(list(rows(grid))) == 1 + (2 + 1 + 1 + 1 + 1 + 1 + 2) + (2 + 1 + 1 + 1 + 1 + 2)
    by_name = {(r["method"], r["size"], r["trained"]): r for r in found}
    assert len({tuple(r["tokens"]) for r in found}) == 1
    parent = by_name["parent", None, 0]["sizes"]["bytes"]
    for (_, size, trained), row in by_name.items():
        assert size is None or row["sizes"]["bytes"] <= parent / float(size[:-1]) + 4000  # the file's header
        assert ("correct" in row) == (trained > 0 or size is None)
    assert by_name["shipped", None, 0]["nll"] == by_name["parent", None, 0]["nll"]  # which was not tuned
    assert by_name["factors alone", "2x", 0]["sizes"]["bases"] < by_name["default", "2x", 0]["sizes"]["bases"]
    blind, known = (by_name[method, "2x", 100] for method in ("blind", "default"))
    assert blind["validation_nll"]["unhealed"] == known["validation_nll"]["unhealed"]
    assert blind["validation_nll"]["healed"] != known["validation_nll"]["healed"]
    assert {round(k["lr"] / b["lr"], 6) for k, b in zip(known["candidates"], blind["candidates"], strict=True)} == {3.0}
    steps = {(row["trained"], sum(row["steps"].values())) for row in found if "steps" in row}
    assert steps == {(0, 0), (100, max(steps)[1])}
    assert max(steps)[1] > 1
    sizes = [by_name[method, None, 0]["sizes"]["bytes"] for method in ("trimmed", "int4", "int3")]
    assert sizes == sorted(sizes, reverse=True)
    for name, count in (("FWSVD", 2), ("learned", 4)):
        row = by_name[name, "2x", 100]
        own = {**row["chosen"], "heal": row["heal"]}
        tried = {tuple(c[key] for key in own): c["validation_nll"] for c in row["candidates"]}
        assert len(tried) == count
        best = min(nll for nll in tried.values() if nll is not None)
        assert tried[tuple(own.values())] == best
        assert row["chosen_at"] == {"size": "2x", "trained": 100}
        times = [c["lr"] / rate_at(c["kl"], rounded=False) for c in row["candidates"] if c["lr"]]
        assert times == [pytest.approx(c["heal"], rel=0.01) for c in row["candidates"] if c["lr"]]
        # the row at the size of the choice is that candidate once more
        assert row["validation_nll"]["healed"] == pytest.approx(best, abs=1e-4)
    assert None in tried.values()  # a rate at which nothing stays finite

    with results.open("a") as file:
        file.write('{"task": "sums", "seed": 0, "meth')  # killed while writing
    compare(grid, tmp_path / "runs", results)
    assert read(results) == found  # everything was there
    grid["methods"]["int8"] = {"dense": 8, "trained": [0]}
    compare(grid, tmp_path / "runs", results)
    assert read(results)[:-1] == found
    assert read(results)[-1]["method"] == "int8"

    # another grid with the same folder makes its own choices
    method = {"FWSVD": {"decompose.metric": "fisher", "decompose.share": False, "trained": [100]}}
    other = {**grid, "choose": {"size": "2x", "trained": 100, "heal": [1]}, "methods": method}
    compare(other, tmp_path / "runs", tmp_path / "other.jsonl")
    assert [row["heal"] for row in read(tmp_path / "other.jsonl")[1:]] == [1]

    lines = table(found).splitlines()
    assert sum(line.startswith("| learned |") for line in lines) == 2  # its likelihood, its answers
    value = mean(by_name["Taylor", "2x", 100])
    assert any(line.startswith("| Taylor |") and f"{value:.3f} (" in line for line in lines)
    assert any("best other row" in line for line in lines)
    assert any(line.startswith("| Taylor |") and f" {value:.3f} |" in line for line in summary(found).splitlines())
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_row_may_start_with_fewer_blocks_and_heal_on_the_parents_answers(tmp_path):
    methods = {"default": {}, "fewer": {"dropped": 1}, "answered": {"answered": True}}
    methods = {name: {"prune.bits": "auto"} | own for name, own in methods.items()}
    grid = grid_of(tmp_path, wrapped(byte_level()), sums(), trained=[100], methods=methods)
    results = tmp_path / "results.jsonl"
    assert compare(grid, tmp_path / "runs", results) == []
    by_name = {row["method"]: row for row in read(results)}
    all_, fewer, others = (by_name[name] for name in methods)
    assert fewer["sizes"]["parameters_dense"] < all_["sizes"]["parameters_dense"]
    assert fewer["tokens"] == others["tokens"] == all_["tokens"]  # those that are tested
    assert others["validation_nll"]["unhealed"] == all_["validation_nll"]["unhealed"]
    assert others["validation_nll"]["healed"] != all_["validation_nll"]["healed"]

    home = tmp_path / "runs" / "sums-0"
    assert len(list(home.glob("labels-*"))) == 2
    bench = bench_of(grid, "sums", 0, tmp_path / "runs")
    own = bench.for_method({"answered": True})
    changed = [i for i, (a, b) in enumerate(zip(bench.task.train, own.task.train, strict=True)) if a != b]
    assert set(changed) <= set(bench.trained_on[::2])
    texts = json.loads(next(home.glob("answers-*.json")).read_text(encoding="utf-8"))
    for i, text in zip(bench.trained_on[::2], texts, strict=True):
        given, example = bench.task.train[i], own.task.train[i]
        assert example.input_ids[: example.start] == given.input_ids[: given.start]
        assert bench.tokenizer.decode(example.input_ids[example.start : -1]).endswith(text)
        again = answered(given, given.response, bench.tokenizer)
        assert again == given


@pytest.mark.slow
def test_a_row_that_fails_or_is_at_work_elsewhere_stops_no_other(tmp_path):
    methods = {"too small": {"sizes": ["1KB"], "prune.bits": "auto"}, "int8": {"dense": 8}}
    grid = grid_of(tmp_path, wrapped(byte_level()), sums(), trained=[0], methods=methods)
    results, taken = tmp_path / "results.jsonl", threading.Event()
    with alone(tmp_path / "runs" / "sums-0", "row parent None 0"):
        other = threading.Thread(target=lambda: taken.set() or compare(grid, tmp_path / "runs", results))
        other.start()
        while len(read(results)) < 1:
            assert other.is_alive()
            time.sleep(0.05)
        assert [r["method"] for r in read(results)] == ["int8"]
    other.join()
    assert [r["method"] for r in read(results)] == ["int8", "parent"]
    assert [row.method for row in compare(grid, tmp_path / "runs", results)] == ["too small"]


@pytest.mark.parametrize("trims", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_base_that_trims_trims_for_all_but_the_parent_and_counts_tokens_as_it_does(trims, tmp_path):
    lines = [{"prompt": line[:-9], "response": line[-9:]} for line in TEXT[:40]]
    methods = {"trimmed": {"dense": 16, "trained": [0]}, "int4": {"dense": 4}, "default": {"prune.bits": "auto"}}
    grid = grid_of(tmp_path, wrapped(byte_level()), lines, trained=[0], methods=methods)
    grid["base"]["trim.tokens"] = "task" if trims else "all"
    grid["tasks"]["sums"] |= {"data.test": 12, "data.validation": 4}
    compare(grid, tmp_path / "runs", tmp_path / "results.jsonl")
    found = {r["method"]: r for r in read(tmp_path / "results.jsonl")}
    assert [*found] == ["parent", "trimmed", "int4", "default"]
    assert len({tuple(r["tokens"]) for r in found.values()}) == 1
    counts = {name: r["sizes"]["parameters"] for name, r in found.items()}
    assert counts["trimmed"] == counts["int4"]
    assert (counts["trimmed"] < counts["parent"]) == trims
    assert len({r["sizes"]["parameters_dense"] for r in found.values()}) == 1
    assert sum(found["trimmed"]["nll"]) == pytest.approx(sum(found["parent"]["nll"]), rel=0.2)
    assert "| trimmed |" in table([*found.values()])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_dense_competitor_is_as_large_as_its_bits_and_its_table_has_8(bits, tied, tokenizer, tmp_path):
    before = tiny(tied=tied)
    weight, inner = before.get_input_embeddings().weight, [m.weight for m in targets(before).values()]
    bases = bs.decompose(tiny(tied=tied), make_task(), metric="plain")
    model, facts = stored(dense(bases, bits), tokenizer, tmp_path / "model")
    table = model.get_input_embeddings()
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    expected = torch.where(scale > 0, (weight / scale).round() * scale, 0)
    assert torch.allclose(table(torch.arange(len(weight))), expected, atol=1e-6)
    count = sum(w.numel() for w in inner)
    scales = sum(len(w) for w in inner) if bits == 8 else count // 32
    norms = sum(p.numel() for p in before.parameters()) - count - weight.numel() * (1 if tied else 2)
    tables = (weight.numel() + 2 * len(weight)) if tied else weight.numel() + 2 * len(weight) + 2 * weight.numel()
    assert facts["bytes"] == pytest.approx(count * bits // 8 + 2 * (scales + norms) + tables, abs=40_000)


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


@pytest.mark.parametrize("script", sorted(p.name for p in EVAL.glob("*.py")))
def test_a_script_takes_from_the_package_what_is_there(script):
    tree, modules = ast.parse((EVAL / script).read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("basis_select"):
            source = importlib.import_module(node.module)
            for name in node.names:
                found = getattr(source, name.name, None) or importlib.import_module(f"{node.module}.{name.name}")
                if isinstance(found, types.ModuleType):
                    modules[name.asname or name.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{script}, line {node.lineno}: {ast.unparse(node)}"
