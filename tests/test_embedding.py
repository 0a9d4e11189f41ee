import copy

import pytest
import torch
from conftest import KINDS, tiny
from safetensors import safe_open
from torch import nn

import basis_select as bs
from basis_select.embedding import LowRankEmbedding, table_of
from basis_select.linalg.budget import keep_for, table_rank


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), *((kind, True) for kind in KINDS)])
def test_embedding_as_bases(kind, tied, task, ids, tmp_path, tokenizer):
    """Full rank is the dense model; cut, saved and loaded it gives the same bits, with one table if it was tied."""
    model = tiny(kind, tied)
    before, dense = logits(model, ids), sum(p.numel() for p in model.parameters())
    bs.decompose(model, task, examples=16, embedding=True)
    assert torch.allclose(logits(model, ids), before, atol=2e-6)
    assert (table_of(model) is model.get_output_embeddings()) == tied
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=2)
    facts = bs.sizes(model)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters_dense"] == dense
    assert table_of(model).rank == table_rank(0.5, 128, 64, 2)[0]
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
        keep_for(100, 50, "bfloat16", size="3x")


def test_embedding_needs_its_own_budget(task):
    with pytest.raises(ValueError, match="give both or neither"):
        bs.prune(bs.decompose(tiny(), task, examples=16, embedding=True), keep=0.5)
    with pytest.raises(ValueError, match="give both or neither"):
        bs.prune(bs.decompose(tiny(), task, examples=16), keep=0.5, keep_embedding=0.5)
    with pytest.raises(ValueError, match="makes a rank of 0"):
        bs.prune(bs.decompose(tiny(), task, examples=16, embedding=True), keep=0.5, keep_embedding=0.01)


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
    assert table_of(again) is again.get_output_embeddings()
    assert torch.equal(logits(again, ids), logits(model, ids))
