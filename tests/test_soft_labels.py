import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, log_probabilities, tiny

from basis_select import decompose, heal, prune, soft_labels
from basis_select.heal import distance
from basis_select.system import processes
from basis_select.training.data import Batches
from basis_select.training.loss import response_logits, task_loss
from basis_select.training.soft_labels import SoftLabels, seen


def coarse(log_p, tokens):
    """`log_p` (n, vocabulary) over the tokens and one more that stands for all others, in float64, by summing."""
    p = log_p.double().exp()
    some = p.gather(-1, tokens)
    others = p.scatter(-1, tokens, 0.0).sum(-1, keepdim=True)
    return torch.cat([some, others], -1).log()


@pytest.mark.parametrize("top", [1, 8, VOCABULARY - 1])
def test_the_divergence_is_that_of_the_tokens_and_one_for_all_others(task, top):
    parent, model = tiny(), tiny(seed=1).requires_grad_(True)
    labels = soft_labels(parent, task, top)
    for batch in Batches(task.train, 8, 3, 0, task.pad_id):
        loss, _, divergence = task_loss(model, batch, labels)
        real = batch["targets"] >= 0
        log_p = log_probabilities(parent, batch)[real]
        with torch.no_grad():
            log_q = response_logits(model, batch).log_softmax(-1)[real]
        tokens = log_p.topk(top).indices
        p, q = coarse(log_p, tokens), coarse(log_q, tokens)
        expected = (p.exp() * (p - q)).sum(-1).mean()
        assert divergence.item() == pytest.approx(float(expected), rel=1e-3)  # bfloat16 products in the loss
        whole = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        assert divergence.item() <= float(whole) * 1.001
        if top == VOCABULARY - 1:
            assert divergence.item() == pytest.approx(float(whole), rel=1e-3)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_student_that_is_sure_has_a_finite_gradient(task):
    """One minus what its tokens have is zero in fp32 there."""
    parent, model = tiny(), tiny(seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    labels = soft_labels(parent, task, 4)
    loss, _, _ = task_loss(model.requires_grad_(True), next(iter(Batches(task.train, 8, 1, 0))), labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_healing_from_nearly_all_of_it_is_healing_from_the_parent(task):
    parent = tiny(tied=True)
    start = prune(decompose(copy.deepcopy(parent), task, metric="plain"), keep=0.3, multiple_of=2)
    labels = soft_labels(parent, task, VOCABULARY)
    assert labels.tokens.shape[1] == VOCABULARY - 1
    assert distance(start, task, labels) == pytest.approx(distance(start, task, parent), rel=1e-3)
    healed = [heal(copy.deepcopy(start), task, t, steps=6, batch_size=8, lr=1e-3) for t in (parent, labels)]
    for a, b in zip(*(m.parameters() for m in healed), strict=True):
        assert a.allclose(b, rtol=0, atol=1e-4)


def test_parts_of_several_processes_are_read_as_one(task, tmp_path, monkeypatch):
    parent = tiny()
    whole = soft_labels(parent, task, 8)
    monkeypatch.setattr(processes, "count", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        soft_labels(parent, task, 8).save(tmp_path)
    read = SoftLabels.load(tmp_path)
    assert read.first.keys() == whole.first.keys()
    for batch in Batches(task.train, 6, 7, 0, task.pad_id):
        n = int((batch["targets"] >= 0).sum())
        for a, b in zip(whole(batch), read(batch), strict=True):
            assert a[:n].float().allclose(b[:n].float(), atol=1e-5)


def test_labels_of_other_examples_are_refused(task):
    labels = soft_labels(tiny(), dataclasses.replace(task, train=task.train[:20]), 8)
    with pytest.raises(ValueError, match="other examples than those trained on"):
        heal(tiny(seed=1), task, labels, steps=5, batch_size=8, lr=1e-3)


def test_what_is_seen_is_what_batches_hold(task):
    for steps in (2, 5, 9):
        batches = Batches(task.train, 8, steps, 3)
        held = {i for step in range(steps) for i in batches.rows(step)}
        assert seen(task, 8, steps, 3) == held
