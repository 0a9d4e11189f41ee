import copy
import json
import os

import pytest
import torch
from conftest import sampled, tiny
from safetensors.torch import load_file, save_file

import basis_select as bs
from basis_select.checkpoint.targets import targets
from basis_select.layers.group import groups
from basis_select.linalg.metrics import METRICS
from basis_select.statistics.moments import second_moments
from basis_select.statistics.readers import same_input


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """`make(kind, shard size, **options of tiny)`: a dense checkpoint on disk."""

    def make(kind="llama", shards="60KB", **options):
        folder = tmp_path / "dense"
        tiny(kind, **options).save_pretrained(folder, max_shard_size=shards)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def same_files(a, b):
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    for name in names:
        if name != "tokenizer_config.json":  # names the folder it was loaded from
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    return names


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"tied": True}),
        ("llama", {"tied": False, "dtype": "bfloat16"}),
        ("qwen2", {"tied": False}),
        ("gemma3_text", {"tied": True}),
        ("gpt_neox", {"tied": False}),
    ],
)
@pytest.mark.parametrize("share", sampled([True, False], 2))
def test_the_files_are_those_of_decompose_and_save(kind, options, share, checkpoint, ids, tmp_path):
    source = checkpoint(kind, **options)
    model, tokenizer = bs.load(source)
    bs.save(bs.decompose(model, metric="plain", share=share), tokenizer, tmp_path / "a", max_shard_size="40KB")
    out = bs.decompose_checkpoint(source, tmp_path / "b", metric="plain", share=share, max_shard_size="40KB")
    assert len([n for n in same_files(tmp_path / "a", out) if n.endswith(".safetensors")]) > 2
    assert torch.equal(bs.load(out)[0](ids).logits, model(ids).logits)


def tensors(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def same_tensors(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_experts_pass_through(checkpoint, tmp_path):
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    model, tokenizer = bs.load(source)
    bs.save(bs.decompose(model, metric="plain"), tokenizer, tmp_path / "a")
    assert same_tensors(tmp_path / "a", bs.decompose_checkpoint(source, tmp_path / "b", metric="plain"))


@pytest.mark.parametrize("metric", ["kronecker", "fisher", "whitened"])
def test_moments_may_come_from_elsewhere(metric, checkpoint, task, tmp_path):
    source = checkpoint("qwen2")
    model, tokenizer = bs.load(source)
    members = same_input(model, targets(model), task)
    moments = second_moments(model, members, task, 16, METRICS[metric])
    bs.save(bs.decompose(model, task, metric=metric, examples=16), tokenizer, tmp_path / "a")
    assert same_tensors(tmp_path / "a", bs.decompose_checkpoint(source, tmp_path / "b", None, moments, metric=metric))


def test_moments_are_collected_in_passes_where_a_task_is_given(checkpoint, task, tmp_path, monkeypatch):
    source = checkpoint(tied=True)
    model, tokenizer = bs.load(source)
    bs.save(bs.decompose(model, task, examples=16), tokenizer, tmp_path / "a")
    monkeypatch.setattr("basis_select.stream.moment_room", lambda device, coming: 400_000)
    assert same_tensors(tmp_path / "a", bs.decompose_checkpoint(source, tmp_path / "b", task, examples=16))


def test_what_the_task_never_reaches_stays_dense(checkpoint, task, tmp_path, caplog):
    source = checkpoint()
    model, _ = bs.load(source)
    name = "model.layers.1.mlp.down_proj"
    moments = second_moments(model, same_input(model, targets(model), task), task, 8, METRICS["whitened"])
    del moments[0][name]
    out, _ = bs.load(bs.decompose_checkpoint(source, tmp_path / "b", None, moments, metric="whitened"))
    assert f"{name} is never reached" in caplog.text
    assert torch.equal(out.get_submodule(name).weight, model.get_submodule(name).weight)


def test_another_dtype(checkpoint, tmp_path):
    source = checkpoint(dtype="bfloat16")
    model, tokenizer = bs.load(source, "float32")
    bs.save(bs.decompose(model, metric="plain"), tokenizer, tmp_path / "a")
    assert same_tensors(
        tmp_path / "a", bs.decompose_checkpoint(source, tmp_path / "b", metric="plain", dtype="float32")
    )


@pytest.mark.parametrize("fraction", [1, 0.5])
def test_keep_leaves_the_best_bases_and_is_no_larger(fraction, checkpoint, tmp_path):
    source = checkpoint(tied=True)
    whole = bs.decompose(bs.load(source)[0], metric="plain")
    part, _ = bs.load(bs.decompose_checkpoint(source, tmp_path / "b", metric="plain", keep=fraction))
    sizes = bs.sizes(part)
    assert 0.9 * fraction * sizes["targeted_dense"] < sizes["targeted"] < fraction * sizes["targeted_dense"]
    for mine, full in zip(*([g.leader for g in groups(m)] for m in (part, whole)), strict=True):
        assert torch.equal(mine.u.weight, full.u.weight[:, : mine.rank])
        assert torch.equal(mine.v.weight, full.v.weight[: mine.rank])
    pruned = [bs.prune(m, keep=fraction / 4, multiple_of=1) for m in (copy.deepcopy(part), whole)]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in pruned), strict=True))


NAME = "model.layers.1.self_attn.k_proj.weight"


def holder(folder, name=NAME):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def unlist(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][NAME]
    path.write_text(json.dumps(index))


def rewrite(path, change):
    held = load_file(path)
    change(held)
    save_file(held, path, metadata={"format": "pt"})


DAMAGE = {
    "cut short": (lambda f: os.truncate(holder(f), holder(f).stat().st_size - 9), "is not a whole safetensors file, "),
    "no shard": (lambda f: holder(f).unlink(), "is missing: it should hold model"),
    "not listed": (unlist, f"holds no tensor {NAME}, which its config.json asks for"),
    "not there": (lambda f: rewrite(holder(f), lambda t: t.pop(NAME)), f"does not hold {NAME}, which the index"),
    "other shape": (
        lambda f: rewrite(holder(f), lambda t: t.update({NAME: torch.ones(3, 4)})),
        rf"holds {NAME} of shape \[3, 4\], config.json asks for \[32, 64\]",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "holds neither model.safetensors nor"),
    "not finite": (
        lambda f: rewrite(holder(f), lambda t: t[NAME].fill_(torch.nan)),
        "layers.1.self_attn.q_proj .* non-finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_named_and_nothing_is_left_behind(damage, checkpoint, tmp_path):
    source = checkpoint()
    do, message = DAMAGE[damage]
    do(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bs.decompose_checkpoint(source, tmp_path / "out", metric="plain")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("last", ["model.layers.1.self_attn.o_proj", "model.safetensors"])
def test_interrupted_in_the_middle_nothing_is_left_behind(checkpoint, tmp_path, monkeypatch, last):
    """While factors are written, and while the shard is written from them."""
    source, seen = checkpoint(), []

    def interrupt(tensors, path, **options):
        seen.append(path)
        if path.name == last:
            raise KeyboardInterrupt
        save_file(tensors, path, **options)

    monkeypatch.setattr("basis_select.stream.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bs.decompose_checkpoint(source, tmp_path / "out", metric="plain")
    assert seen[0].parent.name == "waiting"
    assert seen[0].parent.parent.parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_options_that_cannot_be_met(checkpoint, tmp_path):
    source = checkpoint()
    for options, message in (
        ({"metric": "cholesky"}, "metric is 'cholesky', it should be"),
        ({"metric": "kronecker"}, "needs second moments"),
        ({"keep": 1.5}, "keep is 1.5, it should be"),
        ({"dtype": "int8"}, "dtype is 'int8', it should be"),
        ({"keep": 0.01}, "keep=0.01 leaves no basis in"),
    ):
        with pytest.raises(ValueError, match=message):
            bs.decompose_checkpoint(source, tmp_path / "out", **{"metric": "plain", **options})
    out = bs.decompose_checkpoint(source, tmp_path / "out", metric="plain")
    with pytest.raises(ValueError, match="decomposed already"):
        bs.decompose_checkpoint(out, tmp_path / "again", metric="plain")
    with pytest.raises(FileExistsError):
        bs.decompose_checkpoint(source, out, metric="plain")
