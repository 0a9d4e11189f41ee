"""Forged and damaged checkpoints: each is refused by one sentence with folder and file or field, or changes nothing.

`PLAIN` are changes to a folder whose hashes stay; `SIGNED` those of whoever can record the hashes anew.
"""

import json
import os
import shutil
import struct

import pytest
import torch
from conftest import logits, make_task, make_tokenizer, sampled, tiny
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
    drop,
    edit,
    fill,
    flip,
    instead,
    put,
    sign,
    swap,
    tensors,
    text,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import basis_select as bs
from basis_select.checkpoint.checks import INDEX, SIDECAR
from basis_select.checkpoint.format import HINT
from basis_select.cli import app

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint whose layers, groups and embedding are bases, and its logits."""
    model = bs.decompose(
        tiny(tied=True, hidden_size=16, intermediate_size=24), make_task(), examples=16, embedding=True
    )
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=1)
    folder = bs.save(model, make_tokenizer(), tmp_path_factory.mktemp("saved") / "model", "float32")
    return folder, logits(bs.load(folder)[0], IDS)


def header(change):
    """Lie in the header of the weights; `change` gets the header and returns what stands there instead."""

    def write(folder):
        content = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8 : 8 + size])
        made = change(head) or head
        made = made if isinstance(made, bytes) else json.dumps(made).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(made)) + made + content[8 + size :])

    return write


def same_elsewhere(folder):
    shutil.move(folder / "tokenizer.json", folder.with_name("elsewhere.json"))
    (folder / "tokenizer.json").symlink_to(folder.with_name("elsewhere.json"))


def link_inside(folder):
    shutil.move(folder / "tokenizer.json", folder / ".tokenizer")
    (folder / "tokenizer.json").symlink_to(".tokenizer")


def templates(folder):
    (folder / "templates").mkdir()
    (folder / "templates" / "x.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").symlink_to("templates")


EXTRA = {
    "adapter_config.json": ADAPTER,
    "adapter_model.safetensors": b"",
    "adapter_model.bin": b"",
    "model.onnx": b"",
    "model.onnx.data": b"",
    "openvino_model.xml": "<x/>",
    "export.json": EXPORT,
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": '{"chat_template": "x"}',
    "additional_chat_templates/x.jinja": "x",
    "added_tokens.json": '{"x": 3}',
    "special_tokens_map.json": '{"eos_token": "a"}',
    "vocab.json": "{}",
    "vocab.txt": "x",
    "merges.txt": "x",
    "tokenizer.model": b"x",
    "spiece.model": b"x",
    "tokenizer.5.0.0.json": "{}",
    "pytorch_model.bin": b"x",
    "pytorch_model.bin.index.json": "{}",
    "model.pt": b"x",
    "model.pth": b"x",
    "state.pkl": b"x",
    "last.ckpt": b"x",
    "modeling_x.py": "raise SystemExit",
    "tokenization_x.py": "raise SystemExit",
    "custom_generate/generate.py": "raise SystemExit",
    "model.gguf": b"GGUF",
    "extra.safetensors": b"",
    INDEX: "{}",
    "sub/model.safetensors": b"",
    "onnx/model.onnx": b"",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "tf_model.h5": b"",
    "flax_model.msgpack": b"",
    "tuned_on.json": "{}",
    "notes.txt": "x",
}
BESIDE = ("README.md", ".gitattributes", "LICENSE", "recipe.yaml", ".git/config", ".eval_results/x.yaml", ".DS_Store")
PLAIN = {
    **{
        f"{name} cut to {share}": (at(name, cut, share), name) for name in (*FILES, SIDECAR) for share in (0, 0.5, 0.99)
    },
    **{f"a bit of {name} at {share}": (at(name, flip, share), name) for name in FILES for share in (0.1, 0.5, 0.9)},
    **{f"a bit of the hashes at {share}": (at(SIDECAR, flip, share), ".") for share in (0.1, 0.3, 0.5, 0.7, 0.9)},
    **{f"{name} added": (text(name, content), name) for name, content in EXTRA.items()},
    **{f"{name} beside it": (text(name, "x"), HARMLESS) for name in BESIDE},
    **{
        f"{kind} as {name}": (instead(name, make), name)
        for name in ("config.json", WEIGHTS, "tokenizer.json", SIDECAR)
        for kind, make in SPECIAL.items()
    },
    "a FIFO added": (lambda f: os.mkfifo(f / "chat_template.jinja"), "chat_template.jinja"),
    "a link to a folder added": (templates, "additional_chat_templates"),
    "a link to the same bytes elsewhere": (same_elsewhere, "tokenizer.json is a link out of its folder"),
    "a link inside the folder": (link_inside, HARMLESS),
    **{f"{name} gone": (lambda f, name=name: (f / name).unlink(), name) for name in (*FILES[1:], SIDECAR)},
    "config.json gone": (lambda f: (f / "config.json").unlink(), "without a config.json"),
    **{f"hash of {name} removed": (drop(SIDECAR, "sha256", name), name) for name in FILES},
    **{
        f"hash {value!r:.20}": (put(SIDECAR, ("sha256", WEIGHTS), value), WEIGHTS)
        for value in (None, 3, "", [], {}, "0" * 64, "A" * 64, "0" * 63, True)
    },
    **{
        f"hash of {name!r}": (put(SIDECAR, ("sha256", name), "0" * 64), SIDECAR)
        for name in ("../secret", "/etc/passwd", "a/../config.json", "", ".", "..", "a\\b", "./config.json", "a//b")
    },
    **{f"hashes are {value!r}": (put(SIDECAR, "sha256", value), SIDECAR) for value in (None, [], 3, "x", {})},
    "hashes hold a list": (text(SIDECAR, "[]"), SIDECAR),
    "hashes nested too deep": (text(SIDECAR, "[" * 100_000), SIDECAR),
    "hashes of bytes": (text(SIDECAR, b"\xff\xfe{}"), SIDECAR),
    "a hash twice": (text(SIDECAR, '{"sha256": {"a": "", "a": ""}}'), SIDECAR),
    "tensors swapped": (
        tensors(lambda t: t.update({f"model.layers.{i}.mlp.down_proj.u.weight": w for i, w in _swapped(t)})),
        WEIGHTS,
    ),
}


def _swapped(found):
    return [(1 - i, found[f"model.layers.{i}.mlp.down_proj.u.weight"].clone()) for i in range(2)]


def ours(field, *values):
    """Values of a field of `quantization_config` that are refused by its name."""
    names = field if isinstance(field, tuple) else (field,)
    return {
        f"{'.'.join(names)} = {v!r:.40}": (
            put("config.json", ("quantization_config", *names), v),
            f"quantization_config.*{names[-1] if names[0] != 'ranks' else ''}",
        )
        for v in values
    }


def configured(field, *values):
    return {f"config.{field} = {v!r:.40}": (put("config.json", field, v), ".") for v in values}


FORMAT = {
    **ours("ranks", None, 3, "x", [], [["x", 3]], {"": 3}, {"a..b": 3}, True),
    **ours(("ranks", DOWN), 0, -1, 1.5, "3", None, [], True, 2**31, 10**30, float("nan")),
    **{f"rank {v}": (put("config.json", ("quantization_config", "ranks", DOWN), v), DOWN) for v in (1, 7, 10**3)},
    "rank that takes all memory": (
        put("config.json", ("quantization_config", "ranks", DOWN), 10**9),
        "config.json describes a model of",
    ),
    **ours("groups", None, 3, "x", {}, [3], ["x"], [[3]], [[]], [["model.nothing"]], [[Q, Q]], [[[Q]]]),
    **ours("weighted", None, "1", 3, -1, 1.5, True, [], 10**9),
    "weighted, but it is not": (put("config.json", ("quantization_config", "weighted"), 1), "missing keys"),
    **ours("new", None, "x", -1, 1.5, True, [], 10**12),
    **ours("embedding", 3, "x", [], True, {}, {"name": "model.embed_tokens"}),
    **ours(("embedding", "name"), 3, None, "", [], "a..b"),
    **ours(("embedding", "rank"), 0, -1, 1.5, "3", None, True, 10**12),
    **ours(("embedding", "tied"), 1, "yes", None, []),
    **ours(("embedding", "scale"), "x", 0, -1, float("nan"), float("inf"), None, [], True),
    **ours(("embedding", "other"), 3),
    "the embedding is not tied": (put("config.json", ("quantization_config", "embedding", "tied"), False), "keys"),
    "the embedding is no embedding": (put("config.json", ("quantization_config", "embedding", "name"), DOWN), DOWN),
    "the embedding is not there": (put("config.json", ("quantization_config", "embedding", "name"), "x"), "layer x"),
    **ours("bits", None, 3, "x", [], {Q: 1}, {Q: 5}, {Q: True}, {Q: "8"}, {"": 8}, {Q: None}),
    "bits of nothing": (put("config.json", ("quantization_config", "bits"), {"model.nothing": 8}), "model.nothing"),
    "bits of a norm": (put("config.json", ("quantization_config", "bits"), {"model.norm": 4}), "model.norm"),
    "bits of bases": (put("config.json", ("quantization_config", "bits"), {DOWN: 8}), DOWN),
    "bits of a factor": (put("config.json", ("quantization_config", "bits"), {f"{DOWN}.u": 8}), f"{DOWN}.u"),
    **ours("heads", None, 3, [], {Q: 0}, {Q: 10**9}, {Q: "1"}, {"model.norm": 1}),
    "a head that is not there": (put("config.json", ("quantization_config", "heads"), {DOWN: 1}), DOWN),
    **ours("table", 3, "x", [], {}, {"name": "model.embed_tokens", "bits": 1, "tied": True}),
    "a table in version 1": (put("config.json", ("quantization_config", "format_version"), 1), "version 2"),
    "int8 in version 3": (put("config.json", ("quantization_config", "int8"), []), "version 1"),
    **{
        f"version {v!r}": (put("config.json", ("quantization_config", "format_version"), v), "format version")
        for v in (4, 0, -1, "1", None, 1.0, True, [])
    },
    **ours("rank", {}),
    **{f"no {f}": (drop("config.json", "quantization_config", f), ".") for f in ("ranks", "groups", "embedding")},
    "no version": (drop("config.json", "quantization_config", "format_version"), "format version"),
    **{
        f"method {v!r}": (put("config.json", ("quantization_config", "quant_method"), v), ".")
        for v in (None, 3, "x", [])
    },
    **{
        f"quantization_config = {v!r}": (put("config.json", "quantization_config", v), ".")
        for v in (None, 3, "x", [], {})
    },
}
CONFIG = {
    **configured("model_type", "nothing", 3, None, "", []),
    **configured("vocab_size", 10**9, -1, 0, "128", 127, None, 2.5),
    **configured("hidden_size", 0, 10**7, "16", 2.5, -16, None, 17),
    **configured("intermediate_size", 10**12, 0, -1, "24"),
    **configured("num_hidden_layers", 10**7, -1, "2", 0, 1, 3, 2.5, None),
    **configured("num_attention_heads", 0, 3, -4, "4", 10**9),
    **configured("num_key_value_heads", 0, 3, "2", 10**9),
    **configured("rms_norm_eps", float("nan"), float("inf"), -1.0, "x", -1),
    **configured(
        "rope_parameters", 3, "x", {"rope_theta": float("nan"), "rope_type": "default"}, {"rope_type": "none"}
    ),
    **configured("dtype", "float99", 3, "bfloat16", "int8", []),
    **configured("transformers_weights", "sub/model.safetensors", "../model.safetensors", "other.safetensors", 3),
    **configured("pad_token_id", 10**6, "x"),
    **configured("hidden_act", "nothing", 3),
    "code of its own": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="own", auto_map={"AutoConfig": "x.Config"})),
        "code of its own .auto_map., which is never run",
    ),
    "code of its own, not needed": (put("config.json", "auto_map", {"AutoModelForCausalLM": "x.Model"}), HARMLESS),
    "config is a list": (text("config.json", "[]"), "config.json"),
    "config names a key twice": (text("config.json", '{"a": 1, "a": 2}'), "config.json"),
    "config is nested too deep": (text("config.json", '{"a":' * 100_000), "config.json"),
    "config is empty": (text("config.json", "{}"), "."),
}


def _bytes(change):
    def write(folder):
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return write


def _first(head):
    return next(value for key, value in head.items() if key != "__metadata__" and value["shape"] != [0])


def _set(key, value):
    return header(lambda head: _first(head).update({key: value}) or head)


def _twice(head):
    body = json.dumps(head)
    name = next(key for key in head if key != "__metadata__")
    return (body[:-1] + f', "{name}": {json.dumps(head[name])}}}').encode()


FACTOR, NORM = f"{Q}.u.weight", "model.norm.weight"
TENSORS = {
    **{f"{v} in {name}": (fill(name, v), name) for name in (FACTOR, NORM) for v in map(float, ("nan", "inf", "-inf"))},
    "NaN in the table": (fill("lm_head.u.weight", float("nan")), "lm_head.u.weight"),
    "a factor gone": (tensors(lambda t: t.pop(FACTOR)), FACTOR),
    "the norm gone": (tensors(lambda t: t.pop(NORM)), NORM),
    "all gone": (tensors(lambda t: t.clear()), "."),
    "renamed": (tensors(lambda t: t.update({"x": t.pop(FACTOR)})), FACTOR),
    "one more": (tensors(lambda t: t.update({"x": torch.ones(3)})), "x"),
    "another shape": (tensors(lambda t: t.update({FACTOR: torch.ones(3, 3)})), FACTOR),
    "transposed": (tensors(lambda t: t.update({FACTOR: t[FACTOR].T.contiguous()})), FACTOR),
    "flat": (tensors(lambda t: t.update({FACTOR: t[FACTOR].flatten()})), FACTOR),
    "empty": (tensors(lambda t: t.update({FACTOR: torch.empty(0)})), FACTOR),
    **{
        f"as {kind}": (tensors(lambda t, k=kind: t.update({FACTOR: t[FACTOR].to(k)})), FACTOR)
        for kind in (torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "a dense layer where there are bases": (
        tensors(lambda t: t.update({f"{DOWN}.weight": torch.ones(16, 24)})),
        f"{DOWN}.weight",
    ),
    "and one that only looks like it": (
        tensors(lambda t: t.update({f"model.{DOWN}.weight": torch.ones(16, 24)})),
        f"{DOWN}.weight",
    ),
    "a hint that holds something": (tensors(lambda t: t.update({HINT: torch.ones(3)})), HINT),
    "no guards": (tensors(lambda t: [t.pop(n) for n in (HINT, f"{DOWN}.weight")]), HARMLESS),
    "header of no length": (_bytes(lambda b: struct.pack("<Q", 0) + b[8:]), WEIGHTS),
    "header longer than the file": (_bytes(lambda b: struct.pack("<Q", len(b)) + b[8:]), WEIGHTS),
    "header of 2^63 bytes": (_bytes(lambda b: struct.pack("<Q", 2**63) + b[8:]), WEIGHTS),
    "header a byte short": (_bytes(lambda b: struct.pack("<Q", struct.unpack("<Q", b[:8])[0] - 1) + b[8:]), WEIGHTS),
    "more at the end": (_bytes(lambda b: b + b"x"), WEIGHTS),
    "less at the end": (_bytes(lambda b: b[:-4]), WEIGHTS),
    "not safetensors": (_bytes(lambda b: b"PK\3\4" + b), WEIGHTS),
    "header of a list": (header(lambda h: b"[]"), WEIGHTS),
    "header not JSON": (header(lambda h: b"{" * 50), WEIGHTS),
    "header not UTF-8": (header(lambda h: b"\xff" * 50), WEIGHTS),
    "a tensor twice in the header": (header(_twice), HARMLESS),
    **{
        f"{key} {value}": (_set(key, value), WEIGHTS)
        for key, value in [
            ("dtype", "F128"),
            ("dtype", "F64"),
            ("dtype", None),
            ("shape", [-1]),
            ("shape", "x"),
            ("shape", [2**62, 2**62]),
            ("shape", [1]),
            ("data_offsets", [0, 2**60]),
            ("data_offsets", [8, 0]),
            ("data_offsets", [-8, 8]),
            ("data_offsets", []),
            ("data_offsets", [1, 65]),
        ]
    },
}


def index(content):
    """An index beside the one weight file; `content` changes what would be right."""

    def write(folder):
        right = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)}
        made = content(right)
        (folder / INDEX).write_text(json.dumps(right if made is None else made))

    return write


def place(value):
    return index(lambda i: i["weight_map"].update({FACTOR: value}))


def elsewhere(folder):
    (folder / "sub").mkdir()
    shutil.copy(folder / WEIGHTS, folder / "sub" / WEIGHTS)
    place(f"sub/{WEIGHTS}")(folder)


OTHERS = {
    "an index that is right": (index(lambda i: None), HARMLESS),
    "weights in a subfolder": (elsewhere, f"says that {FACTOR} is in sub/"),
    **{
        f"{FACTOR} in {v!r}": (place(v), INDEX)
        for v in (f"sub/{WEIGHTS}", f"../{WEIGHTS}", "/dev/zero", "other.safetensors", 3, None, [])
    },
    **{f"weight_map {v!r}": (index(lambda i, v=v: {**i, "weight_map": v}), INDEX) for v in (None, [], 3, "x", {})},
    **{f"metadata {v!r}": (index(lambda i, v=v: {**i, "metadata": v}), INDEX) for v in (None, [], 3, "x")},
    "index a list": (index(lambda i: []), INDEX),
    "token beyond the table": (
        TOKEN_BEYOND,
        "'beyond' as token 128",
    ),
    "token far beyond": (at("tokenizer.json", edit, lambda t: t["model"]["vocab"].update({"far": 10**9})), "10000000"),
    "added token beyond": (
        at(
            "tokenizer.json",
            edit,
            lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 128, "content": "<x>"}),
        ),
        "<x>",
    ),
    "added token of the config": (
        put("tokenizer_config.json", "extra_special_tokens", ["<more>"]),
        "<more>",
    ),
    **{
        f"tokenizer = {v}": (text("tokenizer.json", v), ".") for v in ("[]", "{}", "", '{"model": 3}', '{"version": 3}')
    },
    **{
        f"tokenizer.{key} = {v!r}": (put("tokenizer.json", key, v), ".")
        for key, v in [("model", None), ("model", {"type": "x"}), ("added_tokens", 3), ("added_tokens", [{"id": "x"}])]
    },
    **{f"tokenizer_config = {v}": (text("tokenizer_config.json", v), ".") for v in ("[]", "3", "{")},
    "tokenizer with code of its own": (
        lambda f: edit(
            f / "tokenizer_config.json",
            lambda c: c.update(tokenizer_class="Own", auto_map={"AutoTokenizer": ["x.Own", None]}),
        ),
        "code of its own .auto_map., which is never run",
    ),
    "end token of another type": (put("tokenizer_config.json", "eos_token", 3), "."),
    **{f"generation_config = {v}": (text("generation_config.json", v), ".") for v in ("[]", "3", "{")},
}
SIGNED = FORMAT | CONFIG | TENSORS | OTHERS


@pytest.mark.parametrize("forgery", sampled(PLAIN, 5))
def test_what_was_not_saved_is_refused(forgery, saved, tmp_path, quickly):
    folder = shutil.copytree(saved[0], tmp_path / "forged")
    do, sentence = PLAIN[forgery]
    do(folder)
    answer(folder, sentence, saved[1])


@pytest.mark.parametrize("forgery", sampled(SIGNED, 10))
def test_what_cannot_be_meant_is_refused_though_its_hashes_match(forgery, saved, tmp_path, quickly):
    folder = shutil.copytree(saved[0], tmp_path / "forged")
    do, sentence = SIGNED[forgery]
    do(folder)
    sign(folder)
    answer(folder, sentence, saved[1])


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("how", ["renamed", "written"])
def test_a_file_that_is_swapped_while_it_is_loaded_is_not_used(how, back, saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved[0], tmp_path / "checkpoint")
    other = shutil.copytree(saved[0], tmp_path / "other")
    fill(FACTOR, 5.0)(other)
    read = AutoModelForCausalLM.from_pretrained

    def exchange():
        if how == "renamed":
            for a, b in ((folder, tmp_path), (other, folder), (tmp_path, other)):
                (a / WEIGHTS).rename(b / WEIGHTS)
        else:
            swap(folder / WEIGHTS, other / WEIGHTS)

    def meanwhile(*args, **kwargs):
        exchange()
        try:
            return read(*args, **kwargs)
        finally:
            if back:
                exchange()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", meanwhile)
    with pytest.raises(ValueError, match=f"{WEIGHTS} was replaced or changed while it was loaded"):
        bs.load(folder)


@pytest.mark.slow
def test_verify_says_what_it_has_checked(saved):
    assert ": hashes match; logits are bit-equal" in CliRunner().invoke(app, ["verify", str(saved[0])]).output


def test_chat_templates_in_a_folder_of_their_own_are_recorded(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    folder = bs.save(tiny(hidden_size=16, intermediate_size=24), tokenizer, tmp_path / "a")
    assert bs.load(folder)[1].chat_template == tokenizer.chat_template
    text("additional_chat_templates/rag.jinja", "x")(folder)
    with pytest.raises(ValueError, match=r"rag.jinja is not the file that was saved"):
        bs.load(folder)
