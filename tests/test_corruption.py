"""Ways to damage a checkpoint; each must be refused by a sentence that names the file or the layer."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_task, make_tokenizer, tiny
from damages import at, edit, flip, sign, swap, tensors
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import basis_select as bs
from basis_select.checkpoint.checks import INDEX, SIDECAR
from basis_select.checkpoint.format import HINT

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
ONE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same model, its embedding bases as well, as one file and as shards."""
    model = bs.decompose(tiny(tied=True), make_task(), examples=16, embedding=True)
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=1)
    folder = tmp_path_factory.mktemp("saved")
    bs.save(model, make_tokenizer(), folder / "whole")
    bs.save(model, make_tokenizer(), folder / "shards", "float32", max_shard_size="80KB")
    assert (folder / "shards" / SECOND).exists()
    return folder


def twice_in_index(folder):
    text = (folder / INDEX).read_text()
    first = json.loads(text)["weight_map"]
    name = next(iter(first))
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{SECOND}",'))


def other_vocabulary(folder):
    vocabulary = {f"token {i}": i for i in range(500)}
    other = Tokenizer(models.WordLevel(vocabulary, unk_token="token 0"))
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="token 1").save_pretrained(folder)


def config(change):
    return at("config.json", edit, change)


def format_(change):
    return config(lambda c: change(c["quantization_config"]))


def hashes(change):
    return at(SIDECAR, edit, lambda c: change(c["sha256"]))


FOUND_BY_HASH = {
    "one byte flipped": ("whole", at(ONE, flip), f"{ONE} is not the file that was saved"),
    "one byte flipped in a shard": ("shards", at(SECOND, flip), f"{SECOND} is not the file"),
    "shards swapped": ("shards", lambda f: swap(f / FIRST, f / SECOND), f"{FIRST} is not the file"),
    "config edited": (
        "whole",
        config(lambda c: c.update(rms_norm_eps=1.0)),
        "config.json is not the file",
    ),
    "a hash edited": ("whole", hashes(lambda h: h.update({ONE: "0" * 64})), f"{ONE} is not the file"),
    "tokenizer of another model": ("whole", other_vocabulary, "tokenizer.json is not the file that was saved"),
    "weights of another model": (
        "whole",
        tensors(lambda t: t.update({f"{Q}.u.weight": torch.zeros_like(t[f"{Q}.u.weight"])})),
        f"{ONE} is not the file",
    ),
}
FOUND_BEFORE = {
    "nothing there": ("whole", lambda f: [p.unlink() for p in f.iterdir()], "without a config.json"),
    "no weights": ("whole", lambda f: (f / ONE).unlink(), f"{ONE} is missing"),
    "truncated": ("whole", lambda f: os.truncate(f / ONE, 9999), f"{ONE} is not a whole safetensors file"),
    "truncated shard": ("shards", lambda f: os.truncate(f / SECOND, 9999), f"{SECOND} is not a whole"),
    "empty shard": ("shards", lambda f: os.truncate(f / SECOND, 0), f"{SECOND} is not a whole"),
    "shard missing": ("shards", lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "index missing": ("shards", lambda f: (f / INDEX).unlink(), f"{INDEX} is missing"),
    "another file added": ("whole", lambda f: shutil.copy(f / ONE, f / "extra.safetensors"), "extra.*was not part"),
    "pickle added": ("whole", lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80"), "model.bin may be a pickle"),
    "config not JSON": ("whole", lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config a list": ("whole", lambda f: (f / "config.json").write_text("[]"), "it is \\[\\], it should be an object"),
    "config truncated": ("whole", lambda f: os.truncate(f / "config.json", 99), "config.json is not valid JSON"),
    "no hashes": ("whole", lambda f: (f / SIDECAR).unlink(), f"no {SIDECAR}.*save it with basis_select.save"),
    "hashes truncated": ("whole", lambda f: os.truncate(f / SIDECAR, 20), f"{SIDECAR} is not valid JSON"),
    "hashes empty": ("whole", lambda f: (f / SIDECAR).write_text("{}"), f"{SIDECAR} lists no hashes"),
    "hash of a file elsewhere": (
        "whole",
        hashes(lambda h: h.update({"../secret": "0" * 64})),
        f"{SIDECAR} names '../secret'",
    ),
    "weights without a hash": ("whole", hashes(lambda h: h.pop(ONE)), f"{ONE} was not part"),
    "future format": ("whole", format_(lambda c: c.update(format_version=4)), "format version 4"),
}  # fmt: skip
FOUND_BY_CONTENT = {
    "index missing": ("shards", lambda f: (f / INDEX).unlink(), f"{INDEX} is missing"),
    "index of other shards": (
        "shards",
        at(INDEX, edit, lambda i: i["weight_map"].update({"model.norm.weight": FIRST})),
        f"{INDEX} says that model.norm.weight is in {FIRST}",
    ),
    "index lacks a tensor": (
        "shards",
        at(INDEX, edit, lambda i: i["weight_map"].pop(f"{Q}.u.weight")),
        f"{INDEX} says that {Q}.u.weight is in no file",
    ),
    "index names a tensor twice": ("shards", twice_in_index, f"{INDEX} is not valid JSON: it names .* twice"),
    "shards swapped": ("shards", lambda f: swap(f / FIRST, f / SECOND), f"{INDEX} says that"),
    "a tensor in two shards": (
        "shards",
        tensors(lambda t: t.update({f"{Q}.u.weight": torch.ones(2)}), SECOND),
        f"{Q}.u.weight is in both",
    ),
    "rank of a layer": ("whole", format_(lambda c: c["ranks"].update({Q: 3})), f"{Q}.*the ranks"),
    "rank of a layer without group": (
        "whole",
        format_(lambda c: c["ranks"].update({DOWN: 3})),
        r"mismatched keys, first model.layers.0.mlp.down_proj.*in the file, \[.*3\] in the model",
    ),
    "rank not a number": ("whole", format_(lambda c: c["ranks"].update({DOWN: "3"})), "the rank '3'"),
    "rank of zero": ("whole", format_(lambda c: c["embedding"].update(rank=0)), "embedding.rank is 0"),
    "rank of the embedding": ("whole", format_(lambda c: c["embedding"].update(rank=3)), "lm_head"),
    "rank missing": (
        "whole",
        format_(lambda c: c["ranks"].pop(DOWN)),
        "unexpected keys, first model.layers.0.mlp.down_proj.u.weight",
    ),
    "layer that is not there": (
        "whole",
        format_(lambda c: c["ranks"].update({"model.nothing": 3})),
        "lists the layer model.nothing",
    ),
    "layer that is no linear": (
        "whole",
        format_(lambda c: c["ranks"].update({"model.norm": 3})),
        "layer model.norm, which is no nn.Linear",
    ),
    "embedding that is not there": (
        "whole",
        format_(lambda c: c["embedding"].update(name="model.nothing")),
        "lists the layer model.nothing",
    ),
    "group of a layer that is not there": (
        "whole",
        format_(lambda c: c["groups"][0].append("model.nothing")),
        "lists model.nothing in a group",
    ),
    "layer in two groups": (
        "whole",
        format_(lambda c: c["groups"].append(c["groups"][0])),
        f"lists {Q} in a group twice",
    ),
    "groups lost": ("whole", format_(lambda c: c.update(groups=[])), "missing keys, first model.layers.0"),
    "not marked as ours": (
        "whole",
        config(lambda c: c.pop("quantization_config")),
        "keys, first (lm_head|model)",
    ),
    "marked as something else": (
        "whole",
        format_(lambda c: c.update(quant_method="other")),
        "keys, first (lm_head|model)",
    ),
    "tensor missing": (
        "whole",
        tensors(lambda t: t.pop(f"{Q}.u.weight")),
        f"missing keys, first {Q}.u.weight",
    ),
    "tensor renamed": (
        "whole",
        tensors(lambda t: t.update({f"{Q}.w.weight": t.pop(f"{Q}.u.weight")})),
        f"missing keys, first {Q}.u.weight",
    ),
    "foreign tensor": (
        "whole",
        tensors(lambda t: t.update(alien=torch.ones(2))),
        "unexpected keys, first alien",
    ),
    "another shape": (
        "whole",
        tensors(lambda t: t.update({f"{Q}.u.weight": torch.ones(2)})),
        f"mismatched keys, first {Q}.u.weight",
    ),
    "float64": (
        "whole",
        tensors(lambda t: t.update({f"{Q}.u.weight": t[f"{Q}.u.weight"].double()})),
        f"{Q}.u.weight as torch.float64",
    ),
    "integers": (
        "whole",
        tensors(lambda t: t.update({f"{Q}.u.weight": t[f"{Q}.u.weight"].to(torch.int8)})),
        f"{Q}.u.weight as torch.int8",
    ),
    "another dtype in config": (
        "whole",
        config(lambda c: c.update(dtype="bfloat16")),
        "as torch.float32, its config.json asks for torch.bfloat16",
    ),
    "NaN": (
        "whole",
        tensors(lambda t: t[f"{Q}.u.weight"].view(-1)[3].fill_(float("nan"))),
        f"not finite in {Q}.u.weight",
    ),
    "infinity": (
        "whole",
        tensors(lambda t: t["model.norm.weight"][3].fill_(float("-inf"))),
        "not finite in model.norm.weight",
    ),
    "tokenizer of another model": ("whole", other_vocabulary, "has .token 499. as token 499, the model knows 128"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FOUND_BEFORE | FOUND_BY_HASH)
def test_damage_is_found(damage, saved, tmp_path):
    kind, do, message = (FOUND_BEFORE | FOUND_BY_HASH)[damage]
    folder = shutil.copytree(saved / kind, tmp_path / "damaged")
    do(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bs.load(folder)


@pytest.mark.parametrize("damage", FOUND_BY_CONTENT)
def test_damage_is_found_where_hashes_were_recorded_after_it(damage, saved, tmp_path):
    kind, do, message = FOUND_BY_CONTENT[damage]
    folder = shutil.copytree(saved / kind, tmp_path / "damaged")
    do(folder)
    sign(folder)
    with pytest.raises(ValueError, match=message):
        bs.load(folder)


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_nothing_else_is_refused(kind, saved, tmp_path, ids):
    folder = shutil.copytree(saved / kind, tmp_path / "copy")
    sign(folder)
    (folder / "README.md").write_text("notes of the user")
    expected, tokenizer = bs.load(saved / "whole")
    assert torch.equal(bs.load(folder)[0](ids).logits, expected(ids).logits)
    assert len(tokenizer) == 128


def test_a_checkpoint_without_what_stops_stock_transformers_loads(saved, tmp_path, ids):
    folder = shutil.copytree(saved / "whole", tmp_path / "copy")
    tensors(lambda t: [t.pop(name) for name in (HINT, "model.layers.0.mlp.down_proj.weight")])(folder)
    sign(folder)
    assert torch.equal(bs.load(folder)[0](ids).logits, bs.load(saved / "whole")[0](ids).logits)


def test_a_dense_checkpoint_is_checked_as_well(tmp_path):
    folder = bs.save(tiny(), make_tokenizer(), tmp_path / "dense")
    bs.load(folder)
    flip(folder / ONE)
    with pytest.raises(ValueError, match=f"{ONE} is not the file that was saved"):
        bs.load(folder)
