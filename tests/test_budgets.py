"""What every budget promises, on layers of random shapes with random spectra: any way to choose ranks must keep it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from basis_select.layers.group import groups
from basis_select.layers.learning import LearningLinear
from basis_select.layers.shape import Shape
from basis_select.linalg.budget import linear_prices
from basis_select.selection import Rule, cut, of_groups
from basis_select.target import target

layers = st.lists(
    st.tuples(st.integers(2, 60), st.integers(2, 60), st.floats(0, 4), st.integers(0, 10**6)), min_size=1, max_size=8
)
multiples = st.sampled_from([1, 2, 4, 16])
often = settings(deadline=None, max_examples=80)


def weighted(shapes):
    """Layers of (in, out, decay of the spectrum, seed), with all their bases, in no order."""
    model = torch.nn.ModuleList()
    for inputs, outputs, decay, seed in shapes:
        rank = min(inputs, outputs)
        layer = LearningLinear(inputs, outputs, rank, bias=False)
        noise = torch.rand(rank, generator=torch.Generator().manual_seed(seed)) + 0.1
        order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
        layer.s.scale = (noise * torch.arange(1.0, rank + 1) ** -decay)[order]
        model.append(layer)
    return model.requires_grad_(False)


def costs_of(shapes):
    return [i + o for i, o, *_ in shapes], [i * o for i, o, *_ in shapes]


def select(model, keep=None, mass=None, cuts=0, **how):
    asked, rule = target(keep=keep, mass=mass), Rule(**how)
    return cut(model, asked, rule, cuts) if cuts else of_groups(groups(model), asked, rule, keep)


def chosen_or_too_little(model, shapes, keep, multiple, **how):
    """What is chosen, or None where the least that can be kept is said to be more than the budget, and is."""
    costs, dense = costs_of(shapes)
    try:
        return [index for _, index in select(model, keep, multiple_of=multiple, **how)]
    except ValueError as error:
        assert ("smallest possible" in str(error)) or ("bases in every layer" in str(error))
        least = sum(min(multiple * c, d) for c, d in zip(costs, dense, strict=True))
        assert least > int(keep * sum(dense))
        return None


def prices_and_values(model, shapes, multiple):
    """Of every layer `[(price, energy kept), ...]` of what it may become, and the position of a rank among them."""
    found = []
    for layer, (i, o, *_) in zip(model, shapes, strict=True):
        energy = layer.s().double().square().sort(descending=True).values.cumsum(0)
        prices = linear_prices(Shape(i, (o,)), layer.rank, multiple)
        found.append([(p, float(energy[-1 if r is None else r - 1])) for r, p in prices])
    return found


@often
@given(layers, st.floats(0.02, 1.0), multiples)
def test_uniform_keeps_the_same_fraction_of_every_layer_to_within_one_step(shapes, keep, multiple):
    model, (costs, dense) = weighted(shapes), costs_of(shapes)
    kept = chosen_or_too_little(model, shapes, keep, multiple, budget="uniform")
    if kept is None:
        return
    taken, coming, spent = [], [], 0
    for index, layer, c, d in zip(kept, model, costs, dense, strict=True):
        shape = Shape(layer.in_features, (layer.out_features,))
        steps = [p / d for _, p in linear_prices(shape, layer.rank, multiple)]
        now = 1.0 if index is None else len(index) * c / d
        spent += now * d
        place = min(range(len(steps)), key=lambda i: abs(steps[i] - now))
        taken += [now] if place else []  # every layer has at least its first step
        coming += [(steps[place + 1], (steps[place + 1] - now) * d)] if place + 1 < len(steps) else []
        if index is not None:  # the best of each layer
            assert layer.s()[index].min() >= layer.s().sort(descending=True).values[len(index) - 1]
    budget = int(keep * sum(dense))
    assert spent <= budget * (1 + 1e-12)
    if coming:
        assert max(taken, default=0) <= min(f for f, _ in coming) + 1e-9
        least = min(f for f, _ in coming)
        assert any(spent + step > budget for f, step in coming if f < least + 1e-9)


def test_uniform_leaves_nothing_dense_at_sizes_that_people_ask_for():
    shapes = [(576, 576, 1, 0), (576, 1536, 1, 1), (1536, 576, 1, 2), (576, 192, 1, 3)] * 4
    model = weighted(shapes)
    for keep in (0.5, 0.25, 0.125):
        for (_, index), c, d in zip(select(model, keep, budget="uniform"), *costs_of(shapes), strict=True):
            assert keep - 16 * c / d < len(index) * c / d < keep + 16 * c / d
    assert all(index is None for _, index in select(model, 1.0, budget="uniform"))


@often
@given(layers, st.floats(0.02, 1.0), multiples)
def test_global_keeps_what_no_other_choice_of_this_size_betters_by_more_than_a_step(shapes, keep, multiple):
    model, (costs, dense) = weighted(shapes), costs_of(shapes)
    kept = chosen_or_too_little(model, shapes, keep, multiple, budget="global")
    if kept is None:
        return
    budget, choices = int(keep * sum(dense)), prices_and_values(model, shapes, multiple)
    spent = value = 0
    for index, layer, c, d, options in zip(kept, model, costs, dense, choices, strict=True):
        price = d if index is None else len(index) * c
        energy = float(layer.s().double()[slice(None) if index is None else index].square().sum())
        spent, value = spent + price, value + energy
        assert dict(options)[price] == pytest.approx(energy)  # the best of each layer
    assert spent <= budget
    # The best mixture of choices is a bound that no choice exceeds; its one broken step is what a choice may miss.
    flat = [(g, price, worth) for g, options in enumerate(choices) for price, worth in options]
    best = linprog(
        [-worth for *_, worth in flat],
        A_ub=[[price for _, price, _ in flat]],
        b_ub=[budget],
        A_eq=[[float(g == own) for own, *_ in flat] for g in range(len(choices))],
        b_eq=[1.0] * len(choices),
    )
    step = max(w[-1][1] - w[0][1] for w in choices)
    assert value >= -best.fun - step * (1 + 1e-6) - 1e-9


@often
@given(layers, st.floats(0.02, 1.0))
def test_mass_keeps_the_smallest_set_that_holds_the_share(shapes, share):
    model, (costs, dense) = weighted(shapes), costs_of(shapes)
    deployed = select(model, mass=share, budget="mass", score="magnitude")
    trained = select(model, mass=share, budget="mass", score="magnitude", cuts=3)
    for (_, index), (_, alive), layer, c, d in zip(deployed, trained, model, costs, dense, strict=True):
        s = layer.s().double().sort(descending=True).values
        kept = layer.s().double()[alive].sort(descending=True).values
        assert torch.equal(kept, s[: len(kept)])
        assert kept.sum() >= share * s.sum() * (1 - 1e-9)
        assert kept[:-1].sum() < share * s.sum()
        assert (index is None) == (len(alive) * c >= d)  # break-even decides what is deployed, not what trains
        assert index is None or torch.equal(index, alive)


@often
@given(layers, st.floats(0.02, 1.0), multiples)
def test_mass_within_a_size_is_one_share_for_all_layers(shapes, keep, multiple):
    model, (costs, dense) = weighted(shapes), costs_of(shapes)
    kept = chosen_or_too_little(model, shapes, keep, multiple, budget="mass", score="magnitude")
    if kept is None:
        return
    spent, at_least, at_most = 0, [0.0], [1.0]
    for index, layer, c, d in zip(kept, model, costs, dense, strict=True):
        mass = layer.s().double().sort(descending=True).values.cumsum(0) / layer.s().double().sum()
        spent += d if index is None else len(index) * c
        if index is None:  # some rank at or past break-even
            at_least.append(float(mass[max(-(-d // c) - multiple - 1, 0)]) if -(-d // c) > multiple else 0.0)
        else:
            at_least.append(float(mass[len(index) - multiple - 1]) if len(index) > multiple else 0.0)
            at_most.append(float(mass[len(index) - 1]))
    assert spent <= int(keep * sum(dense))
    assert max(at_least) <= min(at_most) + 1e-6


@settings(often, max_examples=30)
@given(
    layers,
    st.floats(0.05, 0.9),
    st.sampled_from([1, 2]),
    st.integers(2, 6),
    st.sampled_from(["global", "uniform", "mass"]),
)
def test_the_cuts_of_learning_each_leave_the_same_fraction(shapes, keep, multiple, rounds, budget):
    model, (costs, dense) = weighted(shapes), costs_of(shapes)
    sizes = [sum(layer.rank * c for layer, c in zip(model, costs, strict=True))]
    goal, step = int(keep * sum(dense)), multiple * max(costs) * len(shapes)
    how = {"budget": budget, "score": "magnitude"}  # energies of the least bases are below what float64 adds up
    if chosen_or_too_little(model, shapes, keep, multiple, **how) is None:
        return
    for cuts in range(rounds, 0, -1):
        wanted = sizes[-1] * (goal / sizes[-1]) ** (1 / cuts)
        for group, index in select(model, keep, multiple_of=multiple, cuts=cuts, **how):
            if index is not None:
                group.take(index)
        sizes.append(sum(g.rank * c for g, c in zip(groups(model), costs, strict=True)))
        if cuts > 1:
            assert wanted - step <= sizes[-1] <= wanted + 1
    deployed = sum(min(layer.rank * c, d) for layer, c, d in zip(model, costs, dense, strict=True))
    assert deployed <= goal
    assert all(b <= a for a, b in itertools.pairwise(sizes))
