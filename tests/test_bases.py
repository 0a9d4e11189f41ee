import copy
import dataclasses
import json

import pytest
import torch
from conftest import KINDS, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from basis_select import decompose, extend, heal, learn, prune, sizes, tune
from basis_select.bases import LowRankLinear, basis_cost, dense_cost, fold, groups, take
from basis_select.decompose import same_input, second_moments, targets
from basis_select.linalg.metrics import METRICS


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_full_rank_is_the_dense_model(kind, tied, task, ids):
    model = tiny(kind, tied)
    before = logits(model, ids)
    embedding = model.get_input_embeddings().weight.clone()
    count = len(targets(model))
    decompose(model, task, examples=16)
    assert torch.allclose(logits(model, ids), before, atol=2e-6)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert sum(len(m) for m in groups(model)) == count
    assert isinstance(model.get_output_embeddings(), LowRankLinear) != tied
    for members in groups(model):
        fold(members)
    assert torch.allclose(logits(model, ids), before, atol=2e-6)


def test_layers_that_read_one_tensor_are_found_without_their_names(task):
    model = tiny("qwen2")
    short = [sorted(n.rpartition(".")[2] for n in g) for g in same_input(model, targets(model), task)]
    assert short[:4] == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_sharing_stores_and_computes_v_once(task, ids):
    model = decompose(tiny(), task, examples=16)
    q, k = (model.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    assert k.leader is q
    assert not hasattr(k, "v")
    calls = []
    q.v.register_forward_hook(lambda *a: calls.append(1))
    logits(model, ids)
    assert len(calls) == 1
    assert q._latent is None  # nothing is kept alive


def test_a_shared_latent_never_answers_for_another_input(task):
    model = decompose(tiny(), task, examples=16)
    q, k = (model.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    x, y = torch.randn(2, 3, 64)
    q(x)
    assert torch.equal(k(y), k.u(q._project(y)))
    q(x)
    x.mul_(2)  # the same object, another content
    assert torch.equal(k(x), k.u(q._project(x)))
    with torch.no_grad():
        q(x)
    q.weight.requires_grad_(True)
    assert k(x).requires_grad


def test_a_half_used_latent_survives_deepcopy_and_gradient_checkpointing(task, ids):
    model = decompose(tiny(), task, examples=16)
    members = groups(model)[0]
    members[0][1].weight.requires_grad_(True)
    members[0][1](torch.randn(2, 64))
    other = copy.deepcopy(model)
    assert groups(other)[0][1][1].leader is groups(other)[0][0][1]
    for m in (model, other):
        m.train()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for m in (model, other):
        m(ids, labels=ids).loss.backward()
        grads.append(groups(m)[0][0][1].weight.grad)
    assert torch.allclose(*grads, atol=1e-7)


def test_moments_are_those_of_the_tokens_that_are_not_padding(task):
    """Compared with one example at a time, which needs no padding."""
    model = tiny(tied=True)
    members = [["model.layers.0.self_attn.q_proj"], ["model.layers.1.mlp.down_proj"]]
    seen = {name: [] for (name,) in members}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name: seen[n].append(a[0][0]))
        for (name,) in members
    ]
    for example in task.train[:12]:
        logits(model, torch.tensor([example.input_ids]))
    for hook in hooks:
        hook.remove()
    few = dataclasses.replace(task, train=task.train[:12])
    inputs, outputs = second_moments(model, members, few, 12, METRICS["kronecker"])
    for (name,) in members:
        x = torch.cat(seen[name])
        assert torch.allclose(inputs[name], x.T @ x / len(x), rtol=2e-2, atol=2e-2 * float((x**2).mean()))
        assert outputs[name].shape == (model.get_submodule(name).out_features,) * 2
        values = torch.linalg.eigvalsh(outputs[name].double())
        assert values[0] > -1e-6 * values[-1]


def test_what_cannot_be_decomposed_is_named(task, caplog):
    with pytest.raises(ValueError, match=r"nothing to decompose.*transformer.h.0.attn.c_attn \(Conv1D\)"):
        decompose(GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2)), task)
    model = decompose(tiny("qwen3_moe"), task, examples=16)
    assert "experts" in caplog.text
    assert groups(model)
    with pytest.raises(ValueError, match="already"):
        decompose(model, task)
    with pytest.raises(ValueError, match="unknown metric 'cholesky'"):
        decompose(tiny(), task, metric="cholesky")
    with pytest.raises(ValueError, match="pass a task"):
        decompose(tiny())
    broken = tiny()
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: .*non-finite"):
        decompose(broken, metric="plain", share=False)


@pytest.mark.parametrize("budget", ["global", "uniform"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_prune_meets_the_budget_within_one_basis_per_layer(budget, keep, task):
    model = decompose(tiny(), task, examples=16)
    slack = sum(basis_cost(m) for m in groups(model))
    prune(model, keep=keep, budget=budget, multiple_of=1)
    s = sizes(model)
    assert keep * s["targeted_dense"] - slack < s["targeted"] <= keep * s["targeted_dense"]
    assert s["parameters"] == sum(p.numel() for p in model.parameters())


def test_prune_rounds_ranks_and_keeps_layers_past_break_even_dense(task):
    model = decompose(tiny(), task, examples=16)
    costs = {m[0][0]: (basis_cost(m), dense_cost(m)) for m in groups(model)}
    prune(model, keep=0.8, multiple_of=8)
    assert {m[0][1].rank % 8 for m in groups(model)} == {0}
    assert len(groups(model)) < len(costs)
    assert all(m[0][1].rank * costs[m[0][0]][0] < costs[m[0][0]][1] for m in groups(model))


def test_prune_says_what_is_impossible(task):
    model = decompose(tiny(), task, examples=16)
    with pytest.raises(ValueError, match="smallest possible is"):
        prune(model, keep=0.01)
    with pytest.raises(ValueError, match="keep=4"):
        prune(model, keep=4)
    with pytest.raises(ValueError, match="unknown budget"):
        prune(model, budget="best")


def test_mass_keeps_the_largest_of_each_layer(task):
    model = decompose(tiny(), task, examples=16)
    before = {m[0][0]: m[0][1].s.clone() for m in groups(model)}
    prune(model, keep=0.3, budget="mass")
    for members in groups(model):
        s, r = before[members[0][0]], members[0][1].rank
        assert s[:r].sum() >= 0.3 * s.sum() > s[: r - 1].sum()


def test_learning_trains_the_weights_only_and_prunes_on_the_way(task):
    parent = tiny()
    model = decompose(copy.deepcopy(parent), task, examples=16)
    factors = {n: p.clone() for n, p in model.named_parameters() if not n.endswith(".weight") or ".u." in n}
    ranks = []
    q = groups(model)[0][0][1]
    q.register_forward_hook(lambda m, a, y: ranks.append(m.rank))
    learn(model, task, parent, keep=0.25, multiple_of=2, steps=8, batch_size=4, rounds=4)
    assert (q.weight != 1).any()
    assert sizes(model)["targeted"] <= 0.25 * sizes(model)["targeted_dense"]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 1
    u = model.get_submodule("model.layers.0.self_attn.q_proj").u.weight
    assert torch.equal(u, factors["model.layers.0.self_attn.q_proj.u.weight"][:, q.kept])
    size = sizes(model)["targeted"]
    prune(model, keep=0.25, multiple_of=2)  # nothing is left to cut
    assert sizes(model)["targeted"] == size


def test_the_forward_while_learning_is_the_formula(task):
    model = decompose(tiny("qwen2"), task, examples=16)
    layer = groups(model)[0][0][1]
    layer.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 64)
    expected = (x @ layer.v.weight.T * layer.s) @ layer.u.weight.T + layer.u.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.to_linear()(x), expected, atol=1e-5)


def test_new_bases_start_silent_and_heal_fills_them(task, ids):
    parent = tiny()
    model = decompose(copy.deepcopy(parent), task, examples=16)
    prune(model, 4, keep=0.4, multiple_of=2)
    before, size = logits(model, ids), sizes(model)
    extend(model, rank=4)
    assert torch.allclose(logits(model, ids), before, atol=1e-6)
    assert size["targeted"] < sizes(model)["targeted"] <= 0.4 * size["targeted_dense"]
    new = model.get_submodule("model.layers.0.self_attn.q_proj").u.weight[:, -4:]
    embedding = model.get_input_embeddings().weight.clone()
    heal(model, task, parent, steps=4, batch_size=4)
    assert new.abs().max() > 0
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_healing_brings_the_loss_down(task, ids, tmp_path):
    parent = tiny(tied=True)
    tune(parent, task, steps=80, batch_size=8, lr=1e-2)
    model = prune(decompose(copy.deepcopy(parent), task, metric="plain"), keep=0.15, multiple_of=1)
    heal(model, task, parent, tmp_path, steps=80, batch_size=8, lr=3e-3)
    kl = [json.loads(line)["kl"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


def test_verbs_in_the_wrong_order_say_which_comes_first(task):
    with pytest.raises(ValueError, match="call decompose first"):
        learn(tiny(), task)
    with pytest.raises(ValueError, match="call decompose first"):
        prune(tiny())
    with pytest.raises(ValueError, match="call decompose and prune first"):
        extend(tiny())
    model = decompose(tiny(), task, examples=16)
    with pytest.raises(ValueError, match="call prune before extend"):
        extend(model)
    with pytest.raises(ValueError, match="call prune before heal"):
        heal(model, task)


def test_take_keeps_the_chosen_bases(task):
    model = decompose(tiny(), task, examples=16)
    members = groups(model)[0]
    layer = members[1][1]
    layer.leader.weight.data.uniform_(0.5, 1.5)
    u, s, v = layer.u.weight.clone(), layer.s.clone(), layer.leader.v.weight.clone()
    index = torch.tensor([1, 4, 5])
    take(members, index)
    assert torch.allclose(layer.dense_weight(), u[:, index] @ s[index].diag() @ v[index], atol=1e-6)
