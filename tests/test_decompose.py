import dataclasses
import gc
import random
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import in_processes, make_tokenizer, tiny
from safetensors.torch import load_file, save_file
from test_unusual_layers import EXPERTS, experts

import basis_select as bs
from basis_select import decompose
from basis_select.checkpoint.targets import targets
from basis_select.decompose import deal, factored
from basis_select.layers.group import Group
from basis_select.layers.shape import Shape
from basis_select.linalg.metrics import METRICS
from basis_select.statistics.moments import moment_bytes, passes, second_moments
from basis_select.statistics.readers import dense_groups, same_input
from basis_select.statistics.sums import _add, _complete
from basis_select.training.data import Batches


def test_moments_are_those_of_the_tokens_that_are_not_padding(task):
    """Compared with one example at a time, which needs no padding."""
    model = tiny(tied=True)
    members = [[f"model.layers.0.self_attn.{x}_proj" for x in "qkv"], ["model.layers.1.mlp.down_proj"]]
    seen = {names[0]: [] for names in members}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name: seen[n].append(a[0][0].detach()))
        for name in seen
    ]
    for example in task.train[:12]:
        model(torch.tensor([example.input_ids]))
    for hook in hooks:
        hook.remove()
    few = dataclasses.replace(task, train=task.train[:12])
    inputs, outputs, _ = second_moments(model, members, few, 12, METRICS["kronecker"])
    for names in members:
        x = torch.cat(seen[names[0]])
        expected = x.T @ x / len(x)
        assert torch.allclose(inputs[names[0]], expected, rtol=2e-2, atol=2e-2 * float((x**2).mean()))
        (stacked,) = outputs[names[0]]
        assert stacked.shape == (sum(model.get_submodule(n).out_features for n in names),) * 2
        values = torch.linalg.eigvalsh(stacked.double())
        assert values[0] > -1e-6 * values[-1]


def test_output_moments_are_those_of_the_stacked_gradients(task, monkeypatch, in_fp32):
    """Compared in fp32 with gradients taken one example at a time; drawn labels are set to the task's own."""
    model = tiny()
    names = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    few = dataclasses.replace(task, train=task.train[:6])
    labels = []
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kwargs: labels.pop(0)[:, None])
    total, tokens, seen = 0, 0, {}
    for batch in Batches(random.Random(0).sample(few.train, 6), 8, 1, 0):
        labels.append(batch["targets"].clamp_min(0))
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: seen.update({n: y}) or None) for n in names
    ]
    for example in few.train:
        ids = torch.tensor([example.input_ids])
        out = model(input_ids=ids).logits[0, example.start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(out, ids[0, example.start :], reduction="sum")
        g = torch.cat(torch.autograd.grad(loss, [seen[n] for n in names]), dim=2)[0]
        total, tokens = total + g.T @ g, tokens + len(example.input_ids)
    for hook in hooks:
        hook.remove()
    near = {"rtol": 1e-3, "atol": 1e-4 * float(total.abs().max()) / tokens}
    _, outputs, _ = second_moments(model, [names], few, 6, METRICS["kronecker"])
    assert torch.allclose(outputs[names[0]][0], total / tokens, **near)
    monkeypatch.setattr("basis_select.layers.shape.MAX_MOMENT", 40)
    labels.append(batch["targets"].clamp_min(0))
    _, apart, _ = second_moments(model, [names], few, 6, METRICS["kronecker"])
    sizes = [model.get_submodule(n).out_features for n in names]
    for i, (block, row) in enumerate(zip(apart[names[0]], outputs[names[0]][0].split(sizes), strict=True)):
        expected = row.split(sizes, dim=1)[i]
        want = expected if sizes[i] <= 40 else expected.diagonal().mean()
        assert torch.allclose(block, want, **near)


@pytest.mark.parametrize(("metric", "some"), [("kronecker", 400_000), ("whitened", 60_000)])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_any_number_of_passes_gives_the_same_bits(kind, metric, some, task, monkeypatch):
    module = sys.modules[decompose.__module__]
    collected = []

    def counted(model, members, *args):
        assert len(targets(model)) == 15  # every pass sees the dense model
        collected.append(len(members))
        return second_moments(model, members, *args)

    monkeypatch.setattr(module, "second_moments", counted)
    found = {}
    for room in (10**9, some, -1):
        monkeypatch.setattr(module, "moment_room", lambda device, coming, room=room: room)
        found[room] = decompose(tiny(kind), task, metric=metric, examples=16).state_dict()
    assert collected[0] == 9  # groups in one pass, then in several, then one by one
    assert 1 < len(collected) - 10 < 9
    assert collected[-9:] == [1] * 9
    for other in (some, -1):
        assert all(torch.equal(x, found[other][name]) for name, x in found[10**9].items())


def test_passes_stay_within_the_room_that_there_is():
    sizes = {"a": 5, "b": 3, "c": 9, "d": 1, "e": 1}
    assert passes(sizes, sizes.values(), 8) == [["a", "b"], ["c"], ["d", "e"]]


def test_the_room_is_counted_as_it_is_taken(task):
    model = tiny()
    layers = targets(model)
    members = same_input(model, layers, task)
    for uses in METRICS.values():
        if uses.squares or not (uses.inputs or uses.outputs):
            continue
        inputs, outputs, _ = second_moments(model, members, task, 8, uses)
        for g in dense_groups(model, layers, task):
            size = moment_bytes(g.shape, uses)
            drawn = sum(x.nbytes for x in outputs.get(g.name, []))  # of the size of those with the task's own labels
            assert size == drawn * 2 + (inputs[g.name].nbytes if uses.inputs else 0)


def in_one_of_two(rank, folder, task):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = decompose(tiny("qwen2", tied=True), task, group=dist.group.WORLD, examples=20, embedding=True)
    save_file(dict(model.state_dict()), folder / f"{rank}.safetensors")
    model = decompose(tiny("qwen2"), metric="plain", group=dist.group.WORLD)
    save_file(dict(model.state_dict()), folder / f"{rank}-plain.safetensors")
    model = tiny("qwen2")  # 3 examples are one batch: the second process has none
    inputs, outputs, _ = second_moments(model, MEMBERS, task, 3, METRICS["kronecker"], group=dist.group.WORLD)
    moments = inputs | {f"{name}.{i}": x for name, parts in outputs.items() for i, x in enumerate(parts)}
    save_file(moments, folder / f"{rank}-moments.safetensors")
    inputs, outputs, _ = second_moments(experts(), EXPERTS, task, 2, METRICS["kronecker"], group=dist.group.WORLD)
    moments = inputs | {f"{name}.{i}": x for name, parts in outputs.items() for i, x in enumerate(parts)}
    save_file(moments, folder / f"{rank}-experts.safetensors")
    dist.destroy_process_group()


MEMBERS = [["model.layers.0.self_attn.q_proj"], ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]]


@pytest.mark.slow
def test_two_processes_give_what_one_does(task, tmp_path):
    inputs, outputs, _ = second_moments(tiny("qwen2"), MEMBERS, task, 3, METRICS["kronecker"])
    exact = decompose(tiny("qwen2"), metric="plain").state_dict()
    expected = decompose(tiny("qwen2", tied=True), task, examples=20, embedding=True).state_dict()
    some = second_moments(experts(), EXPERTS, task, 2, METRICS["kronecker"])
    in_processes(in_one_of_two, tmp_path, task)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert found[0].keys() == expected.keys()
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    for name, x in expected.items():
        if name.endswith("scale"):  # bases of nearly the same s may turn within their plane
            torch.testing.assert_close(found[0][name], x, rtol=1e-4, atol=1e-5 * float(x.max()))
    for rank in range(2):
        plain = load_file(tmp_path / f"{rank}-plain.safetensors")
        assert all(torch.equal(x, exact[name]) for name, x in plain.items())
        moments = load_file(tmp_path / f"{rank}-moments.safetensors")
        for names in MEMBERS:
            torch.testing.assert_close(moments[names[0]], inputs[names[0]])
            torch.testing.assert_close(moments[f"{names[0]}.0"], outputs[names[0]][0])
        moments = load_file(tmp_path / f"{rank}-experts.safetensors")  # the process of an example reaches some of them
        assert moments.keys() == {*some[0], *(f"{name}.0" for name in some[1])}
        for name, moment in some[0].items():
            torch.testing.assert_close(moments[name], moment)
            torch.testing.assert_close(moments[f"{name}.0"], some[1][name][0])


def test_layers_are_dealt_by_what_they_cost():
    shapes = [Shape(64, (64, 32)), Shape(64, (64,)), Shape(64, (96, 96)), Shape(96, (64,))]
    assert deal(shapes, 1) == [0, 0, 0, 0]
    assert deal(shapes, 2) == [1, 0, 0, 1]


def test_layers_are_freed_without_the_garbage_collector():
    gc.disable()
    try:
        linears = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)]
        with torch.no_grad():
            layers = factored(Group(("a", "b"), linears), None, METRICS["plain"])
        seen = [weakref.ref(layer) for layer in layers]
        del layers
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_a_moment_is_mirrored_block_by_block():
    for n in (1, 255, 256, 700):
        moment = torch.randn(n, n)
        wanted = moment.tril() + moment.tril(-1).T
        assert torch.equal(_complete(moment), wanted)


@pytest.mark.parametrize("width", [40, 600, 1100])
def test_second_moments_of_what_is_in_bfloat16_lose_nothing_more(width):
    """Products of two such numbers are exact in fp32, whichever units multiply them."""
    torch.manual_seed(0)
    x, found, before = torch.randn(700, width).bfloat16(), {}, torch.backends.mkldnn.matmul.fp32_precision
    _add(found, "a", x[:300])
    _add(found, "a", x[300:])
    exact = x.double().T @ x.double()
    assert found["a"].dtype == torch.float32
    assert (found["a"].double() - exact).tril().abs().max() < 2e-6 * exact.diagonal().max()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_float16_is_refused_for_it_cannot_hold_bases(task, tmp_path):
    with pytest.raises(ValueError, match="bases have numbers that float16 cannot hold: load the model in float32"):
        bs.decompose(tiny(dtype="float16"), task)
    bs.save(tiny(dtype="float16"), make_tokenizer(), tmp_path / "parent")
    with pytest.raises(ValueError, match="bases have numbers that float16 cannot hold"):
        bs.decompose_checkpoint(tmp_path / "parent", tmp_path / "bases", metric="plain")
    assert not (tmp_path / "bases").exists()
