"""A size in bytes: what is on disk never exceeds it, loads as what was in memory, heals, and costs what was said."""

import copy
import itertools
import json

import pytest
import torch
from conftest import addition_recipe, logits, make_task, make_tokenizer, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import basis_select as bs
from basis_select.bits import Form, forms, largest_share
from basis_select.checkpoint.format import BasisSelectConfig
from basis_select.checkpoint.targets import targets
from basis_select.export import to_int8
from basis_select.layers import kernels, rounding, straight_through
from basis_select.layers.embedding import round_table
from basis_select.layers.group import groups
from basis_select.layers.rounded import RoundedLinear, multiplied_out, quantized
from basis_select.layers.rounding import (
    GROUP,
    RANGE,
    Side,
    apart,
    basis_costs,
    dense_cost,
    factors,
    fed_back,
    nearest,
    packed,
    restored,
    storable,
    stored_bytes,
    unpacked,
)
from basis_select.layers.straight_through import RoundingLinear, training
from basis_select.linalg import metrics
from basis_select.linalg.budget import best_for, rising
from basis_select.run.pipeline import run
from basis_select.run.plan import plan, text
from basis_select.run.recipe import read
from basis_select.system.machine import cache
from basis_select.target import target
from basis_select.training.loss import response_nll

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
KINDS = [("llama", True, False), ("llama", False, False), ("llama", True, True), ("gemma3_text", True, False)]
KINDS += [("gemma3_text", True, True), ("gpt_neox", False, False), ("qwen2", True, False), ("phi3", False, False)]


def decomposed(kind="llama", tied=True, embedding=False, **options):
    return bs.decompose(tiny(kind, tied, **options), make_task(), examples=16, embedding=embedding)


@pytest.fixture(scope="module")
def bases():
    return decomposed()


def weight_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("kind", "tied", "embedding"), KINDS)
def test_a_size_is_met_on_disk_and_what_is_loaded_computes_the_same(kind, tied, embedding, ids, task, tmp_path):
    model = decomposed(kind, tied, embedding)
    whole, sizes = 2 * bs.sizes(model)["parameters_dense"], [1.9, 2.6, 4]
    for size in sizes:
        cut = bs.prune(copy.deepcopy(model), task, size=f"{size}x", bits="auto", multiple_of=4)
        folder = bs.save(cut, make_tokenizer(), tmp_path / f"{size}", dtype="bfloat16")
        used = weight_bytes(folder) / (whole / size)
        assert used <= 1
        assert used > 0.85 or size == sizes[0]  # whole at 8 bits, it needs no more
        again, _ = bs.load(folder, dtype="float32")
        assert torch.allclose(logits(again, ids), logits(cut, ids), atol=2e-3)
        assert quantized(again) == quantized(cut)
        assert bs.sizes(again)["parameters"] == bs.sizes(cut)["parameters"]
    stored = load_file(next(folder.glob("*.safetensors")))
    assert {str(t.dtype) for name, t in stored.items() if name.endswith(".q")} == {"torch.int8", "torch.uint8"}


@pytest.mark.parametrize(("more", "bits"), [(8, 4), (8, 3), (4, 3), (3, 2)])
def test_heads_of_more_bits_than_tails_are_what_their_factors_multiply_to(more, bits, bases, ids, tmp_path):
    model = copy.deepcopy(bases)
    for group in groups(model):
        Form(group.rank, bits, 32, more).put(group, model)
    assert {*quantized(model).values()} == {more, bits}
    folder = bs.save(model, make_tokenizer(), tmp_path / "split")
    again, _ = bs.load(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert set(config["heads"].values()) == {32}
    dense = bs.checkpoint.quantizer.BasisSelectQuantizer(BasisSelectConfig())._dequantize(again)
    assert not quantized(dense)
    assert torch.allclose(logits(dense, ids), logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "plus"])
def test_healing_trains_what_is_rounded_and_ends_in_what_is_saved(bases, task, ids, tmp_path, precision):
    model = bs.prune(copy.deepcopy(bases), task, size="4x", bits="auto", multiple_of=4)
    before = {name: m.q.clone() for name, m in model.named_modules() if isinstance(m, RoundedLinear)}
    names, start = quantized(model), copy.deepcopy(model)
    bs.heal(model, task, steps=20, batch_size=8, lr=3e-3, kl=0, precision=precision)
    assert quantized(model) == names
    changed = {n for n, q in before.items() if not torch.equal(q, model.get_submodule(n).q)}
    assert changed == set(names) - {"lm_head"}  # the table stays as it is
    assert response_nll(model, task.train, 0) < response_nll(start, task.train, 0) - 0.2
    again, _ = bs.load(bs.save(model, make_tokenizer(), tmp_path / "healed"))
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_what_trains_computes_what_will_be_deployed(bits):
    torch.manual_seed(0)
    layer = RoundedLinear.rounded(torch.nn.Linear(70, 5), bits)
    holder = torch.nn.ModuleDict({"a": layer})
    x = torch.randn(3, 70)
    expected = layer(x)
    with training(holder):
        trained = holder["a"]
        assert isinstance(trained, RoundingLinear)
        assert torch.allclose(trained(x), expected, atol=1e-5)
        with torch.no_grad():
            trained.weight += 0.01 * torch.randn_like(trained.weight)
            trained.scale *= 1.003
        y = trained(x)
        y.square().sum().backward()
        assert trained.weight.grad.abs().sum() > 0
        assert trained.scale.grad.abs().sum() > 0
        expected = y.detach()
    assert torch.allclose(holder["a"](x), expected, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 150, 2**16, "all by the kernel"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_gradients_of_the_rounding_are_those_of_its_formula(bits, at_once, monkeypatch):
    """Straight through where a number is in range; as if rounding added a constant, for the scales too."""
    if isinstance(at_once, str):
        kernels.load(cache() / "kernels")
    else:
        monkeypatch.setattr(rounding, "AT_ONCE", at_once)
        monkeypatch.setattr(straight_through, "_has_kernel", lambda weight, dtype: False)
    torch.manual_seed(0)
    layer = RoundingLinear.training(RoundedLinear.rounded(torch.nn.Linear(70, 5), bits))
    with torch.no_grad():
        layer.weight *= 1.1  # some are out of range now
    weight, scale = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.scale))
    by_row = scale.view(5, -1, 1).expand(-1, -1, 70 if bits == 8 else GROUP).flatten(1)[:, :70]
    x = (weight / by_row).clamp(*RANGE[bits])
    expected = (x + (x.round() - x).detach()) * by_row
    assert (x == RANGE[bits][0]).any()
    assert torch.allclose(layer.rounded_weight(), expected, atol=1e-6)
    g = torch.randn(5, 70)
    layer.rounded_weight().backward(g)
    expected.backward(g)
    assert torch.allclose(layer.weight.grad, weight.grad)
    assert torch.allclose(layer.scale.grad, scale.grad, rtol=1e-4, atol=1e-5)


def test_weights_rounded_together_are_those_rounded_one_by_one():
    torch.manual_seed(0)
    sizes = [(70, 5, 4), (64, 3, 4), (96, 8, 4), (64, 3, 3), (70, 5, 8), (70, 2, 8), (64, 3, 8)]
    layers = [RoundedLinear.rounded(torch.nn.Linear(n, out), bits) for n, out, bits in sizes]
    layers = [RoundingLinear.training(layer) for layer in layers]
    alone = copy.deepcopy(layers)
    for _ in range(2):  # once more after a step
        straight_through._round_together(layers)
        for layer, other in zip(layers, alone, strict=True):
            assert torch.equal(layer.rounded_weight(), other.rounded_weight())
        for some in (layers, alone):
            sum(m.rounded_weight().square().sum() for m in some).backward()
            torch.optim.SGD([p for m in some for p in (m.weight, m.scale)], lr=0.03).step()
        for layer, other in zip(layers, alone, strict=True):
            assert torch.equal(layer.weight.grad, other.weight.grad)
            assert torch.allclose(layer.scale.grad, other.scale.grad)
            assert torch.equal(layer.rounded_weight(), other.rounded_weight())  # nothing of before the step is left
            layer.load_state_dict(other.state_dict())


def test_without_a_compiler_rounded_weights_train_all_the_same(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "_is_loaded", lambda: False)
    monkeypatch.setattr(straight_through, "_has_kernel", lambda weight, dtype: False)
    task, model = make_task(), tiny()
    model.set_submodule("model.layers.0.mlp.up_proj", RoundedLinear.rounded(model.model.layers[0].mlp.up_proj, 8))
    before = model.model.layers[0].mlp.up_proj.weight
    bs.heal(model, task, tiny(), steps=2, batch_size=4, lr=1e-2)
    assert "there is no no-such-compiler" in caplog.text
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 33), (64, 96)])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_kernel_rounds_what_trains_as_torch_does(bits, outputs, inputs, dtype, monkeypatch):
    kernels.load(cache() / "kernels")
    torch.manual_seed(0)
    weight, g = torch.randn(outputs, inputs), torch.randn(outputs, inputs, dtype=dtype)
    scale = 0.7 * nearest(weight, bits)[1]  # some are out of range
    found = []
    for there in (True, False):
        monkeypatch.setattr(straight_through, "_has_kernel", lambda weight, dtype, there=there: there)
        w, s = (x.clone().requires_grad_() for x in (weight, scale))
        made = straight_through._Rounding.apply(w, s, bits, dtype)
        made.backward(g)
        found.append((made, w.grad, s.grad))
    (made, of_weight, of_scale), expected = found
    assert torch.equal(made, expected[0])
    assert torch.equal(of_weight, expected[1])
    assert torch.allclose(of_scale, expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (48, 64), (70, 32), (64, 40)])
@pytest.mark.parametrize("tokens", [1, 3, 40, 70])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_few_bits_by_the_kernel_are_what_their_weight_computes(bits, device, inputs, outputs, tokens):
    torch.manual_seed(0)
    layer = RoundedLinear.rounded(torch.nn.Linear(inputs, outputs, dtype=torch.bfloat16, device=device), bits)
    x = torch.randn(2, tokens, inputs, dtype=torch.bfloat16, device=device)
    for _ in range(2):  # once more after the weights have changed
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        assert (layer(x).double() - exact).abs().max() < 0.01 * exact.abs().max()
        with torch.no_grad():
            layer.q[:, -1] += 1  # the exponent of the scales of a row
    trained = x.clone().requires_grad_()
    layer(trained).sum().backward()
    assert trained.grad.abs().sum() > 0


def test_what_is_multiplied_out_has_the_very_weights_and_comes_back(bases, ids):
    model = copy.deepcopy(bases)
    for group in groups(model):
        group.round(model, 32, 16, (8, 4))
    round_table(model, 8)
    model.bfloat16()
    modules, whole = dict(model.named_modules()), logits(model, ids)
    few = [name for name, m in modules.items() if isinstance(m, RoundedLinear) and m.bits == 4]
    with multiplied_out(model):
        for name in few:
            assert torch.equal(model.get_submodule(name).weight.float(), copy.deepcopy(modules[name]).float().weight)
        apart = logits(model, ids)
    assert few
    assert (apart - whole).norm() < 0.02 * whole.norm()
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, ids), whole)


@given(st.integers(1, 9), st.integers(1, 130), st.sampled_from([8, 4, 3, 2]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_the_nearest_and_takes_the_bytes_that_it_says(rows, inputs, bits, seed):
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    q, scale = nearest(weight, bits)
    lowest, highest = RANGE[bits]
    assert q.min() >= lowest
    assert q.max() <= highest
    each = scale[:, None] if bits == 8 else scale.repeat_interleave(GROUP, 1)[:, :inputs]
    inside = (weight / each >= lowest) & (weight / each <= highest)  # others are cut off
    assert ((restored(q, scale) - weight).abs() <= 0.5001 * each.abs())[inside].all()
    layer = RoundedLinear.of(torch.nn.Linear(inputs, rows, bias=False), q, scale, bits)
    assert all(torch.equal(a, b) for a, b in zip(layer.numbers(), (q, scale), strict=True))
    assert stored_bytes(rows, inputs, bits) == layer.q.numel() + (2 * rows if bits == 8 else 0)
    before = layer.weight
    assert torch.equal(before, restored(q, scale))
    layer.widen()
    assert torch.equal(layer.weight, before)
    assert layer.bits == max(bits, 4)


@given(st.integers(1, 5), st.integers(1, 130), st.sampled_from([4, 3, 2]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_scales_of_8_bits_are_near_to_any_and_stay_what_they_are(rows, groups, bits, seed):
    """Whatever their size: 4 bits of precision as long as a scale is not far below the largest of its row."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, groups, generator=generator) * torch.logspace(-20, 20, rows)[:, None]
    scale[:, : groups // 3] *= torch.logspace(-12, 0, groups // 3)
    found = storable(scale)
    assert torch.equal(storable(found), found)
    assert found.all()
    large = scale.abs() > scale.abs().amax(1, keepdim=True) / 2**13
    assert ((found - scale).abs() <= scale.abs() / 16)[large].all()
    q = torch.zeros(rows, groups * GROUP, dtype=torch.int8)
    assert torch.equal(unpacked(packed(q, found, bits), groups * GROUP, bits)[1], found)
    some = packed(q, found, bits)[:1]  # rows need nothing but themselves
    assert torch.equal(unpacked(some, groups * GROUP, bits)[1], found[:1])


def moment(n, samples):
    x = torch.randn(n, samples)
    return (x @ x.T / samples + 0.05 * torch.eye(n)).double()


def lost(error, g, a):
    """`tr(error^T G error A)`"""
    return float((error.double().T @ g @ error.double() * a).sum())


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (48, 64)])
def test_costs_of_rounding_are_the_loss_in_the_metric_that_it_makes(outputs, inputs, fed):
    torch.manual_seed(0)
    a, g = moment(inputs, inputs // 2), moment(outputs, outputs // 2)
    w = torch.randn(outputs, inputs)
    u, s, v = metrics.decompose([w], [g], a)
    of_g, of_a = Side(g.diagonal()), Side(a.diagonal())
    if fed:
        of_g, of_a = Side.of(of_g.alone, u.T), Side.of(of_a.alone, v)
    bases = Side(torch.ones(48))
    for bits in (8, 4, 3, 2):
        wide, long = factors(u.float(), s.float(), v.float())
        rounded = restored(*fed_back(wide, bits, bases, of_g)) @ restored(*fed_back(long, bits, of_a, bases))
        said = float(basis_costs(u.float(), s.float(), v.float(), [bits], of_g, of_a)[bits].sum())
        least = 0.6 if bits == 2 else 0.7  # what makes up for the errors of others leaves the range of so few numbers
        assert least < said / lost(rounded - w, g, a) < 1.4
        made = fed_back(w, bits, of_a, of_g)
        assert least < dense_cost(w, bits, of_g, of_a) / lost(restored(*made) - w, g, a) < 1.4


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 70), (70, 96)])
def test_errors_that_are_fed_back_cost_less(outputs, inputs, bits):
    """On the side whose second moment all bases give; in as many bytes."""
    torch.manual_seed(0)
    a, g = moment(inputs, 20), moment(outputs, 20)
    w = torch.randn(outputs, inputs)
    u, _, v = metrics.decompose([w], [g], a)
    of_g, of_a = Side.of(g.diagonal(), u.T), Side.of(a.diagonal(), v)
    assert (of_a.root is None) == (inputs > outputs)
    assert (of_g.root is None) == (outputs > inputs)
    for side, exact in ((of_g, g), (of_a, a)):
        if side.root is not None:
            exact = exact[side.order][:, side.order]
            assert torch.allclose(side.root.T @ side.root @ exact, torch.eye(len(exact)).double(), atol=1e-6)
            assert torch.equal(side.root, side.root.triu())
    found = [fed_back(w, bits, of_a, of_g), fed_back(w, bits, Side(of_a.alone), Side(of_g.alone))]
    fed, nearest_ = (lost(restored(*made) - w, g, a) for made in found)
    assert fed < 0.6 * nearest_
    assert [x.shape for x in found[0]] == [x.shape for x in found[1]]


def test_prices_are_the_bytes_of_tensors_and_values_grow_with_bits(bases):
    for group in groups(bases):
        found = {form: (price, value) for form, price, value in forms(group, 16)}
        assert found[Form(None, 8)][1] > found[Form(None, 4)][1] > found[Form(None, 3)][1]
        assert found[Form(48, 8)][1] > found[Form(48, 4)][1] > found[Form(48, 3)][1]
        for form in (Form(None, 4), Form(None, 3), Form(48, head=32), Form(32, 8), Form(48, 3, 32, 4)):
            model = copy.deepcopy(bases)
            here = next(g for g in groups(model) if g.names == group.names)
            form.put(here, model)
            tensors = {n: t for n, t in model.state_dict().items() if n.startswith(tuple(f"{m}." for m in group.names))}
            held = sum(t.numel() * (1 if n.endswith(".q") else 2) for n, t in tensors.items())
            assert held < found[form][0] <= held + sum(len(n) + 95 for n in tensors)


def test_the_less_rounding_counts_the_more_numbers_of_fewer_bits_are_chosen(bases, task):
    found = [
        bs.sizes(bs.prune(copy.deepcopy(bases), task, size="5x", bits="auto", multiple_of=4, rounding=share))
        for share in (1, 0.01)
    ]
    counted, mended = ({int(b): n for b, n in sizes["bits"].items()} for sizes in found)
    assert sum(mended.values()) > sum(counted.values())
    assert mended[2] > counted.get(2, 0)
    assert mended[2] > 0.8 * sum(mended.values())


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_the_best_choices_never_cost_more_and_leave_out_nothing_that_fits(points):
    climbs = [rising([((i, j), price, value) for j, (price, value) in enumerate(p)]) for i, p in enumerate(points)]
    for climb in climbs:
        assert all(a[1] < b[1] and a[2] < b[2] for a, b in itertools.pairwise(climb))
    prices = {choice: price for climb in climbs for choice, price, _ in climb}
    least, most = sum(c[0][1] for c in climbs), sum(c[-1][1] for c in climbs)
    for budget in (least, (least + most) // 2, most):
        chosen = best_for(climbs, budget, "bytes")
        assert sum(prices[choice] for choice in chosen) <= budget
    assert chosen == [climb[-1][0] for climb in climbs]
    with pytest.raises(ValueError, match=f"smallest possible is {least:,} bytes"):
        best_for(climbs, least - 1, "bytes")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0.5}, "give a size such as 45MB or 6x"),
        ({"size": "20K"}, "give a size such as 45MB or 6x"),
        ({"size": "2x", "budget": "uniform"}, "score=energy and budget=global"),
        ({"size": "2x", "reserve": 4}, "without new bases"),
        ({"size": "2x", "dtype": "float32"}, "bfloat16 or float16"),
        ({"size": "1KB"}, "the smallest possible is"),
        ({"size": "1GB"}, "more than the model has"),
        ({"size": "2x", "bits": 3}, "bits is 3"),
        ({"size": "2x", "bits": 16, "rounding": 0.1}, "choose bits=auto"),
        ({"size": "2x", "rounding": 0}, "rounding is 0, it should be a fraction"),
    ],
)
def test_what_cannot_be_shared_in_bytes_is_said_in_a_sentence(bases, task, options, says):
    with pytest.raises(ValueError, match=says):
        bs.prune(copy.deepcopy(bases), task, **{"bits": "auto", "multiple_of": 4, **options})


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_largest_share_is_known_without_values(kind):
    model, asked = tiny(kind, tied=True), target(size="8x")
    with torch.device("meta"):
        empty = type(model)._from_config(model.config)
    found = [largest_share(m, targets(m), asked, "bfloat16") for m in (model, empty)]
    assert found[0] == found[1]
    assert 0.2 < found[0] < 1


def test_a_checkpoint_of_version_1_loads(ids, tmp_path):
    model = to_int8(bs.prune(decomposed(), keep=0.5, multiple_of=4))
    folder = bs.save(model, make_tokenizer(), tmp_path / "now")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    said = config["quantization_config"]
    bits = said.pop("bits")
    said |= {"format_version": 1, "int8": list(bits)}
    del said["heads"], said["table"]
    path.write_text(json.dumps(config))
    (folder / "basis_select.json").unlink()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_checkpoint_of_version_2_loads_with_the_weights_that_it_had(bases, ids, tmp_path, caplog):
    """There weights of 4 and 3 bits had scales of 16 bits in a tensor of their own."""
    model = copy.deepcopy(bases)
    for group, form in zip(
        groups(model), itertools.cycle([Form(48, 3, 32, 4), Form(None, 4), Form(48, 8)]), strict=False
    ):
        form.put(group, model)
    folder = bs.save(model, make_tokenizer(), tmp_path / "now")
    tensors = load_file(folder / "model.safetensors")
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, RoundedLinear) and m.bits < 8]:
        tensors[f"{name}.q"], scale = apart(layer.q, layer.in_features, layer.bits)
        tensors[f"{name}.q"] = tensors[f"{name}.q"].contiguous()
        tensors[f"{name}.scale"] = 1.01 * scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 2'))
    (folder / "basis_select.json").unlink()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert "of format version 2: its weights of 4 and 3 bits are held in 16 bits" in caplog.text
    assert {*quantized(again).values()} == {8}
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, RoundedLinear)]:
        expected = layer.weight if layer.bits == 8 else 1.01 * layer.weight
        assert torch.allclose(again.get_submodule(name).weight, expected)
    kept, _ = bs.load(bs.save(again, make_tokenizer(), tmp_path / "again"))
    assert torch.equal(logits(kept, ids), logits(again, ids))


def test_weighted_bases_of_version_1_count_every_error_alike(ids, tmp_path):
    config = BasisSelectConfig(ranks={"model.layers.0.mlp.down_proj": 64}, weighted=1, format_version=1)
    model = tiny()
    bs.checkpoint.format.build(model, config)
    layer = model.model.layers[0].mlp.down_proj
    assert not [name for name in layer.state_dict() if "cost" in name]
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    assert all(torch.isfinite(torch.tensor(value)) for _, _, value in forms(groups(model)[0]))


@pytest.mark.slow
def test_a_recipe_says_its_size_in_bytes(tmp_path):
    options = {
        "tune": {"steps": 2, "batch_size": 4},
        "decompose": {"examples": 8},
        "learn": {"steps": 0},
        "prune": {"size": "4x", "bits": "auto", "multiple_of": 4},
        "heal": {"steps": 2, "batch_size": 4},
        "data": {"train": 32, "validation": 8, "test": 8},
    }
    recipe = read(addition_recipe(tmp_path, tiny(tied=True, dtype="bfloat16"), 9, **options))
    assert "MB at most" in text(plan(recipe))
    results = run(recipe, tmp_path / "run")
    found = results["result"]["sizes"]
    assert found["bytes"] == weight_bytes(tmp_path / "run" / "final")
    assert found["bytes"] * 4 <= 2 * found["parameters_dense"]
    assert found["bits"].keys() == {"8", "4", "3", "2"}
