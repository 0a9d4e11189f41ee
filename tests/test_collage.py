import copy

import pytest
import torch

from basis_select.training.collage import VARIANTS, CollageAdamW, join, split

BF16 = torch.bfloat16


def normal(n, seed, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def exact(x, low):
    return x.double() + low.double()


def grow(x, low, a):
    split([join([x], [low])[0] + a], [x], [low])


def mul(x, low, b):
    split([join([x], [low])[0] * b], [x], [low])


def steps_on(variant, values, gradients, **options):
    """A parameter after one step for each row of `gradients`, and its optimizer."""
    p = torch.nn.Parameter(values.clone())
    optimizer = CollageAdamW([p], variant=variant, **options)
    for g in gradients:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1.0])
def test_grow_adds_as_exactly_as_two_numbers_can(scale):
    x, low, a = normal(5000, 0).bfloat16(), torch.zeros(5000, dtype=BF16), normal(5000, 1, scale).bfloat16()
    smaller = a.abs() <= x.abs()
    want = exact(x, low) + a.double()
    grow(x, low, a)
    error = (exact(x, low) - want).abs() / want.abs().clamp_min(1e-30)
    assert error[smaller].max() <= 2**-16
    assert (low.double().abs() <= 2**-8 * x.double().abs()).all()  # the two stay apart


def test_a_thousand_small_additions_are_not_lost():
    x = normal(5000, 0).bfloat16()
    low, a, start = torch.zeros_like(x), torch.full_like(x, 1e-4), x.double()
    for _ in range(1000):
        grow(x, low, a)
    moved = exact(x, low) - start
    assert abs(moved.mean() / (1000 * a[0].double()) - 1) < 0.01


@pytest.mark.parametrize("factor", [0.999, 0.98, 0.95])
def test_mul_by_a_number_that_bfloat16_cannot_hold(factor):
    x = normal(5000, 0).square().bfloat16()
    low = torch.zeros_like(x)
    start = x.double()
    for _ in range(50):
        mul(x, low, factor)
    assert ((exact(x, low) / (start * factor**50) - 1).abs().max()) < 50 * 2**-16


@pytest.mark.parametrize(("variant", "decays"), [("plus", True), ("light", False), ("plain", False)])
def test_only_plus_forgets_old_gradients_at_a_beta2_of_0999(variant, decays):
    values = normal(500, 0).bfloat16()
    first = normal(500, 1)[None]
    p, optimizer = steps_on(variant, values, torch.cat([first, torch.zeros(1000, 500)]), lr=0.0, betas=(0.9, 0.999))
    state = optimizer.state[p]
    now = exact(state["exp_avg_sq"], state["exp_avg_sq_low"] if variant == "plus" else torch.zeros(500))
    want = 0.001 * first[0].bfloat16().double().square() * 0.999**1000
    assert ((now / want - 1).abs().mean() < 0.02) == decays


@pytest.fixture(scope="module")
def reference():
    """1,000 AdamW steps of 1e-4 on N(0, 1) values with noisy gradients, in float64."""
    values = normal(4000, 0).bfloat16()
    generator = torch.Generator().manual_seed(1)
    direction = normal(4000, 2).sign()
    gradients = [(direction + torch.randn(4000, generator=generator)).bfloat16() for _ in range(1000)]
    p = torch.nn.Parameter(values.double())
    optimizer = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0)
    for g in gradients:
        p.grad = g.double()
        optimizer.step()
    return values, gradients, p.detach() - values.double()


@pytest.mark.parametrize(
    ("variant", "worst"), [("plus", 0.05), ("light", 0.2), ("kahan", 0.2), ("stochastic", 0.3), ("master", 0.01)]
)
def test_a_thousand_steps_end_near_float64(reference, variant, worst):
    values, gradients, change = reference
    torch.manual_seed(0)
    p, optimizer = steps_on(variant, values, gradients, lr=1e-4)
    state = optimizer.state[p]
    end = state["master"].double() if variant == "master" else exact(p.detach(), state.get("low", torch.zeros(4000)))
    assert ((end - values.double() - change).norm() / change.norm()) < worst


def test_plain_bfloat16_loses_nearly_all_of_them(reference):
    values, gradients, change = reference
    p, _ = steps_on("plain", values, gradients, lr=1e-4)
    assert ((p.detach().double() - values.double() - change).norm() / change.norm()) > 0.8


def test_quality_says_what_was_lost(reference):
    values, gradients, _ = reference
    found = {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        p, optimizer = steps_on(variant, values, gradients[:20], lr=1e-4)
        p.grad, optimizer.measure = gradients[20], True
        optimizer.step()
        found[variant] = optimizer.quality
    assert found["plus"]["descent_quality"] > 0.99
    assert found["plus"]["lost_updates"] < 0.02
    assert found["plain"]["descent_quality"] < 0.2
    assert found["plain"]["lost_updates"] > 0.8
    assert found["master"]["descent_quality"] > 0.99


def test_fp32_parameters_get_ordinary_adamw():
    values, gradients = normal(300, 0), [normal(300, i + 1) for i in range(20)]
    p, _ = steps_on("plus", values, gradients, lr=1e-2, weight_decay=0.1)
    q = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1)
    for g in gradients:
        q.grad = g
        optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_state_continues_bit_for_bit(variant):
    values, gradients = normal(300, 0).bfloat16(), [normal(300, i + 1) for i in range(8)]
    torch.manual_seed(0)
    whole, _ = steps_on(variant, values, gradients, lr=1e-3)
    torch.manual_seed(0)
    half, optimizer = steps_on(variant, values, gradients[:4], lr=1e-3)
    again = torch.nn.Parameter(half.detach().clone())
    resumed = CollageAdamW([again], lr=1e-3, variant=variant)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for g in gradients[4:]:
        again.grad = g.bfloat16()
        resumed.step()
    assert torch.equal(again, whole)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'pluss'; known are plus, light"):
        CollageAdamW([torch.nn.Parameter(torch.zeros(2))], variant="pluss")
