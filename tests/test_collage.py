import copy

import pytest
import torch

from basis_select.training.collage import VARIANTS, CollageAdamW, join, split

BF16 = torch.bfloat16


def normal(n, seed, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def exact(x, low):
    return x.double() + low.double()


def change(x, low, function):
    """The pairs become those of `function` of the sums that they stand for."""
    split([function(join([x], [low])[0])], [x], [low])


def steps_on(variant, values, gradients, **options):
    """A parameter after one step for each row of `gradients`, and its optimizer."""
    p = torch.nn.Parameter(values.clone())
    optimizer = CollageAdamW([p], variant=variant, **options)
    for g in gradients:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1.0])
def test_a_pair_adds_as_exactly_as_two_numbers_can(scale):
    x, low, a = normal(5000, 0).bfloat16(), torch.zeros(5000, dtype=BF16), normal(5000, 1, scale).bfloat16()
    smaller = a.abs() <= x.abs()
    want = exact(x, low) + a.double()
    change(x, low, lambda value: value + a)
    error = (exact(x, low) - want).abs() / want.abs().clamp_min(1e-30)
    assert error[smaller].max() <= 2**-16
    assert (low.double().abs() <= 2**-8 * x.double().abs()).all()  # the two stay apart


def test_a_thousand_small_additions_are_not_lost():
    x = normal(5000, 0).bfloat16()
    low, a, start = torch.zeros_like(x), torch.full_like(x, 1e-4), x.double()
    for _ in range(1000):
        change(x, low, lambda value: value + a)
    moved = exact(x, low) - start
    assert abs(moved.mean() / (1000 * a[0].double()) - 1) < 0.01


@pytest.mark.parametrize("factor", [0.999, 0.98, 0.95])
def test_a_pair_times_a_number_that_bfloat16_cannot_hold(factor):
    x = normal(5000, 0).square().bfloat16()
    low = torch.zeros_like(x)
    start = x.double()
    for _ in range(50):
        change(x, low, lambda value: value * factor)
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


def rounded(value):
    """The nearest pair of bfloat16 numbers, as docs/how_it_works.md writes it."""
    high = value.bfloat16()
    return high, (value - high.float()).bfloat16()


@pytest.mark.parametrize("variant", ["plus", "light", "kahan", "plain", "master"])
def test_a_step_is_adamw_in_fp32_between_one_rounding_of_all_that_is_kept(variant):
    """Bit for bit, over steps: the formula of docs/how_it_works.md with torch's AdamW between joining and rounding."""
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
    gradients = [normal(3000, i + 1).bfloat16() for i in range(5)]
    p, optimizer = steps_on(variant, normal(3000, 0).bfloat16(), gradients, **options)
    high, low = normal(3000, 0).bfloat16(), torch.zeros(3000, dtype=BF16)
    exp_avg, exp_avg_sq, sq_low = (torch.zeros(3000, dtype=BF16) for _ in range(3))
    whole = high.float()
    moments = exp_avg.float(), exp_avg_sq.float()
    for step, g in enumerate(gradients):
        theta = {"master": whole, "kahan": low.float(), "plain": high.float()}.get(variant, high.float() + low.float())
        if variant == "kahan":  # decays as the whole parameter would
            theta, decay = theta - 1e-4 * high.float(), 0.0
        else:
            decay = 0.1
        m, v = moments if variant == "master" else (exp_avg.float(), exp_avg_sq.float() + sq_low.float())
        theta = torch.nn.Parameter(theta.clone())
        theta.grad = g.float()
        adamw = torch.optim.AdamW([theta], fused=True, **{**options, "weight_decay": decay})
        count = torch.tensor(float(step))
        adamw.state[theta] = {"step": count, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        adamw.step()
        theta, state = theta.detach(), adamw.state[theta]
        moments = state["exp_avg"], state["exp_avg_sq"]
        exp_avg = state["exp_avg"].bfloat16()
        exp_avg_sq, rest = rounded(state["exp_avg_sq"])
        sq_low = rest if variant == "plus" else sq_low
        if variant in ("plus", "light"):
            high, low = rounded(theta)
        elif variant == "kahan":
            pending = theta.bfloat16()
            total = high + pending
            high, low = total, pending - (total - high)
        else:
            whole, high = theta, theta.bfloat16()
    assert torch.equal(p, high)
    kept = optimizer.state[p]
    want = {"low": low, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "exp_avg_sq_low": sq_low, "master": whole}
    if variant == "master":
        want |= {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
    for name, value in kept.items():
        assert name == "step" or torch.equal(value, want[name]), name


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
