"""Losses some rows at a time against the formulas over all of them, and frozen weights that are cast once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, log_probabilities, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from basis_select import decompose, heal, prune, soft_labels
from basis_select.checkpoint.targets import targets
from basis_select.layers import shape
from basis_select.linalg.metrics import METRICS
from basis_select.statistics.moments import TABLE, second_moments
from basis_select.statistics.readers import same_input
from basis_select.training import loss, precision
from basis_select.training.data import Batches
from basis_select.training.loss import by_rows, response_logits, response_nlls, task_loss
from basis_select.training.precision import CastOnce, autocast


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(loss, "AT_ONCE", 5 * VOCABULARY)


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)


def first(task, rows=8):
    return next(iter(Batches(task.train, rows, 1, 0, task.pad_id)))


class Largest(TorchDispatchMode):
    """The storages that are as large as (n, vocabulary), of either dtype, that operations make: `{key: storage}`."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.made = elements, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(x) and x.untyped_storage().nbytes() // x.itemsize == self.elements:
                self.made[x.untyped_storage()._cdata] = x.untyped_storage()
        return out


class Casts(TorchDispatchMode):
    """How often each of the tensors of these addresses was cast."""

    def __init__(self, tensors):
        super().__init__()
        self.counts = {x.data_ptr(): 0 for x in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["parent", "function", "labels"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_some_rows_at_a_time_is_that_of_all(task, kind, dtype, few_rows):
    parent, model, batch = tiny(dtype=dtype), tiny(dtype=dtype, seed=1), first(task)
    labels = soft_labels(parent, task, 8)
    teacher = {"parent": parent, "function": lambda b: log_probabilities(parent, b), "labels": labels}[kind]
    model.requires_grad_(True)
    found = task_loss(model, batch, teacher, kl=0.7)
    found[0].backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    real = batch["targets"] >= 0
    with autocast(model):
        log_q = response_logits(model, batch).float().log_softmax(-1)[real]
    log_p = log_probabilities(parent, batch)[real]
    ce = F.nll_loss(log_q, batch["targets"][real])
    if kind == "labels":
        top, others = log_p.topk(8), torch.ones_like(log_p, dtype=torch.bool)
        others.scatter_(1, top.indices, False)
        kl = (top.values.exp() * (top.values - log_q.gather(1, top.indices))).sum(-1)
        left = [(x.exp() * others).sum(-1) for x in (log_p, log_q)]
        kl = (kl + left[0] * (left[0] / left[1]).log()).mean()
    else:
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (ce + 0.7 * kl).backward()
    assert torch.stack(found).allclose(torch.stack([ce + 0.7 * kl, ce, kl]), rtol=1e-4)
    for got, p in zip(gradients, model.parameters(), strict=True):
        assert got.allclose(p.grad, rtol=2e-2 if dtype == "bfloat16" else 1e-3, atol=1e-2 * float(p.grad.abs().max()))


def test_a_step_makes_one_tensor_of_tokens_and_vocabulary(task, few_rows):
    vocabulary = 131  # with the 128 or more rows of this batch a size that nothing else has
    model, batch = tiny(vocab_size=vocabulary, seed=1).requires_grad_(True), first(task, 24)
    labels = soft_labels(tiny(vocab_size=vocabulary), task, 8)
    with Largest(len(batch["targets"]) * vocabulary) as large:
        task_loss(model, batch, labels)[0].backward()
    assert len(large.made) == 1


def test_logits_that_their_graph_needs_are_left_alone():
    x = torch.randn(6, 9, requires_grad=True)
    target = torch.tensor([1, 2, 3, 4, 5, 6])
    for function in (torch.tanh, lambda y: 3 * torch.tanh(y), lambda y: torch.tanh(y)[:, :8]):
        (value,) = by_rows(function(x), lambda part, rows: [F.cross_entropy(part, target[rows], reduction="sum")])
        (gradient,) = torch.autograd.grad(value, x)
        (expected,) = torch.autograd.grad(F.cross_entropy(function(x), target, reduction="sum"), x)
        assert gradient.allclose(expected, atol=1e-6)


def test_likelihoods_and_labels_do_not_depend_on_how_many_rows_are_together(task, monkeypatch):
    model = tiny()
    whole = response_nlls(model, task.train), soft_labels(model, task, 8)
    monkeypatch.setattr(loss, "AT_ONCE", 5 * VOCABULARY)
    again = response_nlls(model, task.train), soft_labels(model, task, 8)
    assert whole[0][0].equal(again[0][0])
    assert whole[1].log_p.equal(again[1].log_p)
    assert whole[1].tokens.equal(again[1].tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_moments_do_not_depend_on_how_many_rows_are_together(task, tied, monkeypatch):
    """But for the labels that are drawn: of those the chance is the same, the draw is not."""
    model = tiny(tied=tied)
    members = same_input(model, targets(model), task)
    monkeypatch.setattr(shape, "MAX_MOMENT", VOCABULARY - 1)  # of an untied head only a mean is taken

    def moments():
        return second_moments(model, members, task, 16, METRICS["kronecker"], embedding=True)[:2]

    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    whole = moments()
    monkeypatch.setattr(loss, "AT_ONCE", 5 * VOCABULARY)
    again = moments()
    for before, after in zip(whole, again, strict=True):
        assert before.keys() == after.keys() >= {TABLE}
        for name, kept in before.items():
            for a, b in zip(kept, after[name], strict=True):
                assert a.allclose(b, rtol=1e-4, atol=1e-7 * float(a.abs().max()))


def test_frozen_weights_are_cast_once_to_the_same_products(task, bf16):
    model, batch = tiny().requires_grad_(False), first(task)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad(), autocast(model), Casts(weights) as before:
        plain = [response_logits(model, batch) for _ in range(3)]
    with torch.no_grad(), CastOnce(model), Casts(weights) as after:
        once = []
        for _ in range(3):
            with autocast(model):
                once.append(response_logits(model, batch))
    assert set(before.counts.values()) == {3}
    assert set(after.counts.values()) == {1}
    assert all(a.equal(b) and a.dtype == torch.bfloat16 for a, b in zip(plain, once, strict=True))


def test_what_trains_or_has_changed_is_cast_anew(bf16):
    model = tiny().requires_grad_(False)
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(3, 96)
    with CastOnce(model), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).count_nonzero()
        layer.weight.zero_()
        assert not layer(x).count_nonzero()
        layer.requires_grad_(True)
        layer(x).sum().backward()
        assert layer.weight.grad.count_nonzero()
    with CastOnce(model):
        assert layer(x).dtype == torch.float32


def test_results_are_those_of_casts_at_every_use(task, bf16, monkeypatch):
    """Labels, moments and healing, bit for bit."""

    def results():
        parent = tiny(tied=True)
        model = decompose(copy.deepcopy(parent), task, examples=16)
        prune(model, keep=0.4, multiple_of=4)
        heal(model, task, teacher=parent, steps=2, batch_size=4)
        return [*model.state_dict().values(), soft_labels(parent, task, 8).log_p]

    once = results()
    monkeypatch.setattr(CastOnce, "_cast", lambda self, weight: weight)
    assert all(a.equal(b) for a, b in zip(once, results(), strict=True))
