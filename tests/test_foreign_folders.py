"""Folders that are not ours, a dense model and an adapter on it: damage and forgeries get one sentence."""

import os
import shutil

import pytest
from conftest import logits, make_tokenizer, sampled, tiny
from damages import (
    ADAPTER,
    EXPORT,
    HARMLESS,
    IDS,
    SPECIAL,
    TOKEN_BEYOND,
    WEIGHTS,
    answer,
    at,
    cut,
    fill,
    instead,
    own_code,
    put,
    tensors,
    text,
)
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import basis_select as bs
from basis_select.checkpoint.checks import SIDECAR
from basis_select.checkpoint.models import config_and_tokenizer
from basis_select.cli import app

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A dense folder of transformers' own, and one with an adapter on it."""
    folder = tmp_path_factory.mktemp("foreign")
    model = tiny(hidden_size=16, intermediate_size=24)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    put("adapter_config.json", "base_model_name_or_path", str(folder / "model"))(folder / "adapter")
    return folder


def adapter(change):
    return tensors(change, "adapter_model.safetensors")


def other_layers(found):
    for name in [name for name in found if ".layers.1." in name]:
        found[name.replace(".layers.1.", ".layers.5.")] = found.pop(name)


DENSE = {
    "nothing": (lambda f: None, HARMLESS),
    "a card and a folder": (lambda f: (text("README.md", "x")(f), text("onnx/model.onnx", "x")(f)), HARMLESS),
    **{f"{v} in a layer": (fill(f"{DOWN}.weight", float(v)), f"{DOWN}.weight") for v in ("nan", "inf", "-inf")},
    "an epsilon of NaN": (put("config.json", "rms_norm_eps", float("nan")), "rms_norm_eps"),
    "layers without end": (put("config.json", "num_hidden_layers", 10**8), "num_hidden_layers"),
    "a table without end": (put("config.json", "vocab_size", 10**10), "describes a model of"),
    "code of its own": (own_code, "which is never run"),
    "an adapter in it": (text("adapter_config.json", ADAPTER), "an adapter"),
    "an export in it": (text("export.json", EXPORT), f"no {SIDECAR}"),
    "a token beyond the table": (
        TOKEN_BEYOND,
        "'beyond' as token 128",
    ),
    "a cut file": (at(WEIGHTS, cut), "does not load|safetensors"),
    **{
        f"{kind} as {name}": (instead(name, make), name)
        for name in ("config.json", WEIGHTS, "tokenizer.json")
        for kind, make in SPECIAL.items()
        if kind in ("a FIFO", "a socket", "a link to a device")
    },
    "a FIFO beside it": (lambda f: os.mkfifo(f / "generation_config.json.x"), "generation_config.json.x"),
    "a damaged generation_config": (text("generation_config.json", "{"), "generation_config.json"),
}
ADAPTERS = {
    "for layers that are not there": (adapter(other_layers), "fits its base in part.*layers"),
    "for half of the layers": (
        adapter(lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        "fits its base in part.*layers.1.*missing",
    ),
    "for nothing": (put("adapter_config.json", "target_modules", ["nothing"]), "nothing"),
    "for other targets": (put("adapter_config.json", "target_modules", ["q_proj"]), "left over"),
    "of another rank": (put("adapter_config.json", "r", 3), "size mismatch"),
    "of no rank": (put("adapter_config.json", "r", 0), "does not load"),
    "of a rank in words": (put("adapter_config.json", "r", "x"), "does not load"),
    "of NaN": (adapter(lambda t: next(iter(t.values())).fill_(float("nan"))), "does not load|not finite"),
    "of nothing": (adapter(lambda t: t.clear()), "adapter_model.safetensors"),
    "cut": (at("adapter_model.safetensors", cut), "adapter_model.safetensors is not a whole"),
    "gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "safetensors is missing"),
    "of no base": (put("adapter_config.json", "base_model_name_or_path", None), "does not name its base"),
    "of a base that is no text": (put("adapter_config.json", "base_model_name_or_path", 3), "does not name its base"),
    "of itself": (lambda f: put("adapter_config.json", "base_model_name_or_path", str(f))(f), "names itself"),
    "of an unknown kind": (put("adapter_config.json", "peft_type", "NOTHING"), "does not load"),
    "of an alpha of NaN": (put("adapter_config.json", "lora_alpha", float("nan")), "does not load|not finite"),
    "not JSON": (text("adapter_config.json", "{"), "adapter_config.json is not valid JSON"),
    "a list": (text("adapter_config.json", "[]"), "adapter_config.json is damaged"),
    "a FIFO": (instead("adapter_model.safetensors", os.mkfifo), "adapter_model.safetensors is a FIFO"),
}


@pytest.mark.parametrize("damage", sampled(DENSE, 5))
def test_folders_without_hashes(damage, foreign, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whatever is asked
    expected = logits(bs.load(foreign / "model")[0], IDS)
    folder = shutil.copytree(foreign / "model", tmp_path / "forged")
    do, sentence = DENSE[damage]
    do(folder)
    answer(folder, sentence, expected)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("damage", sampled(ADAPTERS, 5))
def test_adapters(damage, foreign, tmp_path, quickly):
    folder = shutil.copytree(foreign / "adapter", tmp_path / "forged")
    do, sentence = ADAPTERS[damage]
    do(folder)
    answer(folder, sentence, None)


def test_code_of_the_base_of_an_adapter_and_of_a_tokenizer_is_never_run(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    base = shutil.copytree(foreign / "model", tmp_path / "base")
    own_code(base)
    folder = shutil.copytree(foreign / "adapter", tmp_path / "adapter")
    put("adapter_config.json", "base_model_name_or_path", str(base))(folder)
    for call in (bs.load, config_and_tokenizer):
        with pytest.raises(ValueError, match="which is never run"):
            call(folder)
    assert not (base / "ran").exists()


@pytest.mark.slow
def test_verify_says_that_no_hashes_are_recorded(foreign):
    said = CliRunner().invoke(app, ["verify", str(foreign / "model")]).output
    assert "no hashes are recorded" in said
    assert "match" not in said
