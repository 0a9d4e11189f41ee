"""What tests of damage do: functions of a path, and below them what makes functions of a folder."""

import json
import os
import socket

import pytest
import torch
from conftest import logits
from safetensors.torch import load_file, save_file

import basis_select as bs
from basis_select.checkpoint.checks import SIDECAR
from basis_select.system.reading import sha256

WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 20)[None]
HARMLESS = None  # in place of a sentence


def flip(path, at=1):
    """Flip a bit; at: the share of the file that stands before its byte."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


def swap(a, b):
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def edit(path, change):
    """`change` gets the content of a JSON file and changes it in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def into_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def sign(folder):
    """Record the hashes anew: damage by whoever writes checkpoints, which no hash can find."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != SIDECAR]
    files = {p.relative_to(folder).as_posix(): sha256(p) for p in paths}
    (folder / SIDECAR).write_text(json.dumps({"sha256": files}))


def at(name, do, *how):
    return lambda folder: do(folder / name, *how)


def put(name, field, value):
    """Set a field of a JSON file, a path of keys."""

    def change(content):
        *parents, last = field if isinstance(field, tuple) else (field,)
        for key in parents:
            content = content[key]
        content[last] = value

    return at(name, edit, change)


def drop(name, *fields):
    def change(content):
        for key in fields[:-1]:
            content = content[key]
        del content[fields[-1]]

    return at(name, edit, change)


def text(name, content):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content) if isinstance(content, str) else (folder / name).write_bytes(content)

    return write


def tensors(change, name=WEIGHTS):
    """`change` gets the tensors of a file and changes them in place."""

    def write(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return write


def fill(name, value):
    return tensors(lambda found: found[name].view(-1)[0].fill_(value))


def instead(name, make):
    def write(folder):
        (folder / name).unlink()
        make(folder / name)

    return write


def own_code(folder):
    """Code of a model's own, which leaves a mark if it is ever run."""
    text("x.py", "from pathlib import Path; Path(__file__).with_name('ran').touch()")(folder)
    code = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
    edit(folder / "config.json", lambda c: c.update(model_type="own", auto_map=code))


def _link_out(path):
    other = path.parent.with_name("other")
    other.write_bytes(b"{}")
    path.symlink_to(other)


def _listen(path):
    where = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(where)


SPECIAL = {  # what may stand in place of a file
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link out": _link_out,
    "a socket": _listen,
}
ADAPTER = '{"base_model_name_or_path": "x", "peft_type": "LORA"}'
EXPORT = '{"export_format": "onnx"}'
TOKEN_BEYOND = at("tokenizer.json", edit, lambda t: t["model"]["vocab"].update({"beyond": 128}))


def answer(folder, sentence, expected):
    """Loading `folder` fails with one sentence that names it, or, if harmless, gives the logits `expected` of IDS."""
    if sentence is HARMLESS:
        assert torch.equal(logits(bs.load(folder)[0], IDS), expected)
        return
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        bs.load(folder)
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said.strip()
