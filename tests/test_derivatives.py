"""Derivatives of the loss by the weights of bases, whatever their signs."""

import dataclasses

import pytest
import torch
from conftest import tiny

from basis_select import decompose, derivatives
from basis_select.layers.group import groups
from basis_select.linalg.scores import SCORES
from basis_select.training.data import Batches
from basis_select.training.loss import task_loss


@pytest.fixture
def one(task):
    """A task of one batch, over which a loss is a function."""
    return dataclasses.replace(task, train=task.train[:8])


def flipped(one, index):
    """A decomposed model in float64 in which some s of its first group are negative, its function unchanged."""
    model = decompose(tiny().double(), one, metric="plain", examples=8)
    layer = groups(model)[0].leader
    layer.s.learned.data[index] *= -1
    for member in groups(model)[0].layers:
        member.u.weight.data[:, index] *= -1
    return model, layer


def test_negative_weights_have_the_derivatives_of_their_sign(one):
    index = torch.tensor([0, 3, 5])
    (straight, _), (model, layer) = flipped(one, index[:0]), flipped(one, index)
    batch = next(iter(Batches(one.train, 8, 1, 0)))
    (g, h), (g0, h0) = (derivatives(m, one, probes=4, batch_size=8)[0] for m in (model, straight))
    sign = torch.ones_like(g).index_fill(0, index, -1)
    assert torch.allclose(g, g0 * sign, atol=1e-9)
    assert torch.allclose(h, h0, atol=1e-6 * float(h0.abs().max()))
    s = layer.s().detach()
    assert (s[index] < 0).all()
    exact = derivatives(model, one, probes=1, batch_size=8, step=1e-5)[0][0]  # a small step: the slope itself
    layer.s.learned.requires_grad_(True)
    slope = torch.autograd.grad(task_loss(model, batch)[0], layer.s.learned)[0] / layer.s.scale
    assert torch.allclose(exact, slope, rtol=1e-4, atol=1e-7)
    score = SCORES["taylor"].of
    assert torch.allclose(score(s, g, h, None), score(s.abs(), g0, h0, None), atol=1e-8)


def test_a_weight_of_zero_has_none(one):
    model, layer = flipped(one, torch.tensor([1]))
    layer.s.learned.data[2] = 0
    g, h = derivatives(model, one, probes=2, batch_size=8)[0]
    assert torch.isfinite(g).all()
    assert torch.isfinite(h).all()
    assert g[2] == h[2] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, one):
    model = decompose(tiny(), one, examples=8)
    group = groups(model)[1]
    group.leader.s.learned.data[2] = value
    with pytest.raises(ValueError, match=f"{group.name}.*not all finite"):
        derivatives(model, one, probes=1)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())
