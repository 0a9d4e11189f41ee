import copy
import dataclasses
from typing import get_args

import pytest
import torch
from conftest import KINDS, logits, sampled, tiny
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from basis_select import decompose, derivatives, extend, heal, learn, prune, refine, sizes, tune
from basis_select.checkpoint.targets import targets
from basis_select.extend import Init
from basis_select.layers.group import groups, only
from basis_select.layers.low_rank import LowRankLinear
from basis_select.layers.shape import Shape
from basis_select.linalg.scores import taylor
from basis_select.training.data import Batches
from basis_select.training.loss import response_logits, response_nll, task_loss


@pytest.mark.parametrize("kind", sampled(KINDS, 3))
@pytest.mark.parametrize("tied", [True, False])
def test_full_rank_is_the_dense_model(kind, tied, task, ids):
    model = tiny(kind, tied)
    before = logits(model, ids)
    embedding = model.get_input_embeddings().weight.clone()
    count = len(targets(model))
    decompose(model, task, examples=16)
    assert torch.allclose(logits(model, ids), before, atol=2e-6)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert sum(len(g.layers) for g in groups(model)) == count
    assert isinstance(model.get_output_embeddings(), LowRankLinear) != tied
    for group in groups(model):
        group.fold(model)
    assert torch.allclose(logits(model, ids), before, atol=2e-6)


def test_what_cannot_be_decomposed_is_named(task, caplog):
    with pytest.raises(ValueError, match=r"nothing to decompose.*transformer.h.0.attn.c_attn \(Conv1D\)"):
        decompose(GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2)), task)
    model = decompose(tiny("qwen3_moe"), task, examples=16)
    assert "experts" in caplog.text
    assert groups(model)
    with pytest.raises(ValueError, match="already"):
        decompose(model, task)
    with pytest.raises(ValueError, match="metric is 'cholesky', it should be plain"):
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
    slack = sum(g.shape.basis_cost for g in groups(model))
    prune(model, keep=keep, budget=budget, multiple_of=1)
    s = sizes(model)
    assert keep * s["targeted_dense"] - slack < s["targeted"] <= keep * s["targeted_dense"]
    assert s["parameters"] == sum(p.numel() for p in model.parameters())


def test_prune_rounds_ranks_and_keeps_layers_past_break_even_dense(task):
    model = decompose(tiny(), task, examples=16)
    shapes = {g.name: g.shape for g in groups(model)}
    prune(model, keep=0.8, multiple_of=8)
    assert {g.rank % 8 for g in groups(model)} == {0}
    assert len(groups(model)) < len(shapes)
    assert all(g.rank * shapes[g.name].basis_cost < shapes[g.name].dense_cost for g in groups(model))


def test_prune_says_what_is_impossible(task):
    model = decompose(tiny(), task, examples=16)
    with pytest.raises(ValueError, match="smallest possible is"):
        prune(model, keep=0.01)
    with pytest.raises(ValueError, match="prune: keep is 4, it should be a fraction above 0 and up to 1"):
        prune(model, keep=4)
    with pytest.raises(ValueError, match="budget is 'best', it should be global"):
        prune(model, keep=0.5, budget="best")
    with pytest.raises(ValueError, match="score is 'best', it should be energy"):
        prune(model, keep=0.5, score="best")
    with pytest.raises(ValueError, match="exactly one of keep, size"):
        prune(model)
    with pytest.raises(ValueError, match="looks at the loss"):
        prune(model, keep=0.5, score="taylor")
    with pytest.raises(ValueError, match="pass a task"):
        prune(model, max_drop=0.1)
    with pytest.raises(ValueError, match="the rest of the model alone is"):
        prune(model, size="40x")
    with pytest.raises(ValueError, match="should read like 4x, 90M or 120MB"):
        prune(model, size="four times")


def test_mass_keeps_the_largest_of_each_layer(task):
    model = decompose(tiny(), task, examples=16)
    before = {g.name: g.s.clone() for g in groups(model)}
    prune(model, mass=0.3, budget="mass", score="magnitude")
    for group in groups(model):
        s, r = before[group.name], group.rank
        assert s[:r].sum() >= 0.3 * s.sum() > s[: r - 1].sum()


@pytest.mark.slow
def test_max_drop_finds_the_smallest_size_that_stays_within_it(task):
    parent, task = tiny(), dataclasses.replace(task, validation=task.train[:16])
    tune(parent, task, steps=40, batch_size=8, lr=1e-2)
    base = response_nll(parent, task.validation)
    found = {}
    for drop in (0.02, 0.5):
        model = prune(decompose(copy.deepcopy(parent), task), task, max_drop=drop, multiple_of=1)
        assert response_nll(model, task.validation) <= base + drop + 1e-3
        found[drop] = sizes(model)["targeted"]
    assert found[0.5] < found[0.02] < sizes(parent)["targeted_dense"]


@pytest.mark.parametrize(("size", "dtype"), [("1.5x", "bfloat16"), ("50K", "bfloat16"), ("150KB", "float32")])
def test_size_is_of_the_whole_model(size, dtype, task, tmp_path, tokenizer):
    model = decompose(tiny(), task, examples=16)
    dense = sizes(model)["parameters_dense"]
    prune(model, size=size, dtype=dtype, multiple_of=1)
    allowed = {"1.5x": dense / 1.5, "50K": 50e3, "150KB": 150e3 / 4}[size]
    assert 0.97 * allowed < sizes(model)["parameters"] <= allowed


@pytest.mark.slow
def test_taylor_scores_rank_bases_like_the_true_loss_change(task):
    parent = tiny(num_hidden_layers=1)
    tune(parent, task, steps=20, batch_size=8, lr=1e-2)
    one = dataclasses.replace(task, train=task.train[:8])
    model = decompose(parent, one, metric="plain")
    batch = next(iter(Batches(one.train, 8, 1, 0)))
    found = derivatives(model, one, probes=100, batch_size=8)
    loss = task_loss(model, batch, mixed=False)[0].item()
    predicted, actual = [], []
    for group, (g, h) in list(zip(groups(model), found, strict=True))[:3]:
        leader = group.leader
        estimate = taylor(leader.s().detach().double(), g, h, None)
        for i in range(0, leader.rank, 4):
            with torch.no_grad():
                kept = leader.s.learned[i].item()
                losses = []
                for weight in (0.0, kept * 1.01, kept * 0.99):
                    leader.s.learned[i] = weight
                    losses.append(task_loss(model, batch, mixed=False)[0].double().item())
                leader.s.learned[i] = kept
            predicted.append(estimate[i].item())
            actual.append(losses[0] - loss)
    assert stats.spearmanr(predicted, actual).statistic > 0.9


@pytest.mark.slow
def test_hutchinson_approaches_the_exact_diagonal(task):
    one = dataclasses.replace(task, train=task.train[:8])
    model = decompose(tiny(num_hidden_layers=1).double(), one, examples=8)
    model.set_attn_implementation("eager")  # the fused one has no second derivative
    batch = next(iter(Batches(one.train, 8, 1, 0)))
    leader = groups(model)[0].leader
    leader.s.learned.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(response_logits(model, batch), batch["targets"])
    gradient = torch.autograd.grad(loss, leader.s.learned, create_graph=True)[0]
    rows = [torch.autograd.grad(gradient[i], leader.s.learned, retain_graph=True)[0][i] for i in range(leader.rank)]
    exact = torch.stack(rows)
    g, h = derivatives(model, one, probes=150, batch_size=8, step=1e-4)[0]
    s = leader.s().detach()
    assert torch.allclose(g * s, gradient.detach(), atol=1e-6)
    noise = (h * s**2 - exact).square().mean() / exact.square().mean()
    few = derivatives(model, one, probes=10, batch_size=8, step=1e-4)[0][1]
    assert noise < 0.15 * (few * s**2 - exact).square().mean() / exact.square().mean()


def test_random_scores_are_the_floor(task):
    """The energy in the kronecker metric predicts the loss; chance does not."""
    parent = tiny()
    tune(parent, task, steps=40, batch_size=8, lr=1e-2)
    nll = {}
    for score in ("energy", "random"):
        model = prune(decompose(copy.deepcopy(parent), task), keep=0.4, score=score, multiple_of=1)
        nll[score] = response_nll(model, task.train)
    assert nll["energy"] < nll["random"]


@pytest.mark.parametrize("init", sampled(get_args(Init), 3))
def test_new_bases_start_silent_and_heal_fills_them(init, task, ids):
    parent = tiny()
    model = decompose(copy.deepcopy(parent), task, examples=16)
    prune(model, reserve=4, keep=0.4, multiple_of=2)
    before, size = logits(model, ids), sizes(model)
    extend(model, task, parent, rank=4, init=init)
    assert torch.allclose(logits(model, ids), before, atol=1e-6)
    assert size["targeted"] < sizes(model)["targeted"] <= 0.4 * size["targeted_dense"]
    new = model.get_submodule("model.layers.0.self_attn.q_proj").u.weight[:, -4:]
    embedding = model.get_input_embeddings().weight.clone()
    heal(model, task, parent, steps=4, batch_size=4)
    assert new.abs().max() > 0
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_new_bases_point_where_they_are_told(task):
    parent = tiny()
    model = prune(decompose(copy.deepcopy(parent), task, metric="plain", share=False), keep=0.4, multiple_of=1)
    name, layer = next(groups(model)[0].items())
    lost = parent.get_submodule(name).weight.detach() - layer.dense_weight()
    extend(model, parent=parent, rank=2, init="residual")
    expected = torch.linalg.svd(lost.double()).Vh[:2].float()
    new = torch.nn.functional.normalize(layer.v.weight[-2:].detach())
    assert torch.allclose((new @ expected.T).square().sum(), torch.tensor(2.0), atol=1e-3)
    with pytest.raises(ValueError, match="needs the dense parent"):
        extend(model, init="residual")
    with pytest.raises(ValueError, match="needs a task"):
        extend(model, init="gradient")
    with pytest.raises(ValueError, match="init is 'magic', it should be random"):
        extend(model, init="magic")


@pytest.mark.parametrize("kind", sampled(["llama", "gemma3_text", "gpt_neox"], 3))
def test_refining_brings_every_block_closer_to_its_original(kind, task, ids):
    parent = tiny(kind)
    model = prune(decompose(copy.deepcopy(parent), task, metric="plain"), keep=0.3, multiple_of=1)
    hidden = lambda m: m(ids, output_hidden_states=True).hidden_states[-1].detach()  # noqa: E731
    before = (hidden(model) - hidden(parent)).square().mean()
    refine(model, task, parent, steps=30, batch_size=8, lr=3e-3)
    assert (hidden(model) - hidden(parent)).square().mean() < before


def test_verbs_in_the_wrong_order_say_which_comes_first(task):
    with pytest.raises(ValueError, match="call decompose first"):
        learn(tiny(), task)
    with pytest.raises(ValueError, match="call decompose first"):
        prune(tiny(), keep=0.5)
    with pytest.raises(ValueError, match="call decompose and prune first"):
        extend(tiny())
    model = decompose(tiny(), task, examples=16)
    with pytest.raises(ValueError, match="call prune before extend"):
        extend(model)
    with pytest.raises(ValueError, match="call prune before heal"):
        heal(model, task)


def test_take_keeps_the_chosen_bases(task):
    model = decompose(tiny(), task, examples=16)
    group = groups(model)[0]
    layer = group.layers[1]
    layer.leader.s.learned.data.uniform_(0.5, 1.5)
    u, s, v = layer.u.weight.clone(), group.s.clone(), layer.leader.v.weight.clone()
    index = torch.tensor([1, 4, 5])
    group.take(index)
    assert torch.allclose(layer.dense_weight(), u[:, index] @ s[index].diag() @ v[index], atol=1e-6)


def test_what_prune_leaves_computes_its_formula(task):
    model = prune(decompose(tiny("qwen2"), task, examples=16), keep=0.5, multiple_of=1)
    x = torch.randn(2, 3, 64)
    for group in (g for g in groups(model) if g.shape.inputs == 64):
        for layer in group.layers:
            assert type(layer) is LowRankLinear
            assert torch.equal(layer(x), layer.u(group.leader.v(x)))
            assert dict(layer.named_children()).keys() == ({"v", "u"} if layer is group.leader else {"u"})


@pytest.mark.parametrize("longest", [16384, 50, 30])
def test_a_shape_says_what_its_layers_cost(longest, monkeypatch):
    monkeypatch.setattr("basis_select.layers.shape.MAX_MOMENT", longest)
    shape = Shape(40, (48, 20))
    u, v = torch.empty(68, shape.full_rank), torch.empty(shape.full_rank, 40)
    assert shape.full_rank == 40
    assert shape.full_cost == u.numel() + v.numel() == 40 * shape.basis_cost
    assert shape.dense_cost == (u @ v).numel()
    assert shape.largest_rank * shape.basis_cost < shape.dense_cost <= (shape.largest_rank + 1) * shape.basis_cost
    assert shape.deployed(25) == 25 * 108
    assert shape.deployed(26) == shape.dense_cost
    assert str(shape) == "40 -> 48+20"
    sides = {16384: (68,), 50: (48, 20), 30: (48, 20)}[longest]
    assert shape.output_sides == sides
    assert shape.output_moment == sum(n * n if n <= longest else 1 for n in sides)


def test_set_aside_bases_come_back_bit_by_bit(task, ids):
    model = decompose(tiny(), task, examples=16)
    whole, chosen = model(ids).logits, [(g, torch.arange(0, g.rank, 3)) for g in groups(model)]
    cut = copy.deepcopy(model)
    for group, (_, index) in zip(groups(cut), chosen, strict=True):
        group.take(index)
    with only(chosen):
        assert torch.equal(model(ids).logits, cut(ids).logits)
    assert torch.equal(model(ids).logits, whole)
