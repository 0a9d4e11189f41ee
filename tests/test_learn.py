"""Learning the weights of bases, and the cuts on its way."""

import copy
import itertools
import sys

import pytest
import torch
from conftest import logits, tiny

from basis_select import decompose, learn, load, prune, save, sizes
from basis_select.layers.group import groups
from basis_select.selection import Rule, cut, select
from basis_select.target import target


def test_learning_trains_the_weights_only_and_prunes_on_the_way(task):
    parent = tiny()
    model = decompose(copy.deepcopy(parent), task, examples=16)
    name, q = groups(model)[0].name, groups(model)[0].leader
    factors = q.u.weight.clone(), q.v.weight.clone()
    ranks = []
    handle = q.register_forward_hook(lambda m, a, y: ranks.append(m.rank))
    learn(model, task, parent, keep=0.25, multiple_of=2, steps=8, batch_size=4, rounds=4)
    handle.remove()
    assert (q.s.learned != 1).any()
    assert torch.equal(q.u.weight, factors[0])
    assert torch.equal(q.v.weight, factors[1])
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 1
    assert ranks[-1] == (q.s.survived == 4).sum()
    prune(model, keep=0.25, multiple_of=2)  # exactly what learning left
    assert {g.rank for g in groups(model) if g.name == name} == {ranks[-1]}


def test_every_cut_of_learning_leaves_the_same_fraction_of_what_was_there(task):
    model = decompose(tiny(), task, examples=16)
    found = groups(model)
    left = [sum(g.parameters for g in found)]

    def watch(*_):
        left.append(sum(g.parameters for g in found))

    found[0].leader.register_forward_hook(watch)
    learn(model, task, keep=0.2, multiple_of=1, steps=8, batch_size=4, rounds=8)
    goal = 0.2 * sum(g.shape.dense_cost for g in found)
    for n, (before, after) in zip(range(8, 1, -1), itertools.pairwise(left[:-1]), strict=True):
        assert after == pytest.approx(before * (goal / before) ** (1 / n), rel=0.03)
    assert 0.97 * goal < sizes(prune(model, keep=0.2, multiple_of=1))["targeted"] <= goal


@pytest.mark.parametrize("mass", [0.9, 0.5])
def test_learning_to_a_share_of_the_mass_leaves_what_basels_rule_leaves(task, mass):
    model = decompose(tiny(), task, metric="plain", share=False)
    expected = {}
    for group in groups(model):
        s = group.s.sort(descending=True).values.double()
        for _ in range(4):  # the smallest set with the share K^(1/N) of what is left, N times
            s = s[: int((s.cumsum(0) < mass ** (1 / 4) * s.sum()).sum()) + 1]
        expected[group.name] = len(s)
    learn(model, task, mass=mass, budget="mass", score="magnitude", steps=4, batch_size=4, rounds=4, lr=1e-7)
    assert {g.name: int((g.leader.s.survived == 4).sum()) for g in groups(model)} == expected
    shapes = {g.name: g.shape for g in groups(model)}
    prune(model, mass=mass, budget="mass", score="magnitude")
    deployed = {name: r for name, r in expected.items() if r * shapes[name].basis_cost < shapes[name].dense_cost}
    assert {g.name: g.rank for g in groups(model)} == deployed  # the others are dense


def test_a_negative_weight_is_no_square(task):
    model = decompose(tiny(), task, metric="plain")
    groups(model)[0].leader.s.learned.data[3] = -1.0
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj has a negative weight"):
        learn(model, task, steps=2, square=True)


def test_one_learning_gives_nested_sizes(task, tmp_path, tokenizer):
    model = decompose(tiny(), task, examples=16)
    learn(model, task, keep=0.125, multiple_of=1, steps=6, batch_size=4, rounds=3)
    save(model, tokenizer, tmp_path / "learned")
    previous = None
    for keep in (0.7, 0.5, 0.4, 0.25, 0.125):
        again, _ = load(tmp_path / "learned")
        chosen = {
            group.name: set(range(group.rank) if index is None else index.tolist())
            for group, index in select(again, target(keep=keep), Rule(multiple_of=1))
        }
        assert previous is None or all(chosen[name] <= previous[name] for name in chosen)
        previous = chosen
        s = sizes(prune(again, keep=keep, multiple_of=1))
        slack = max(g.shape.basis_cost for g in groups(model))
        assert keep * s["targeted_dense"] - slack < s["targeted"] <= keep * s["targeted_dense"]


def test_basel_learns_squares_beside_new_bases_that_are_never_pruned(task, ids):
    model = decompose(tiny(), task, metric="plain", share=False)
    before = logits(model, ids)
    embedding = model.get_input_embeddings().weight.clone()
    steps = {"steps": 4, "batch_size": 4, "rounds": 2, "lr": 1e-2}
    learn(model, task, keep=0.5, budget="mass", multiple_of=1, square=True, new=3, rest=True, **steps)
    layer = groups(model)[0].leader
    assert layer.s.power == 2
    assert layer.new.u.weight.abs().max() > 0
    assert not torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    learned, kept = copy.deepcopy(model), int((layer.s.survived == 2).sum())
    prune(model, keep=0.5, budget="mass", multiple_of=1)
    assert sizes(model)["targeted"] <= 0.5 * sizes(model)["targeted_dense"]
    assert groups(model)[0].rank == kept + 3
    for group in groups(learned):
        group.take((group.leader.s.survived == 2).nonzero()[:, 0])
    assert torch.allclose(logits(model, ids), logits(learned, ids), atol=1e-5)


def test_the_forward_while_learning_is_the_formula(task):
    model = decompose(tiny("qwen2"), task, examples=16)
    layer = groups(model)[0].leader
    layer.s.learned.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 64)
    expected = (x @ layer.v.weight.T * layer.s()) @ layer.u.weight.T + layer.u.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.to_linear()(x), expected, atol=1e-5)


def test_a_learning_that_was_stopped_between_cuts_continues_bit_for_bit(task, tmp_path, monkeypatch):
    monkeypatch.setattr("basis_select.training.engine.SAVE_EVERY", 0)
    whole, left = decompose(tiny(), task, metric="plain"), itertools.count()
    options = {"keep": 0.3, "multiple_of": 2, "steps": 6, "batch_size": 4, "rounds": 3, "lr": 1e-2}
    expected = learn(copy.deepcopy(whole), task, folder=tmp_path / "a", **options).state_dict()

    def stopped(*args, **kwargs):
        if next(left) == 3:  # the first cut looks whether there is room, and the third of the others is stopped
            raise InterruptedError
        return cut(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(sys.modules[learn.__module__], "cut", stopped)
        with pytest.raises(InterruptedError):
            learn(copy.deepcopy(whole), task, folder=tmp_path / "b", **options)
    assert list((tmp_path / "b").rglob("checkpoint-4"))  # after two of three cuts
    found = learn(copy.deepcopy(whole), task, folder=tmp_path / "b", **options).state_dict()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert max(int(x.max()) for name, x in found.items() if name.endswith("survived")) == 3


def test_a_keep_that_cannot_be_met_is_said_before_the_first_step(task):
    model = decompose(tiny(), task, examples=8)
    with pytest.raises(ValueError, match=r"learn: keep=0.01: the smallest possible is [\d,]+ parameters, the budget"):
        learn(model, task, steps=8, keep=0.01)


def test_no_steps_of_learning_change_nothing(task):
    model = decompose(tiny(), task, examples=8)
    before = copy.deepcopy(model.state_dict())
    learn(model, task, steps=0, keep=0.5)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
