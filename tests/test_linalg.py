import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basis_select.linalg.budget import allocate, by_mass, uniform_scores
from basis_select.linalg.metrics import SHRINKAGE, decompose, root, svd


def moment(n, seed, tokens=None):
    x = torch.randn(tokens or 4 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def weights(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def test_root_reproduces_the_shifted_moment_even_when_it_is_singular():
    m = moment(40, 0, tokens=5)  # rank 5
    r = root(m)
    expected = m + SHRINKAGE * m.diagonal().mean() * torch.eye(40)
    assert torch.allclose(r @ r.T, expected, atol=1e-12)
    assert torch.equal(r, r.tril())


def test_root_refuses_what_has_no_root():
    with pytest.raises(ValueError, match="non-finite"):
        root(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="zero"):
        root(torch.zeros(3, 3))


@pytest.mark.parametrize("roots", ["none", "input", "output", "both", "isotropic"])
def test_all_bases_together_are_the_weight(roots):
    w = weights((12, 9), (5, 9))
    gs = [root(moment(12, 1)), root(moment(5, 2))] if roots in ("output", "both") else None
    a = root(moment(9, 3)) if roots in ("input", "both") else None
    if roots == "isotropic":
        gs, a = [root(torch.tensor(4.0)), root(torch.tensor(9.0))], root(torch.tensor(2.0))
    u, s, v = decompose(w, gs, a)
    assert torch.allclose(u @ s.diag() @ v, torch.cat(w).double(), atol=1e-10)
    assert torch.equal(s, s.sort(descending=True).values)


def test_dropping_bases_costs_their_energy_in_the_metric():
    w = weights((12, 9), (5, 9))
    gs, a = [root(moment(12, 1)), root(moment(5, 2))], root(moment(9, 3))
    u, s, v = decompose(w, gs, a)
    error = (torch.cat(w).double() - u[:, :4] @ s[:4].diag() @ v[:4]).split([12, 5])
    cost = sum(((g.T @ e @ a) ** 2).sum() for g, e in zip(gs, error, strict=True))
    assert torch.allclose(cost, s[4:].square().sum())


def test_a_triangular_root_gives_the_same_bases_as_an_eigenvector_root():
    (w,), g, a = weights((12, 9)), moment(12, 1), moment(9, 2)

    def by_eigenvectors(m):
        values, vectors = torch.linalg.eigh(m + SHRINKAGE * m.diagonal().mean() * torch.eye(len(m)))
        return vectors * values.sqrt()

    r, low = by_eigenvectors(g), by_eigenvectors(a)
    u, s, v = torch.linalg.svd(r.T @ w.double() @ low, full_matrices=False)
    u, v = torch.linalg.solve(r.T, u), v @ torch.linalg.inv(low)
    mine = decompose([w], [root(g)], root(a))
    assert torch.allclose(mine[1], s, rtol=1e-9)
    for i in range(9):  # bases are equal up to a common sign
        assert torch.allclose(torch.outer(mine[0][:, i], mine[2][i]), torch.outer(u[:, i], v[i]), atol=1e-8)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_svd_agrees_with_the_bidiagonal_one_and_survives_rank_deficiency(shape):
    g = torch.Generator().manual_seed(0)
    m = torch.randn(*shape, generator=g, dtype=torch.float64)
    u, s, v = svd(m)
    assert torch.allclose(s, torch.linalg.svdvals(m), rtol=1e-10)
    assert torch.allclose(u.T @ u, torch.eye(20, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(v @ v.T, torch.eye(20, dtype=torch.float64), atol=1e-10)
    m[:, 5:] = m[:, :1]  # rank 5
    u, s, v = svd(m)
    assert torch.allclose(u @ s.diag() @ v, m, atol=1e-12)
    assert s[5:].max() < 1e-6 * s[0]


def test_decompose_refuses_non_finite_weights():
    with pytest.raises(ValueError, match="non-finite"):
        decompose([torch.tensor([[1.0, float("inf")]])])


layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(layers, st.floats(0.05, 1.0), st.sampled_from([1, 2, 4]), st.booleans())
def test_allocate_never_exceeds_the_budget_and_leaves_no_room_for_another_step(shapes, keep, multiple, uniform):
    costs = [i + o for i, o, _ in shapes]
    dense = [i * o for i, o, _ in shapes]
    scores = [
        uniform_scores(min(i, o), i + o, i * o)
        if uniform
        else torch.rand(min(i, o), generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
        for i, o, seed in shapes
    ]
    budget = int(keep * sum(dense))
    try:
        ranks = allocate(scores, costs, dense, budget, multiple)
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
    assert allocate([strong, weak], [10, 10], [10_000, 10_000], 110, 1) == [10, 1]
    assert allocate([strong, weak], [100, 10], [10_000, 10_000], 300, 1) == [2, 10]


def test_by_mass_keeps_the_smallest_sufficient_set():
    s = torch.tensor([1.0, 5.0, 3.0, 1.0])
    assert by_mass(s, 0.5).tolist() == [1]
    assert by_mass(s, 0.51).tolist() == [1, 2]
    assert by_mass(s, 1.0).tolist() == [0, 1, 2, 3]
