"""The pretrained model of the quickstart, cut to its first layers so that decomposing takes seconds."""

import copy
import dataclasses
from pathlib import Path

import gguf
import pytest
import torch

import basis_select as bs
from basis_select.checkpoint.format import dense_on_meta
from basis_select.run import recipe as recipes
from basis_select.training.data import Batches
from basis_select.training.loss import response_logits, task_loss

pytestmark = pytest.mark.slow
REAL = Path(__file__).parents[2] / "shared/data"
RECIPE = recipes.read(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")


@pytest.fixture(scope="module")
def loaded():
    return bs.load(RECIPE.model)


def test_the_wheel_gives_a_model_that_knows_english(loaded):
    model, tokenizer = loaded
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert isinstance(gguf.GGUFReader, type)  # what read the file once is gone


def test_the_kronecker_metric_keeps_what_the_task_needs(loaded):
    model, tokenizer = loaded
    parent = copy.deepcopy(model)
    parent.model.layers = parent.model.layers[:3]
    parent.config.num_hidden_layers = 3
    task = bs.load_task(
        RECIPE.task, tokenizer, **{**dataclasses.asdict(RECIPE.data), "train": 64, "test": 16, "validation": 16}
    )
    batch = Batches(task.test, 16, 1, 0)[0]
    divergence = {}
    for metric in ("plain", "kronecker"):
        small = bs.decompose(copy.deepcopy(parent), task, metric=metric, examples=48)
        with torch.no_grad():
            full, dense = response_logits(small, batch), response_logits(parent, batch)
        assert torch.allclose(full, dense, atol=1e-3 * dense.abs().max())
        bs.prune(small, keep=0.25)
        with torch.no_grad():
            divergence[metric] = task_loss(small, batch, parent)[2].item()
    assert divergence["kronecker"] < 0.5 * divergence["plain"]


@pytest.mark.parametrize(("name", "train"), [("math/gsm8k", 1500), ("code/mbpp", 374)])
def test_a_trimmed_tokenizer_reads_and_writes_real_data_sets(name, train, loaded):
    if not REAL.is_dir():
        pytest.skip(f"there is no {REAL}")
    model, tokenizer = loaded
    how = {"options": {"data_dir": str(REAL / name)}, "train": train, "max_length": 2048}
    task = bs.load_task(Path(name).name, tokenizer, **how)
    _, smaller, report = bs.trim(dense_on_meta(copy.deepcopy(model.config)), tokenizer, task)
    assert report["tokens"] < len(tokenizer) / 2
    after = bs.load_task(Path(name).name, smaller, **how)
    for a, b in zip(task.train, after.train, strict=True):
        assert tokenizer.convert_ids_to_tokens(a.input_ids) == smaller.convert_ids_to_tokens(b.input_ids)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    for text in [chat, "".join(map(chr, range(1, 3000))), *(e.prompt + e.response for e in task.test)]:
        for special in (False, True):
            assert smaller.decode(smaller.encode(text, add_special_tokens=special)) == tokenizer.decode(
                tokenizer.encode(text, add_special_tokens=special)
            )
