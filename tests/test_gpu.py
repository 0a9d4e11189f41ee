"""Where there is a GPU, what a run computes is computed there. Shown on a pretended one, see pretended_gpu.py."""

import copy
import functools
import json

import pytest
import torch
from conftest import make_tokenizer, tiny
from pretended_gpu import CPU, GPU, device_of, pretended_gpu
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

import basis_select as bs
from basis_select.evaluation.speed import decode_speed
from basis_select.run import verbs
from basis_select.run.disk import OnDisk
from basis_select.run.recipe import Recipe, override
from basis_select.system import processes


@pytest.fixture
def gpu():
    with pretended_gpu() as device:
        yield device


@pytest.fixture
def where():
    """Devices of all models that have run."""
    seen = set()

    def look(module, args):
        if isinstance(module, PreTrainedModel):
            seen.update(device_of(p) for p in module.parameters())

    handle = register_module_forward_pre_hook(look)
    yield seen
    handle.remove()


def test_what_is_refused_on_a_gpu_is_refused_here(gpu):
    x = torch.ones(3, device=gpu)
    assert x.device == (x + 1).device == x.new_zeros(2).device == copy.deepcopy(x).device == GPU
    assert x.cpu().device == torch.ones(3).to(x.cpu()).device == CPU
    assert (x * torch.tensor(2.0)).device == GPU  # a number may be anywhere
    assert x[torch.tensor([0, 2])].device == GPU  # and so may indices
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, x.cpu()]),
        lambda: x.cpu()[torch.tensor([0], device=gpu)],
        lambda: torch.randn(3, device=gpu, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=r"mixes devices|given a generator"):
            wrong()
    with pytest.raises(TypeError, match="NumPy"):
        x.numpy()


def test_a_process_computes_on_its_gpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert processes.device() == torch.device("cuda", 2)


ROWS = {
    "labels": {
        "heal.precision": "plus",
        "heal.lr": None,
        "refine.steps": 1,
        "extend.rank": 2,
        "extend.init": "gradient",
    },
    "taylor": {"soft_labels": 0, "learn.steps": 0, "prune.score": "taylor", "heal.lora": 2},
    "basel": {
        "soft_labels": 0,
        "decompose.metric": "plain",
        "decompose.share": False,
        "learn.square": True,
        "learn.new": 2,
        "learn.rest": True,
        "prune.budget": "mass",
        "heal.embeddings": True,
    },
    "table": {
        "soft_labels": 0,
        "learn.steps": 0,
        "decompose.embedding": True,
        "prune.keep": None,
        "prune.size": "1.5x",
        "extend.rank": 2,
        "extend.init": "residual",
    },
    "drop": {
        "soft_labels": 0,
        "learn.steps": 0,
        "prune.keep": None,
        "prune.max_drop": 0.5,
        "extend.rank": 2,
        "extend.init": "gradient",
        "heal.steps": 0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_stage_computes_on_the_gpu(row, gpu, where, tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "decode_speed", functools.partial(decode_speed, tokens=2, rounds=1))
    bs.save(tiny(tied=True, num_hidden_layers=1), make_tokenizer(), tmp_path / "model")
    lines = [json.dumps({"prompt": f"{a}+{b}=", "response": str(a + b)}) for a in range(8) for b in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    plain = Recipe(model=str(tmp_path / "model"), task=str(tmp_path / "data.jsonl"))
    changes = {"data.test": 4, "data.validation": 4, "decompose.examples": 8, "prune.multiple_of": 4, "prune.keep": 0.5}
    for stage in ("tune", "learn", "heal"):
        changes |= {f"{stage}.steps": 2, f"{stage}.batch_size": 4}
    recipe = override(plain, {**changes, "learn.rounds": 1, "heal.lr": 1e-3, **ROWS[row]}, "test")
    (tmp_path / "run" / "stages").mkdir(parents=True)
    disk = OnDisk(recipe, tmp_path / "run")
    disk.time({"parent": disk.row(dense=True), "result": disk.row()})
    assert where == {GPU}
