"""What weights are rounded to, what that costs, and layers of few bits as they train and as kernels have them."""

import copy

import pytest
import torch
from conftest import make_task, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import basis_select as bs
from basis_select.layers import kernels, rounding, straight_through
from basis_select.layers.rounded import RoundedLinear
from basis_select.layers.rounding import (
    GROUP,
    RANGE,
    Side,
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

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


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
        kernels.load()
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


def test_without_a_compiler_rounded_weights_train_all_the_same(monkeypatch, unloaded, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    task, model = make_task(), tiny()
    model.set_submodule("model.layers.0.mlp.up_proj", RoundedLinear.rounded(model.model.layers[0].mlp.up_proj, 8))
    before = model.model.layers[0].mlp.up_proj.weight
    bs.heal(model, task, tiny(), steps=2, batch_size=4, lr=1e-2)
    assert caplog.text.count("there is no no-such-compiler") == 1
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 33), (64, 96)])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_kernel_rounds_what_trains_as_torch_does(bits, outputs, inputs, dtype, monkeypatch):
    kernels.load()
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


@pytest.mark.parametrize("tokens", [3, 17])
def test_weights_of_8_bits_in_float32_compute_under_autocast(tokens):
    layer = RoundedLinear.rounded(torch.nn.Linear(64, 32).requires_grad_(False), 8)
    x = torch.randn(64, tokens).T  # no rows of its own
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
    assert (found.float() - layer(x)).norm() < 0.02 * layer(x).norm()


def test_a_layer_becomes_an_nn_linear_without_drawing_weights():
    layer, before = RoundedLinear.rounded(torch.nn.Linear(70, 5), 4), torch.get_rng_state()
    linear = layer.to_linear()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(linear.weight, layer.weight)
    assert torch.equal(linear.bias, layer.bias)
