"""Layers that are called for some tokens, several times or never, that share parameters, are subclasses, or zero."""

import copy
import dataclasses
import random

import pytest
import torch
from conftest import tiny
from transformers import FalconMambaConfig, FalconMambaForCausalLM, conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from basis_select import decompose, load, prune, save, sizes
from basis_select.checkpoint.targets import targets
from basis_select.decompose import factored
from basis_select.layers.group import Group, groups
from basis_select.layers.low_rank import LowRankLinear
from basis_select.linalg.metrics import METRICS
from basis_select.sizes import layer_table
from basis_select.statistics.moments import second_moments
from basis_select.statistics.readers import same_input
from basis_select.statistics.sums import _both
from basis_select.training.data import Batches


class Experts(torch.nn.Module):
    """A mixture of copies of `mlp`, one expert a token, the last of them never chosen; only some are called."""

    def __init__(self, mlp, d, count=4):
        super().__init__()
        self.router = torch.nn.Linear(d, count)
        self.experts = torch.nn.ModuleList([copy.deepcopy(mlp) for _ in range(count)])
        with torch.no_grad():
            self.router.bias[-1] = -1e4
            for expert in self.experts:
                for p in expert.parameters():
                    p.mul_(1 + 0.3 * torch.randn_like(p))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        p, chosen = self.router(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, (expert(tokens[rows]) * p[rows, None]).to(y.dtype))
        return y.view_as(x)


class Twice(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x + self.mlp(x))


def experts():
    model = tiny()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp, 64)
    return model.eval()


TWICE = [["model.layers.1.mlp.mlp.gate_proj", "model.layers.1.mlp.mlp.up_proj"], ["model.layers.1.mlp.mlp.down_proj"]]


def twice():
    model = tiny()
    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    return model


EXPERTS = [[f"model.layers.1.mlp.experts.{i}.{x}_proj" for x in ("gate", "up")] for i in range(4)]


def moments_one_by_one(model, members, examples):
    """`(A, G)` of each group, from examples without padding and the task's own labels."""
    total, tokens = {}, 0
    for example in examples:
        calls = {name: [] for names in members for name in names}
        hooks = [
            model.get_submodule(n).register_forward_hook(lambda m, a, y, to=to: to.append((a[0], y)))
            for n, to in calls.items()
        ]
        ids = torch.tensor([example.input_ids])
        out = model(input_ids=ids).logits[0, example.start - 1 : -1]
        for hook in hooks:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(out, ids[0, example.start :], reduction="sum")
        tokens += len(example.input_ids)
        for names in members:
            for reads in zip(*(calls[n] for n in names), strict=True):
                g = torch.autograd.grad(loss, [y for _, y in reads], retain_graph=True)
                g, x = torch.cat(g, dim=-1).flatten(0, -2), reads[0][0].detach().flatten(0, -2)
                a, b, n = total.get(names[0], (0, 0, 0))
                total[names[0]] = a + x.T @ x, b + g.T @ g, n + len(x)
    return {name: (a / n, b / tokens) for name, (a, b, n) in total.items()}


@pytest.mark.parametrize("make", [experts, twice])
def test_moments_of_layers_called_for_some_tokens_or_more_than_once(make, task, monkeypatch, in_fp32):
    model, few = make(), dataclasses.replace(task, train=task.train[:9])
    members = EXPERTS if make is experts else TWICE
    expected = moments_one_by_one(model, members, few.train)
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kwargs: drawn.pop(0)[:, None])
    drawn, size = [], 1 if make is experts else 8
    for batch in Batches(random.Random(0).sample(few.train, 9), size, -(-9 // size), 0):
        drawn.append(batch["targets"].clamp_min(0))
    inputs, outputs, _ = second_moments(model, members, few, 9, METRICS["kronecker"])
    assert inputs.keys() == outputs.keys() == expected.keys()
    for name, (a, g) in expected.items():
        torch.testing.assert_close(inputs[name], a, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
        torch.testing.assert_close(outputs[name][0], g, rtol=1e-3, atol=1e-4 * float(g.abs().max()))


def test_an_expert_that_no_token_reaches_stays_dense(task, caplog, ids):
    model = experts()
    before = model(ids).logits
    decompose(model, task, examples=8)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    mixture = model.model.layers[1].mlp
    assert all(isinstance(m.gate_proj, LowRankLinear) for m in mixture.experts[:3])
    assert mixture.experts[0].up_proj.leader is mixture.experts[0].gate_proj
    assert type(mixture.experts[3].gate_proj) is torch.nn.Linear
    assert "model.layers.1.mlp.experts.3.gate_proj is never reached by the task's data: left dense" in caplog.text
    prune(model, keep=0.5, multiple_of=1)
    assert torch.isfinite(model(ids).logits).all()


def test_layers_called_twice_share_only_if_both_calls_read_the_same(task, ids):
    model = twice()
    before, last = model(ids).logits, ["model.layers.1.mlp.mlp." + x for x in ("gate_proj", "up_proj")]
    assert last in same_input(model, targets(model), task)
    decompose(model, task, examples=16)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    model = tiny()
    model.model.layers[1].mlp = TwiceApart(model.model.layers[1].mlp)
    assert ["model.layers.1.mlp.mlp.gate_proj"] in same_input(model, targets(model), task)


class TwiceApart(Twice):
    """Gate and up read the same tensor first, then different ones."""

    def forward(self, x):
        gate, up = self.mlp.gate_proj, self.mlp.up_proj
        y = torch.tanh(gate(x)) * up(x)
        z = torch.tanh(gate(x + 1)) * up(x - 1)
        return self.mlp.down_proj(y + z)


def test_an_input_that_was_overwritten_is_another(task):
    model = tiny()
    hook = lambda m, args: (args[0].mul_(2),)  # noqa: E731
    model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(hook)
    names = [[n.rpartition(".")[2] for n in g] for g in same_input(model, targets(model), task)]
    assert names[:2] == [["q_proj"], ["k_proj", "v_proj"]]


def test_one_parameter_under_two_names_stays_dense_and_counts_once(task, caplog, ids):
    model = tiny(tied=True)
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    second.mlp.up_proj = first.mlp.up_proj
    count = sum(p.numel() for p in model.parameters())
    before = model(ids).logits
    decompose(model, task, examples=16)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert second.self_attn.q_proj.weight is first.self_attn.q_proj.weight
    assert second.mlp.up_proj is first.mlp.up_proj
    assert "model.layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight" in caplog.text
    assert "model.layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight" in caplog.text
    assert "embed_tokens" not in caplog.text
    prune(model, keep=0.5, multiple_of=1)
    found = sizes(model)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parameters_dense"] == count
    assert len({row["name"] for row in layer_table(model)}) == len(layer_table(model)) == 10


class Plain(torch.nn.Linear):
    pass


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_is_decomposed_if_it_computes_what_nn_linear_does(task, caplog, ids):
    model = tiny()
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "up_proj")):
            module.__class__ = Plain
        if name.endswith("down_proj"):
            module.__class__ = Scaled
    before = model(ids).logits
    decompose(model, task, examples=16)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert isinstance(model.model.layers[0].mlp.gate_proj, LowRankLinear)
    assert type(model.model.layers[0].mlp.down_proj) is Scaled
    assert "model.layers.0.mlp.down_proj (Scaled)" in caplog.text
    model = tiny()
    model.model.layers[0].attention = torch.nn.MultiheadAttention(64, 4)  # whose out_proj is never called
    assert not any("attention.out_proj" in name for name in targets(model))


@pytest.mark.parametrize("metric", METRICS)
def test_layers_that_are_zero_or_without_effect(metric, task, caplog, ids):
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()  # so q, k and v of that layer have no effect
        model.model.layers[1].mlp.up_proj.weight.zero_()
    before = model(ids).logits
    decompose(model, task, metric=metric, examples=16, share=False)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    if METRICS[metric].outputs:
        assert "model.layers.0.self_attn.v_proj has no effect on the task's loss: left dense" in caplog.text
    for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[1].mlp.up_proj):
        assert not layer.dense_weight().any()
    prune(model, keep=0.5, multiple_of=1)
    for group in groups(model):
        assert all(torch.isfinite(p).all() for layer in group.layers for p in layer.parameters())
    assert torch.isfinite(model(ids).logits).all()


def test_fold_of_a_zero_layer_is_zero():
    linear = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(linear.weight)
    with torch.no_grad():
        layers = factored(Group(("a",), (linear,)), None, METRICS["plain"])
    model = torch.nn.ModuleDict({"a": layers[0]})
    Group(("a",), layers).fold(model)
    layer = model["a"]
    assert not layer.dense_weight().any()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


def test_a_moment_that_is_zero_for_one_kind_of_labels_is_the_other():
    one, zero = torch.eye(3), torch.zeros(3, 3)
    assert torch.equal(_both(one.clone(), zero), one)
    assert torch.equal(_both(zero.clone(), one), one)
    assert torch.equal(_both(zero.clone(), zero), zero)
    assert torch.equal(_both(one.clone(), 3 * one), one)


class InPlace(torch.nn.Module):
    """A layer of which the output is changed in place by the module that called it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x).view(-1, self.layer.out_features)
        y += 1
        return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("embedding", [False, True])
def test_outputs_that_the_model_changes_in_place(embedding, task, ids):
    model = tiny()
    model.model.layers[0].self_attn.q_proj = InPlace(model.model.layers[0].self_attn.q_proj)
    if embedding:
        model.model.embed_tokens.register_forward_hook(lambda module, args, y: y.mul_(2))
    before = model(ids).logits
    decompose(model, task, examples=8)
    assert isinstance(model.model.layers[0].self_attn.q_proj.layer, LowRankLinear)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_a_layer_that_is_read_where_the_mode_changes_stays_dense(task, caplog):
    model = tiny()
    mlp = model.model.layers[0].mlp

    def rescale(module, args):
        if module.training != module.was_training:
            module.down_proj.weight.data.mul_(2.0 if module.training else 0.5)
            module.was_training = module.training

    mlp.was_training = False
    mlp.register_forward_pre_hook(rescale)
    weight = mlp.down_proj.weight.clone()
    decompose(model, task, examples=8)
    assert type(mlp.down_proj) is torch.nn.Linear
    assert torch.equal(mlp.down_proj.weight, weight)
    assert not model.training
    assert "reads their weights directly: model.layers.0.mlp.down_proj" in caplog.text


def test_a_head_that_reads_more_than_one_vector_a_token_is_refused(task):
    model = tiny(tied=True)
    model.lm_head.register_forward_pre_hook(lambda module, args: (torch.stack([args[0]] * 2, 1),), prepend=True)
    model.lm_head.register_forward_hook(lambda module, args, y: y[:, 0])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be decomposed: its head reads \[1, 2, \d+, 64\]"):
        decompose(model, task)


CONVERSIONS = [
    (["q_proj", "k_proj", "v_proj"], WeightConverter("fused", ["q_proj", "k_proj", "v_proj"], [Split(0)])),
    (["gate_proj", "up_proj"], WeightConverter("fused", ["gate_proj", "up_proj"], [Split(0)])),
    (["gate_proj"], WeightRenaming("gate_proj", "gate_proj.weight")),
]


@pytest.mark.parametrize(("names", "conversion"), CONVERSIONS)
@pytest.mark.parametrize("loaded", [False, True])
def test_layers_whose_factors_files_cannot_hold_stay_dense(
    names, conversion, loaded, task, ids, caplog, tokenizer, tmp_path, monkeypatch
):
    fused = {"LlamaForCausalLM": [conversion]}
    known = conversion_mapping.get_checkpoint_conversion_mapping
    found = lambda name: copy.deepcopy(fused.get(name)) or known(name)  # noqa: E731
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", found)
    model = tiny()
    if loaded:
        save(model, tokenizer, tmp_path / "dense")
        model, _ = load(tmp_path / "dense")
    decompose(model, task, examples=8)
    prune(model, keep=0.5, multiple_of=1)
    assert not any(name.endswith(tuple(names)) for group in groups(model) for name in group.names)
    assert "have no place for their factors: model.layers.0." in caplog.text
    save(model, tokenizer, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")[0](ids).logits, model(ids).logits)


def test_a_model_that_computes_otherwise_where_it_is_said_to_be_quantized(task, tokenizer, ids, tmp_path):
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "expand": 2}
    torch.manual_seed(0)
    model = FalconMambaForCausalLM(FalconMambaConfig(**sizes, conv_kernel=4, bos_token_id=1, eos_token_id=2)).eval()
    decompose(model, task, metric="plain")
    prune(model, keep=0.5, multiple_of=1)
    save(model, tokenizer, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")[0](ids).logits, model(ids).logits)


def test_a_layer_that_is_computed_without_a_graph_stays_dense(task, caplog):
    model = tiny()
    attention = model.model.layers[0].self_attn
    attention.forward = torch.no_grad()(attention.forward)
    decompose(model, task, examples=8)
    assert type(attention.q_proj) is type(attention.o_proj) is torch.nn.Linear
    assert "model.layers.0.self_attn.o_proj is never reached" in caplog.text
    assert isinstance(model.model.layers[1].self_attn.q_proj, LowRankLinear)
