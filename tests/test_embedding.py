import copy
import dataclasses

import pytest
import torch
from conftest import KINDS, logits, sampled, tiny
from safetensors import safe_open
from scipy import stats
from torch import nn

import basis_select as bs
from basis_select.layers.embedding import LowRankEmbedding
from basis_select.layers.group import table_of
from basis_select.layers.shape import Shape
from basis_select.linalg.budget import table_rank
from basis_select.linalg.metrics import METRICS
from basis_select.statistics.moments import second_moments
from basis_select.target import target
from basis_select.training.data import Batches
from basis_select.training.loss import response_nll, task_loss


@pytest.mark.parametrize(("kind", "tied"), sampled([("llama", False), *((kind, True) for kind in KINDS)], 3))
def test_embedding_as_bases(kind, tied, task, ids, tmp_path, tokenizer):
    """Full rank is the dense model; cut, saved and loaded it gives the same bits, with one table if it was tied."""
    model = tiny(kind, tied)
    before, dense = logits(model, ids), sum(p.numel() for p in model.parameters())
    bs.decompose(model, task, examples=16, embedding=True)
    assert torch.allclose(logits(model, ids), before, atol=2e-6)
    assert (table_of(model).leader is model.get_output_embeddings()) == tied
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=2)
    facts = bs.sizes(model)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters_dense"] == dense
    assert table_of(model).rank == table_rank(0.5, Shape(64, (128,)), 2)
    bs.heal(model, task, steps=2, batch_size=4, lr=1e-4)
    bs.save(model, tokenizer, tmp_path / "model")
    again, _ = bs.load(tmp_path / "model")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert isinstance(again.get_input_embeddings(), LowRankEmbedding)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        outside = [name for name in file.keys() if ".layers." not in name]  # noqa: SIM118
        tables = [name for name in outside if file.get_slice(name).get_shape()[0] == 128]
    assert len(tables) == (1 if tied else 2)


def test_healing_moves_embedding_and_tied_head_as_one(task):
    model = bs.decompose(tiny(tied=True), task, examples=16, embedding=True)
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=2)
    before = model.get_input_embeddings().weight.clone()
    bs.heal(model, task, steps=3, batch_size=8, lr=1e-2)
    after = model.get_input_embeddings().weight
    assert not torch.allclose(after, before)
    assert torch.allclose(after, model.get_output_embeddings().dense_weight())


def test_frequent_tokens_are_kept_best(task):
    model = tiny()
    weight = model.get_input_embeddings().weight.clone()
    counts = torch.bincount(torch.tensor([t for e in task.train for t in e.input_ids]), minlength=len(weight))
    bs.prune(bs.decompose(model, task, examples=16, embedding=True), keep=0.9, keep_embedding=0.3, multiple_of=1)
    error = (model.get_input_embeddings().weight - weight).square().sum(1)
    frequent, rare = counts.argsort()[-20:], (counts == 0).nonzero()[:, 0]
    assert error[frequent].mean() < error[rare].mean()


def test_size_of_the_whole_model_counts_the_embedding(task):
    model = bs.decompose(tiny(), task, examples=16, embedding=True)
    dense = bs.sizes(model)["parameters_dense"]
    bs.prune(model, size="3x", keep_embedding=0.3, multiple_of=1)
    assert 0.97 * dense / 3 < bs.sizes(model)["parameters"] <= dense / 3
    with pytest.raises(ValueError, match="the rest of the model alone"):
        target(size="3x").share(100, 50, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gemma3_text", True)])
def test_a_size_is_shared_with_the_embedding_as_measured(kind, tied, task):
    """No other rank of the table that was tried has a lower validation NLL at the same size of the whole model."""
    model, task = tiny(kind, tied), dataclasses.replace(task, validation=task.train)
    bs.tune(model, task, steps=40, batch_size=20, lr=3e-3)
    bs.decompose(model, task, examples=40, embedding=True)
    whole = copy.deepcopy(model)
    found = {}
    for other in (8, 16, 24, 32, 40):
        m = copy.deepcopy(whole)
        keep = other * (128 + 64) / (128 * 64) + 1e-6
        try:
            bs.prune(m, task, size="2.5x", keep_embedding=keep, multiple_of=4)
        except ValueError:  # too little is left for the layers
            continue
        found[table_of(m).rank] = response_nll(m, task.validation)
    bs.prune(model, task, size="2.5x", multiple_of=4)
    assert bs.sizes(model)["parameters"] <= bs.sizes(whole)["parameters_dense"] / 2.5
    assert response_nll(model, task.validation) <= min(found.values()) + 0.02


def test_an_embedding_that_costs_nothing_stays_whole(task, ids):
    dense = tiny(tied=True)
    model = bs.decompose(copy.deepcopy(dense), task, examples=16, embedding=True)
    bs.prune(model, task, size="1x", multiple_of=1)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.allclose(logits(model, ids), logits(dense, ids), atol=2e-6)


def test_scores_of_the_embedding_order_its_bases(task):
    """s^2 in the kronecker metric ranks bases of the table by what removing each costs."""
    model = tiny(tied=True, num_hidden_layers=1)
    bs.tune(model, task, steps=30, batch_size=20, lr=3e-3)
    parent = copy.deepcopy(model)
    bs.decompose(model, task, examples=40, embedding=True)
    table, batches = table_of(model).leader, list(Batches(task.train, 20, 2, seed=0))
    estimates, found = [], []
    for i in range(0, 64, 4):
        learned = table.s.learned.data.clone()
        table.s.learned.data[i] = 0
        with torch.no_grad():
            found.append(sum(float(task_loss(model, b, parent, mixed=False)[2]) * b["responses"] for b in batches))
        table.s.learned.data = learned
        estimates.append(float(table.s()[i]) ** 2)
    assert stats.spearmanr(estimates, found).statistic > 0.9


def test_budgets_of_an_embedding_that_cannot_be(task):
    with pytest.raises(ValueError, match="is for an embedding written as bases"):
        bs.prune(bs.decompose(tiny(), task, examples=16), keep=0.5, keep_embedding=0.5)
    with pytest.raises(ValueError, match="needs keep_embedding, or a size"):
        bs.prune(bs.decompose(tiny(), task, examples=16, embedding=True), task, keep=0.5)
    with pytest.raises(ValueError, match="makes a rank of 0"):
        bs.prune(bs.decompose(tiny(), task, examples=16, embedding=True), keep=0.5, keep_embedding=0.01)
    layers = [name for name, m in tiny().named_modules() if type(m) is nn.Linear]
    moments = second_moments(tiny(), [[name] for name in layers], task, 16, METRICS["kronecker"])
    with pytest.raises(ValueError, match="lack the embedding's"):
        bs.decompose(tiny(), task, moments, share=False, embedding=True)


def test_back_to_dense(task, ids, tmp_path, tokenizer):
    model = bs.decompose(tiny(tied=True), task, examples=16, embedding=True)
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=2)
    expected = logits(model, ids)
    bs.save(model, tokenizer, tmp_path / "model")
    dense = bs.load(tmp_path / "model")[0].dequantize()
    assert isinstance(dense.get_input_embeddings(), nn.Embedding)
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert torch.allclose(logits(dense, ids), expected, atol=1e-5)


def test_a_decomposed_embedding_survives_deepcopy(task, ids):
    model = bs.decompose(tiny(tied=True), task, examples=16, embedding=True)
    again = copy.deepcopy(model)
    assert table_of(again).leader is again.get_output_embeddings()
    assert torch.equal(logits(again, ids), logits(model, ids))
