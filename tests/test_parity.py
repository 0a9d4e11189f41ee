"""Other methods against reference numbers from their published formulas, written here without ours."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from conftest import in_processes, tiny
from safetensors.torch import load_file, save_file

from basis_select import decompose, prune
from basis_select.checkpoint.targets import targets
from basis_select.layers.group import groups
from basis_select.linalg import metrics
from basis_select.linalg.budget import by_mass
from basis_select.statistics.fisher import squared_gradients

NAME = "model.layers.1.mlp.up_proj"  # 64 -> 96
RANK = 10


def cut(weight, left, right, rank):
    """The best product of `rank` for `||left (W - .) right||`: SVD of `left W right`, mapped back."""
    u, s, v = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    return torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(right), s


def ours(model, name, rank):
    layer = model.get_submodule(name)
    u, s, v = layer.u.weight.double(), layer.leader.s().detach().double(), layer.leader.v.weight.double()
    return u[:, :rank] @ s[:rank].diag() @ v[:rank]


def inputs_of(model, name, examples):
    """X: (tokens, in) of one layer, example by example, as SVD-LLM collects it."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach()))
    with torch.no_grad():
        for example in examples:
            model(torch.tensor([example.input_ids]))
    hook.remove()
    return torch.cat(seen).double()


@pytest.fixture
def few(task):
    return dataclasses.replace(task, train=task.train[:24])


def test_whitening_is_svd_llms(few):
    """arXiv 2403.07378: S S^T = X^T X by Cholesky, SVD of W S; what is cut off costs the dropped s^2 at the output."""
    model = tiny()
    weight, x = model.get_submodule(NAME).weight.detach().double(), inputs_of(model, NAME, few.train)
    root = torch.linalg.cholesky(x.T @ x)
    expected, s = cut(weight, torch.eye(96).double(), root, RANK)
    loss = (x @ (weight - expected).T).square().sum()
    assert torch.allclose(loss, s[RANK:].square().sum())
    u, found, v = metrics.decompose([weight], None, x.T @ x)
    assert torch.allclose(found, s)
    assert torch.allclose(u[:, :RANK] @ found[:RANK].diag() @ v[:RANK], expected, atol=1e-9)
    mine = ours(decompose(model, few, metric="whitened", share=False, examples=24), NAME, RANK)
    assert loss <= (x @ (weight - mine).T).square().sum() < 1.01 * loss  # shrinkage costs little


def gradients(model, name, examples):
    """Of every example's own negative log-likelihood: what FWSVD squares."""
    weight, found = model.get_submodule(name).weight, []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        out = model(ids).logits[0, example.start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(out, ids[0, example.start :], reduction="sum")
        found.append(torch.autograd.grad(loss, weight)[0].double())
    return torch.stack(found)


def test_the_fisher_metric_is_fwsvds(few, in_fp32):
    """arXiv 2207.00112: I = diag(sqrt(row sums of the mean squared gradient)), SVD of I W, rows being inputs."""
    model = tiny()
    weight = model.get_submodule(NAME).weight.detach().double()
    fisher = gradients(model, NAME, few.train).square().mean(0)  # (out, in); transposed in y = x W
    importance = fisher.sum(0).sqrt().diag()
    expected, s = cut(weight.T, importance, torch.eye(96).double(), RANK)
    made = decompose(copy.deepcopy(model), few, metric="fisher", share=False, examples=24)
    assert torch.allclose(made.get_submodule(NAME).s().double(), s, rtol=1e-4)
    assert torch.allclose(ours(made, NAME, RANK), expected.T, atol=1e-5)
    assert (s[RANK:].square().sum() - (importance @ (weight.T - expected)).square().sum()).abs() < 1e-9 * s[0] ** 2


def test_layers_that_share_a_basis_share_the_importance_of_its_inputs(few, in_fp32):
    model = tiny()
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    stacked = torch.cat([model.get_submodule(name).weight.detach().double() for name in names])
    fisher = sum(gradients(model, name, few.train).square().mean(0).sum(0) for name in names)
    _, s = cut(stacked, torch.eye(len(stacked)).double(), fisher.sqrt().diag(), RANK)
    made = decompose(model, few, metric="fisher", examples=24)
    assert torch.allclose(made.get_submodule(names[0]).s().double(), s, rtol=1e-4)


def test_an_input_that_no_gradient_reads_does_not_matter(few, in_fp32):
    """Its importance is zero: the best bases are those of the other inputs, and nothing breaks."""
    model = tiny()
    model.model.layers[1].post_attention_layernorm.weight.data[:3] = 0  # three inputs of the block's MLP
    weight = model.get_submodule(NAME).weight.detach().double()
    fisher = gradients(model, NAME, few.train).square().mean(0).sum(0)
    assert torch.equal(fisher[:3], torch.zeros(3).double())
    layer = decompose(model, few, metric="fisher", share=False, examples=24).get_submodule(NAME)
    assert torch.allclose(ours(model, NAME, None), weight, atol=1e-5)
    _, s = cut(weight[:, 3:], torch.eye(96).double(), fisher[3:].sqrt().diag(), RANK)
    assert torch.allclose(layer.s().double()[:50], s[:50], rtol=1e-4)


def basel_masks(s, keep, prunings):
    """Basel's released rule: the share keep^(1/prunings) of what is left, again and again, by a mask. s: (r,)"""
    share, mask = keep ** (1 / prunings), torch.ones_like(s)
    for _ in range(prunings):
        ordered = (s * mask).sort(descending=True).values
        reached = (ordered.cumsum(0) >= share * ordered.sum()).nonzero()
        mask = (s * mask >= ordered[reached[0, 0]]).to(s)
    return mask.nonzero()[:, 0]


@pytest.mark.parametrize("prunings", [1, 4, 50])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_by_mass_is_basels_rule(keep, prunings):
    s = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(3)
    index = torch.arange(len(s))
    for _ in range(prunings):
        order = s[index].argsort(descending=True)
        index = index[order[: by_mass(s[index], keep ** (1 / prunings))]]
    assert torch.equal(index.sort().values, basel_masks(s, keep, prunings))


def test_pruning_by_mass_leaves_what_basels_rule_leaves(few):
    model = tiny()
    dense = {name: layer.weight.detach().double() for name, layer in targets(model).items()}
    prune(decompose(model, metric="plain", share=False), mass=0.4, budget="mass", score="magnitude")
    kept = {name: layer.rank for group in groups(model) for name, layer in group.items()}
    for name, weight in dense.items():
        rank = len(basel_masks(torch.linalg.svdvals(weight), 0.4, 1))
        smaller = rank * sum(weight.shape) < weight.numel()
        assert kept.get(name) == (rank if smaller else None)


MEMBERS = [["model.layers.0.self_attn.q_proj"], ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]]


def in_one_of_two(rank, folder, task):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = squared_gradients(tiny(), MEMBERS, task, 5, dist.group.WORLD)
    save_file(found, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_examples(task, tmp_path):
    expected = squared_gradients(tiny(), MEMBERS, task, 5)
    in_processes(in_one_of_two, tmp_path, task)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, importance in found.items():
            torch.testing.assert_close(importance, expected[name])


def test_what_no_example_reaches_is_left_out(task, caplog):
    model = tiny()
    model.register_module("unused", torch.nn.Linear(8, 8))
    made = decompose(model, task, metric="fisher", examples=4)
    assert type(made.unused) is torch.nn.Linear
    assert "unused is never reached" in caplog.text
    assert all(p.grad is None for p in made.parameters())
