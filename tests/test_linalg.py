import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basis_select.layers.shape import Shape
from basis_select.linalg.budget import allocate, by_mass, linear_prices, table_rank
from basis_select.linalg.metrics import METRICS, decompose, shifted, shrunk
from basis_select.linalg.scores import SCORES
from basis_select.target import target


def moment(n, seed, tokens=None):
    x = torch.randn(tokens or 4 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def weights(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def test_a_shrunk_moment_is_nearer_the_truth_than_the_sample_and_has_a_root_even_when_it_was_singular():
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(3, -3, 40, dtype=torch.float64)  # few directions carry the trace
    for samples in (5, 40, 400):
        x = torch.randn(200, samples, 40, generator=g, dtype=torch.float64) * scale.sqrt()
        errors = [[], []]
        for m in x.transpose(1, 2) @ x / samples:
            for error, estimate in zip(errors, (m, shrunk(m, samples)), strict=True):
                error.append(float((estimate - scale.diag()).square().sum()))
            assert torch.linalg.cholesky(shrunk(m, samples)).isfinite().all()
        assert sum(errors[1]) < sum(errors[0])


def test_what_a_moment_is_shrunk_by_falls_with_the_number_of_samples():
    m = moment(40, 0)
    spread = [float((shrunk(m, n) - m).norm()) for n in (10, 100, 1000, 10**6)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 1e-4 * float(m.norm())
    assert all(shrunk(m, n).trace() == pytest.approx(float(m.trace())) for n in (1, 10, 1000))
    one = torch.zeros(40, 40)
    one[0, 0] = 40.0  # one direction carries all
    assert float(shrunk(one, 1000)[1, 1]) == pytest.approx(2 / 1000, rel=0.1)
    assert torch.equal(shrunk(torch.eye(3), 10), torch.eye(3).double())


@pytest.mark.parametrize("low", [-1e-7, -1e-3])
def test_a_moment_that_rounding_left_with_eigenvalues_below_zero_has_a_root(low):
    q = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    broken = q * torch.cat([torch.ones(15), torch.full((5,), low)]) @ q.T
    (w,) = weights((30, 20))
    u, s, v = decompose([w], None, broken)
    assert torch.allclose(u @ s.diag() @ v, w.double(), atol=1e-6)


def test_a_moment_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="non-finite"):
        shrunk(torch.full((3, 3), float("nan")), 10)
    with pytest.raises(ValueError, match="zero"):
        shrunk(torch.zeros(3, 3), 10)


@pytest.mark.parametrize("shapes", [((12, 9), (5, 9)), ((4, 20), (5, 20))])
@pytest.mark.parametrize("moments", ["none", "input", "output", "stacked", "both", "isotropic"])
def test_all_bases_together_are_the_weight(moments, shapes):
    w, sizes, columns = weights(*shapes), [shape[0] for shape in shapes], shapes[0][1]
    gs = [shrunk(moment(n, i), 100) for i, n in enumerate(sizes)] if moments in ("output", "both") else None
    if moments == "stacked":
        gs = [shrunk(moment(sum(sizes), 1), 100)]
    a = shrunk(moment(columns, 3), 100) if moments in ("input", "both", "stacked") else None
    if moments == "isotropic":
        gs, a = [shrunk(torch.tensor(4.0), 100), shrunk(torch.tensor(9.0), 100)], shrunk(torch.tensor(2.0), 100)
    u, s, v = decompose(w, gs, a)
    assert torch.allclose(u @ s.diag() @ v, torch.cat(w).double(), atol=1e-10)
    assert torch.equal(s, s.sort(descending=True).values)


@pytest.mark.parametrize("shapes", [((12, 9), (5, 9)), ((4, 20), (5, 20))])
@pytest.mark.parametrize("metric", METRICS)
def test_dropping_bases_costs_their_energy_in_the_metric(metric, shapes):
    w, uses, (first, second), columns = weights(*shapes), METRICS[metric], [shape[0] for shape in shapes], shapes[0][1]
    whole = torch.block_diag(moment(first, 1), moment(second, 2))
    gs = [uses.outputs(whole, 100)] if uses.outputs else None
    a = uses.inputs(moment(columns, 3), 100) if uses.inputs else None
    u, s, v = decompose(w, gs, a)
    error = torch.cat(w).double() - u[:, :4] @ s[:4].diag() @ v[:4]

    def square(m, n):
        return torch.eye(n).double() if m is None else m.diag() if m.dim() == 1 else m

    g, a = square(gs and gs[0], first + second), square(a, columns)
    cost = torch.trace(error.T @ g @ error @ a)
    assert torch.allclose(cost, s[4:].square().sum())


def test_a_shift_is_a_share_of_the_mean_eigenvalue():
    m = moment(6, 0)
    assert torch.allclose(shifted(m, 0.1), m + 0.1 * m.diagonal().mean() * torch.eye(6))
    assert torch.allclose(shifted(m.diagonal(), 0.1), shifted(m, 0.1).diagonal())


def test_scores_of_a_quadratic_loss_are_its_exact_change():
    """L(s) = g.s + s.H.s / 2 around s with H diagonal: removing basis i changes it by exactly its Taylor score."""
    s, h = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64), torch.tensor([0.1, 2.0, 4.0], dtype=torch.float64)
    loss = lambda x: (torch.tensor([0.2, -0.1, 0.3]).double() * x + h * x * x / 2).sum()  # noqa: E731
    g = torch.func.grad(loss)(s)
    change = torch.stack([loss(s * (1 - torch.eye(3)[i].double())) - loss(s) for i in range(3)])
    assert torch.allclose(SCORES["taylor"].of(s, g, h, None), change)
    assert torch.equal(SCORES["energy"].of(s, None, None, None), s**2)
    assert torch.equal(SCORES["magnitude"].of(-s, None, None, None), s)
    draw = [SCORES["random"].of(s, None, None, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draw)


@pytest.mark.parametrize(
    ("ask", "keep"),
    [({"keep": 0.3}, 0.3), ({"size": "2x"}, 0.375), ({"size": "90M"}, 0.875), ({"size": "100MB"}, 0.375)],
)
def test_a_target_meets_the_size_of_the_whole_model(ask, keep):
    assert target(**ask).share(100_000_000, 80_000_000, "bfloat16") == pytest.approx(keep)


def test_what_is_saved_elsewhere_leaves_more_for_the_targeted_layers():
    assert target(size="2x").share(100, 80, "bfloat16", saved=10) == pytest.approx(0.5)
    assert target(size="1x").share(100, 80, "float32") == 1
    rank = table_rank(0.5, Shape(100, (1000,)), 16)
    assert rank % 16 == 0
    assert 1000 * 100 - rank * 1100 >= 50_000


def test_bases_are_those_of_an_eigenvector_root():
    (w,), g, a = weights((12, 9)), moment(12, 1), moment(9, 2)

    def by_eigenvectors(m):
        values, vectors = torch.linalg.eigh(shrunk(m, 100))
        return vectors * values.sqrt()

    r, low = by_eigenvectors(g), by_eigenvectors(a)
    u, s, v = torch.linalg.svd(r.T @ w.double() @ low, full_matrices=False)
    u, v = torch.linalg.solve(r.T, u), v @ torch.linalg.inv(low)
    mine = decompose([w], [shrunk(g, 100)], shrunk(a, 100))
    assert torch.allclose(mine[1], s, rtol=1e-9)
    for i in range(9):  # bases are equal up to a common sign
        assert torch.allclose(torch.outer(mine[0][:, i], mine[2][i]), torch.outer(u[:, i], v[i]), atol=1e-8)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_without_a_metric_it_is_the_svd_and_survives_rank_deficiency(shape):
    g = torch.Generator().manual_seed(0)
    m = torch.randn(*shape, generator=g, dtype=torch.float64)
    u, s, v = decompose([m])
    assert torch.allclose(s, torch.linalg.svdvals(m), rtol=1e-10)
    assert torch.allclose(u.T @ u, torch.eye(20, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(v @ v.T, torch.eye(20, dtype=torch.float64), atol=1e-8)
    m[:, 5:] = m[:, :1]  # rank 5
    u, s, v = decompose([m])
    assert torch.allclose(u @ s.diag() @ v, m, atol=1e-12)
    assert s[5:].max() < 1e-6 * s[0]


def test_decompose_refuses_non_finite_weights():
    with pytest.raises(ValueError, match="non-finite"):
        decompose([torch.tensor([[1.0, float("inf")]])])


layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(layers, st.floats(0.05, 1.0), st.sampled_from([1, 2, 4]))
def test_allocate_never_exceeds_the_budget_and_leaves_no_room_for_another_step(shapes, keep, multiple):
    costs = [i + o for i, o, _ in shapes]
    dense = [i * o for i, o, _ in shapes]
    scores = [
        torch.rand(min(i, o), generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
        for i, o, seed in shapes
    ]
    budget = int(keep * sum(dense))
    try:
        may_become = [linear_prices(Shape(i, (o,)), min(i, o), multiple) for i, o, _ in shapes]
        ranks = allocate(scores, may_become, budget)
    except ValueError as error:
        least = [d if multiple * c >= d else multiple * c for c, d in zip(costs, dense, strict=True)]
        assert sum(least) > budget
        assert f"{sum(least):,}" in str(error)
        return
    spent = [d if r is None else r * c for r, c, d in zip(ranks, costs, dense, strict=True)]
    assert sum(spent) <= budget
    for r, c, d in zip(ranks, costs, dense, strict=True):
        assert r is None or (r % multiple == 0 and r * c < d)
        if r is not None:
            step = d - r * c if (r + multiple) * c >= d else multiple * c
            assert sum(spent) + step > budget


def test_global_prefers_the_layer_whose_bases_are_worth_more_per_parameter():
    strong, weak = torch.linspace(20, 10, 10), torch.linspace(2, 1, 10)

    def prices(cost):
        return [*((rank, rank * cost) for rank in range(1, 11)), (None, 10_000)]

    assert allocate([strong, weak], [prices(10), prices(10)], 110) == [10, 1]
    assert allocate([strong, weak], [prices(100), prices(10)], 300) == [2, 10]


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=5),
    st.floats(0, 1),
    st.integers(),
)
def test_prices_that_do_not_grow_with_the_rank(tables, part, seed):
    """No rank is taken where more cost no more, time is never exceeded, and what fits beside the rest is taken."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    prices = [[*((4 * (i + 1), p) for i, p in enumerate(table[:-1])), (None, table[-1])] for table in tables]
    scores = [torch.rand(40, generator=generator).sort(descending=True).values for _ in tables]
    least, most = (sum(f(p for _, p in choices) for choices in prices) for f in (min, max))
    budget = least + part * (most - least)
    ranks = allocate(scores, prices, budget)
    spent = [dict(choices)[rank] for rank, choices in zip(ranks, prices, strict=True)]
    assert sum(spent) <= budget
    for rank, price, choices in zip(ranks, spent, prices, strict=True):
        larger = choices[[r for r, _ in choices].index(rank) + 1 :]
        assert all(other > price for _, other in larger)
        assert all(sum(spent) + other - price > budget for _, other in larger)
    with pytest.raises(ValueError, match=f"the smallest possible is {least} hours"):
        allocate(scores, prices, least - 1, "hours")


def test_a_rank_that_a_device_likes_is_passed_to_through_one_it_does_not():
    flat = torch.ones(64)
    liked = [(16, 10), (32, 19), (48, 20), (None, 90)]  # 32 to 48 is nearly free: both steps are worth their mean
    plain = [(16, 10), (32, 17), (48, 24), (None, 90)]
    assert allocate([flat, flat], [plain, liked], 30) == [16, 48]
    assert allocate([flat], [[(16, 30), (32, 40), (None, 20)]], 100) == [None]


def test_by_mass_keeps_the_smallest_sufficient_set():
    s = torch.tensor([1.0, 5.0, 3.0, 1.0])
    assert [by_mass(s, share) for share in (0.5, 0.51, 0.8, 0.81, 1.0)] == [1, 2, 2, 3, 4]
