"""What is measured and beside which floor; how long anything takes is never asserted."""

import json
import time

import pytest
import torch
from conftest import KINDS, make_tokenizer, tiny
from typer.testing import CliRunner

import basis_select as bs
from basis_select.cli import app
from basis_select.cost import Flops
from basis_select.evaluation.bench import PARTS, bench, table, weights_read
from basis_select.evaluation.profile import profile
from basis_select.evaluation.speed import Generation, take_turns

QUICK = {"prompts": (4, 9), "tokens": 3, "rounds": 1}


def cut(model, task, **options):
    return bs.prune(bs.decompose(model, task, metric="plain", **options), keep=0.5, multiple_of=4)


def test_turns_alternate_and_the_first_is_not_counted():
    calls = []

    def slow_at_first(name):
        def run():
            calls.append(name)
            time.sleep(0.2 if calls.count(name) == 1 else 0)

        return lambda: run

    seconds = take_turns({name: slow_at_first(name) for name in "ab"}, 3)
    assert "".join(calls) == "abababab"
    assert all(len(found) == 3 and max(found) < 0.2 for found in seconds.values())


def test_figures_stand_beside_what_was_counted(task):
    dense, half = tiny("llama", tied=True), cut(tiny("llama", tied=True), task)
    facts = bench({"dense": dense, "half": half}, **QUICK)
    rows = {(r["what"], r["model"]): r for r in facts["rows"]}
    for name, model in (("dense", dense), ("half", half)):
        with torch.no_grad(), Flops() as counted:
            model(torch.zeros(1, 9, dtype=torch.long), logits_to_keep=1)
        assert rows["first token of 9", name]["floor"] == counted.flops
        weights = sum(p.nbytes for p in model.parameters())
        cache = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their width, bytes
        assert rows["decode", name]["floor"] == weights + cache * (4 + 3)
        memory = facts["memory"][name]
        assert (memory["parameters"], memory["cache"]) == (weights, cache * (9 + 3))
        assert memory["activations"] > 9 * 64 * 4
    row = rows["decode", "half"]
    assert row["ideal"] == rows["decode", "dense"]["floor"] / row["floor"] > 1
    assert row["share_of_ideal"] == pytest.approx(row["times_faster"] / row["ideal"])
    assert rows["decode", "dense"]["times_faster"] == 1
    text = table(json.loads(json.dumps(facts)))
    assert len([line for line in text.splitlines() if line.startswith("| decode")]) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_found_in_any_decoder(kind):
    facts = bench({kind: tiny(kind)}, **QUICK)
    for row in facts["parts"]:
        assert set(row["shares"]) == set(PARTS)
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["shares"].values()) > 0
    for row in facts["operators"]:
        assert sum(row["shares"].values()) == pytest.approx(1)


def test_an_embedding_is_read_only_where_the_head_is_tied_to_it(task):
    untied, tied = tiny(), tiny(tied=True)
    table_bytes = 128 * 64 * 4
    assert weights_read(untied) == sum(p.nbytes for p in untied.parameters()) - table_bytes
    assert weights_read(tied) == sum(p.nbytes for p in tied.parameters())
    for model in (untied, tied):
        whole = model is tied
        bs.prune(bs.decompose(model, task, embedding=True), keep=0.5, keep_embedding=0.5, multiple_of=4)
        skipped = 0 if whole else model.get_input_embeddings().bases.u.weight.nbytes
        assert weights_read(model) == sum(p.nbytes for p in model.parameters()) - skipped


def test_what_is_timed_generates_what_the_model_does():
    model = tiny()
    timed = Generation(model, 5, 3)
    cache = timed.empty_cache()
    token = timed.first(cache)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(timed.ids, attention_mask=torch.ones_like(timed.ids), **greedy)[0, 5:]
    assert token.item() == expected[0]
    assert timed.rest(token, cache).item() == expected[-1]


@pytest.mark.slow
def test_compiled_models_that_take_turns_each_keep_their_own_graph(task):
    models = {"dense": tiny(), "half": cut(tiny(seed=1), task)}
    found = {}
    for compiled in (False, True):
        timed = [Generation(model, 5, 3, compiled) for model in models.values()]
        found[compiled] = [[g.to_decode()().item() for g in timed] for _ in range(2)]
    assert found[True] == found[False]
    rows = bench(models, **QUICK, compiled=True)["rows"]
    assert [r["way"] for r in rows if r["what"] == "decode"] == ["eager", "compiled"] * 2


def test_lengths_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="tiny reads at most 128 tokens, a prompt with its answer would be 130"):
        bench({"tiny": tiny()}, prompts=(8, 120), tokens=10)
    with pytest.raises(ValueError, match="at least 1"):
        bench({"tiny": tiny()}, prompts=(8,), tokens=0)


def test_costs_cover_every_shape_alone_and_in_its_group(task):
    costs = profile(tiny(), tokens=(1, 8), rounds=1, multiple_of=8)
    shapes = {(layer["in"], *layer["out"]): layer for layer in costs["layers"]}
    assert set(shapes) == {(64, 64, 32, 32), (64, 96, 96), (64, 64), (64, 32), (64, 96), (96, 64), (64, 128)}
    assert list(shapes[64, 64]["ranks"]) == ["8", "16", "24"]  # below break-even, 32
    for layer in (*(x for s in shapes.values() for x in (s["dense"], *s["ranks"].values())), costs["model"]):
        assert set(layer) == {"1", "8"}
        assert min(layer.values()) > 0
    with pytest.raises(ValueError, match="factored already"):
        profile(cut(tiny(), task))


def test_the_commands_measure_folders(tmp_path, task):
    bs.save(tiny(), make_tokenizer(), tmp_path / "dense")
    bs.save(cut(tiny(), task), make_tokenizer(), tmp_path / "half")
    how = ["--prompts", "4,9", "--tokens", "3", "--rounds", "1"]
    out = tmp_path / "bench.json"
    command = ["bench", str(tmp_path / "dense"), str(tmp_path / "half"), *how, "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    facts = json.loads(out.read_text())
    assert done.output == table(facts) + "\n"
    assert list(facts["memory"]) == ["dense", "half"]
    assert {"command", "device", "threads", "dtype", "versions"} <= set(facts)
    wrong = CliRunner().invoke(app, ["bench", str(tmp_path / "dense"), "--prompts", "4;9"])
    assert (wrong.exit_code, wrong.output.strip()) == (1, "error: --prompts 4;9 should read like 32,128,512")
    done = CliRunner().invoke(app, ["profile", str(tmp_path / "dense"), "--out", str(tmp_path / "costs.json")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "costs.json").read_text())["layers"]
