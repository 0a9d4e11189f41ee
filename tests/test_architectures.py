"""What architectures do that no test of one layer shows, as tiny random models: ties, biases, caches, sizes."""

import copy

import pytest
import torch
from architectures import make_task, make_tokenizer, tiny
from conftest import logits
from transformers import PhiConfig, PhiForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import basis_select as bs
from basis_select.layers.group import groups

IDS = torch.full((1, 8), 70)
SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def task():
    return make_task()


def on_disk(model, folder):
    bs.save(model, make_tokenizer(), folder, dtype="bfloat16")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def phi():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL, tie_word_embeddings=True)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("make", [phi, lambda: tiny("modernbert-decoder")], ids=["phi", "modernbert"])
@pytest.mark.parametrize("bits", [16, "auto"])
@pytest.mark.parametrize("embedding", [False, True])
def test_a_tied_head_keeps_its_bias(make, bits, embedding, task, tmp_path):
    model = make()
    before = logits(model, IDS)
    bs.decompose(model, task, embedding=embedding)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
    bs.prune(model, task, size="2x", bits=bits, multiple_of=4)
    bs.save(model, make_tokenizer(), tmp_path / "small")
    assert torch.equal(logits(bs.load(tmp_path / "small")[0], IDS), logits(model, IDS))
    bs.export(tmp_path / "small", "dense", tmp_path / "dense")
    torch.testing.assert_close(logits(bs.load(tmp_path / "dense")[0], IDS), logits(model, IDS), rtol=1e-3, atol=1e-3)


def test_an_embedding_stays_where_more_is_tied_than_it_and_the_head(task, tmp_path, caplog):
    model = tiny("zamba")
    with pytest.raises(ValueError, match=r"cannot change, because ZambaForCausalLM ties model.layers.* as well"):
        bs.decompose(model, task, embedding=True)
    bs.prune(bs.decompose(model, task), task, size="1.1x", bits="auto", multiple_of=4)
    assert "the token embedding keeps its 16 bits: the token embedding cannot change" in caplog.text
    bs.save(model, make_tokenizer(), tmp_path / "small")
    assert torch.equal(logits(bs.load(tmp_path / "small")[0], IDS), logits(model, IDS))


def test_a_head_whose_weight_the_model_reads_does_not_become_bases(task):
    model = tiny("mamba")
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="the model reads the weight of its head, which bases do not have"):
        bs.decompose(model, task, embedding=True)
    assert not groups(model)
    assert torch.equal(logits(model, IDS), before)


def test_an_embedding_that_scales_by_one_can_have_few_bits(task, tmp_path):
    model = tiny("bart")
    total = sum(p.numel() for p in model.parameters())
    bs.prune(bs.decompose(model, task), task, size="1.3x", bits="auto", multiple_of=4)
    assert on_disk(model, tmp_path / "small") <= 2 * total / 1.3


@pytest.mark.parametrize(("kind", "size"), [("dory", "3x"), ("mamba2", "1.5x")])
def test_a_dense_head_beside_an_embedding_of_bases_counts(kind, size, task, tmp_path):
    model = tiny(kind)
    total = sum(p.numel() for p in model.parameters())
    bs.prune(bs.decompose(model, task, embedding=True), task, size=size, bits="auto", multiple_of=4)
    assert on_disk(model, tmp_path / "small") <= 2 * total / float(size[:-1])


def test_experts_that_files_hold_one_by_one_count(task, tmp_path):
    torch.manual_seed(0)
    experts = {"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_key_value_heads=4, **experts)).eval()
    total = sum(p.numel() for p in model.parameters())
    bs.decompose(model, task)
    with pytest.raises(ValueError, match=r"size=3x is too small: this model has [\d,]+ bytes at least"):
        bs.prune(copy.deepcopy(model), task, size="3x", bits="auto")
    bs.prune(model, task, size="1.1x", bits="auto", multiple_of=4)
    assert on_disk(model, tmp_path / "small") <= 2 * total / 1.1


def test_layers_that_stay_dense_count_in_a_size_and_not_in_a_keep(task):
    """RWKV reads the weights of some."""
    model = bs.decompose(tiny("rwkv"), task)
    sizes = bs.sizes(bs.prune(copy.deepcopy(model), size="2x", multiple_of=4))
    assert 0.9 < 2 * sizes["parameters"] / sizes["parameters_dense"] <= 1
    with pytest.raises(
        ValueError, match=r"size=3.1x leaves nothing for the (bases: layers left|targeted layers: the rest)"
    ):
        bs.prune(copy.deepcopy(model), size="3.1x")
    sizes = bs.sizes(bs.prune(model, keep=0.4, multiple_of=4))
    assert 0.35 < (sizes["targeted"] - 20480) / (sizes["targeted_dense"] - 20480) <= 0.4


def test_a_model_without_norm_weights_has_a_dtype_in_few_bits(task, tmp_path):
    """OLMo: all its parameters are whole numbers then, but scales."""
    parent = tiny("olmo")
    model = bs.decompose(copy.deepcopy(parent), task, embedding=True)
    bs.prune(model, task, size="3x", bits="auto", multiple_of=4)
    bs.heal(model, task, bs.soft_labels(parent, task), steps=2)
    bs.save(model, make_tokenizer(), tmp_path / "small")
    again = bs.load(tmp_path / "small")[0]
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert again.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] <= 10


def test_what_a_model_reads_only_where_it_trains_stays_dense(task):
    """Hybrids with Mamba 2 hand the weight of a projection to a kernel, without a cache alone."""
    parent = tiny("granitemoehybrid")
    model = bs.prune(bs.decompose(copy.deepcopy(parent), task), size="1.5x", multiple_of=4)
    bs.heal(model, task, bs.soft_labels(parent, task), steps=1)


@pytest.mark.slow
def test_a_model_with_recurrent_layers_is_compiled(tmp_path):
    model = tiny("bamba")
    bs.save(model, make_tokenizer(), tmp_path / "whole")
    fast = bs.load(tmp_path / "whole", fast=True)[0]
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(IDS, **how), model.generate(IDS, **how))


def test_a_table_with_other_rows_than_the_config_says_is_not_trimmed(task):
    with pytest.raises(ValueError, match="the embedding has 257 rows, where the config says 256: it cannot be trimmed"):
        bs.trim(tiny("moshi"), make_tokenizer(), task)
