"""PhoneLM's family: a gated ReLU, as many key heads as heads, a tied embedding, with weights named as Llama's are."""

import json
from pathlib import Path

import phonelm
import pytest
import torch
from conftest import VOCABULARY, make_tokenizer
from transformers import AutoModelForCausalLM

import basis_select as bs
from basis_select.run import recipe
from basis_select.run.plan import plan, text

TINY = {"hidden_size": 64, "intermediate_size": 304, "num_hidden_layers": 2, "num_attention_heads": 4}
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def theirs(tmp_path):
    """`(model, folder)`: a tiny one as the hub has it, with the config of its own modelling file."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(phonelm.config(VOCABULARY, 512, **TINY)).eval()
    model.save_pretrained(tmp_path / "hub")
    make_tokenizer().save_pretrained(tmp_path / "hub")
    config = {**TINY, "model_type": "phonelm", "auto_map": {"AutoConfig": "configuration_phonelm.PhoneLMConfig"}}
    config |= {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "num_key_value_heads": 4, "hidden_act": "relu"}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    return model, tmp_path / "hub"


def test_a_phonelm_becomes_a_stock_llama(theirs, tmp_path, ids):
    model, hub = theirs
    stock, _ = bs.load(phonelm.convert(hub, tmp_path / "stock"), "float32")
    assert type(stock).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        logits = stock(ids).logits
        assert torch.equal(logits, model(ids).logits)
        rough = phonelm.round_rotary(stock)(ids).logits
    assert 0 < (logits - rough).abs().max() < 0.1 * logits.std()
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
    with pytest.raises(ValueError, match="hidden_act=silu, a PhoneLM has relu"):
        phonelm.convert(hub, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phonelm-0.5b", "phonelm-1.5b"])
def test_its_recipes_can_be_planned(name, theirs, tmp_path):
    phonelm.convert(theirs[1], tmp_path / "stock")
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(20) for b in range(20)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [f"model={tmp_path / 'stock'}", f"task={tmp_path / 'sums.jsonl'}", "data.train=300", "data.validation=20"]
    found = plan(recipe.read(RECIPES / f"{name}.yaml", [*small, "data.test=20", "prune.multiple_of=4"]))
    assert "14 targeted linear layers" in text(found)
    assert found.rows["result"].keep <= 0.25


@pytest.mark.parametrize(("size", "parameters"), [("0.5b", 509.7), ("1.5b", 1618.6)])
def test_its_shapes_have_the_published_parameters(size, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(phonelm.config(**phonelm.SHAPES[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
