import dataclasses
import functools
import json
import sys

import pytest
import torch
from conftest import sampled, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from basis_select import decompose, prune, save
from basis_select.checkpoint.targets import targets
from basis_select.data.tasks import load_task
from basis_select.evaluation.accuracy import evaluate
from basis_select.layers.group import groups
from basis_select.layers.rounding import GROUP
from basis_select.learn import weights
from basis_select.run import measuring
from basis_select.run.plan import plan
from basis_select.run.recipe import Recipe, override
from basis_select.training import precision
from basis_select.training.cost import Flops, moments_step, training_step
from basis_select.training.data import Batches
from basis_select.training.loss import task_loss
from basis_select.tune import trainable

pruning = sys.modules["basis_select.selection"]


def shape_of(batch):
    return (*batch["input_ids"].shape, len(batch["targets"]))


@pytest.mark.parametrize("kind", sampled(["llama", "qwen2", "gpt_neox"], 2))
def test_a_step_without_data_costs_what_the_real_one_does(kind, task):
    """FLOPs exactly, and the bytes of parameters and of AdamW's states."""
    model, parent = tiny(kind), tiny(kind, seed=1).requires_grad_(False)
    trainable(model)
    batch = next(iter(Batches(task.train, 8, 1, 0)))
    with Flops() as counted:
        task_loss(model, batch, parent)[0].backward()
    cost = training_step(model.config, shape_of(batch), trainable, taught=True)
    assert cost.flops + cost.head_flops == counted.flops
    trained = [p for p in model.parameters() if p.requires_grad]
    states = sum(2 * p.nbytes + 4 for p in trained)  # two moments, and a count of steps
    assert cost.held == sum(p.nbytes for m in (model, parent) for p in m.parameters()) + states
    assert cost.gradients == sum(p.nbytes for p in trained)
    assert cost.passing > cost.gradients


@pytest.mark.slow
def test_what_saves_memory_is_seen_to(task):
    config, shape = tiny(num_hidden_layers=16).config, (16, 64, 64)
    step = functools.partial(training_step, config, shape, trainable, taught=True)
    whole, again, narrow = step(), step(checkpointing=True), step(precision="plus", teacher="bfloat16")
    assert again.passing < 0.7 * whole.passing
    assert again.flops > whole.flops
    assert narrow.held < 0.8 * whole.held
    assert narrow.gradients == whole.gradients / 2
    eighth = step(precision="plus", teacher="int8")
    linears = sum(
        m.weight.numel() - 2 * m.out_features for m in targets(AutoModelForCausalLM.from_config(config)).values()
    )
    assert narrow.held - eighth.held == linears
    assert moments_step(config, shape).passing < whole.passing
    assert whole.block < whole.held / 16


def test_factored_layers_cost_what_their_ranks_say(task):
    model = prune(decompose(tiny(), task), keep=0.4, multiple_of=4)
    described = {
        "ranks": {name: layer.rank for group in groups(model) for name, layer in group.items()},
        "groups": [list(group.names) for group in groups(model) if len(group.names) > 1],
    }
    batch = next(iter(Batches(task.train, 8, 1, 0)))
    trainable(model)
    with Flops() as counted:
        task_loss(model, batch)[0].backward()
    cost = training_step(tiny().config, shape_of(batch), trainable, bases=described)
    assert cost.flops + cost.head_flops == counted.flops
    with FlopCounterMode(display=False) as other, sdpa_kernel(SDPBackend.MATH):  # torch's own misses a CPU's fused one
        task_loss(model, batch, mixed=False)[0].backward()
    assert counted.flops == pytest.approx(other.get_total_flops(), rel=0.1)  # how attention goes backward differs
    alone = training_step(tiny().config, shape_of(batch), weights, bases={**described, "weighted": 1})
    assert alone.gradients == 4 * sum(group.rank for group in groups(model))
    assert alone.flops < cost.flops


def test_weights_that_train_rounded_cost_what_such_a_step_takes(task, in_fp32):
    model, shape = prune(decompose(tiny(tied=True), task), keep=0.4, budget="uniform", multiple_of=4), (8, 32, 64)
    ranks = {name: layer.rank for group in groups(model) for name, layer in group.items()}
    step = functools.partial(training_step, model.config, shape, trainable, bases={"ranks": ranks})
    wide, rounded = step(), step(rounded=True)
    assert rounded.flops == wide.flops
    weights = sum(group.parameters for group in groups(model))
    scales = rounded.gradients - wide.gradients
    assert 4 * weights / GROUP < scales < 4 * weights / 4  # of ranks that fill no group, more
    assert rounded.held - wide.held == pytest.approx(3 * scales, rel=0.1)  # they, and two moments of each
    assert rounded.passing - wide.passing > 4 * weights  # rounded, until the way back


def test_soft_labels_take_the_place_of_the_parent(task):
    step = functools.partial(training_step, tiny().config, (8, 64, 64), trainable)
    alone, taught, told = step(), step(taught=True), step(taught=True, soft_labels=8)
    assert told.flops == alone.flops < taught.flops
    assert told.held == alone.held < taught.held


@pytest.mark.slow
def test_a_largest_batch_that_comes_first_finds_no_optimizer_states(tokenizer, tmp_path):
    save(tiny(), tokenizer, tmp_path / "model")
    rows = [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(40)]
    rows[0]["prompt"] = 60 * "0" + rows[0]["prompt"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = Recipe(model=str(tmp_path / "model"), task=str(tmp_path / "data.jsonl"))
    sizes = {"data.validation": 4, "data.test": 4, "tune.steps": 4, "tune.batch_size": 8, "prune.keep": 0.5}
    memory = {True: set(), False: set()}
    for seed in range(12):
        if all(memory.values()):
            break
        recipe = override(plain, {**sizes, "seed": seed}, "test")
        found = plan(recipe, rates={"train": 1e9, "float64": 1e9})
        train = found.task.train
        long = max(range(len(train)), key=lambda i: len(train[i].input_ids))
        if len(train[long].input_ids) > 50:
            tuned = next(step for step in found.steps if step.name == "tune")
            memory[long in Batches(train, 8, 4, seed).rows(0)].add(tuned.cost.memory)
    assert max(memory[True]) < min(memory[False])


@pytest.fixture
def small(tokenizer, tmp_path):
    """A recipe of three rows over a tiny model."""
    save(tiny(), tokenizer, tmp_path / "model")
    rows = [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.validation": 4, "data.test": 4, "prune.keep": 0.5, "sizes": [0.7], "heal.steps": 2}
    plain = Recipe(model=str(tmp_path / "model"), task=str(tmp_path / "data.jsonl"))
    return override(plain, {**changes, "compare": {"unhealed": {"heal.steps": 0}}}, "test")


def test_everything_that_is_published_is_saved_evaluated_and_timed(small):
    found = plan(small, rates={"train": 1e9, "float64": 1e9})
    for kind in ("save", "evaluate"):
        assert [step.row for step in found.steps if step.name == kind] == ["parent", *found.rows]
    sizes = {s.row: s.cost.memory / 10 for s in found.steps if s.name == "save"}  # fp32 twice, then two bytes
    assert sizes["parent"] == sum(p.numel() for p in found.model.parameters())
    assert sizes["unhealed"] == sizes["result"] < sizes["result at 0.7"] < sizes["parent"]
    timed = next(s.cost for s in found.steps if s.name == "time")
    wide = 2 if precision.fast_bf16(torch.device("cpu")) else 4
    assert timed.memory == pytest.approx(wide * sum(sizes.values()))  # they take turns: all are in memory
    assert sum(s.name == "prune" for s in found.steps) == 2
    assert all(s.cost.memory for s in found.steps if s.name in ("prune", "save", "evaluate", "time"))


@pytest.mark.parametrize("tied", [True, False])
def test_products_of_an_evaluation_are_those_counted(tied, small, tokenizer):
    """Padded as lm-eval pads, with the head at every token that is scored; attention is not counted."""
    unscored = dataclasses.replace(load_task(small.task, tokenizer, validation=4, test=20), score=None)
    model = tiny(tied=tied, hidden_size=256, intermediate_size=512)
    with Flops() as counted:
        evaluate(model, tokenizer, unscored)
    linear = sum(m.weight.numel() for m in targets(model).values())
    head = model.get_output_embeddings().weight.numel() if tied else 0
    said = measuring.evaluating(unscored, measuring.Final(0, linear, head, 128, "float32"), {"train": 1.0})
    assert said.flops == pytest.approx(counted.flops, rel=0.1)


def test_pruning_tries_no_more_often_than_planned(task, tokenizer, monkeypatch):
    calls, measured = [], pruning.response_nll
    monkeypatch.setattr(pruning, "response_nll", lambda *args: calls.append(1) or measured(*args))
    plain = Recipe(model="any", task="any")
    for changes in ({"max_drop": 1e-9}, {"max_drop": 0.3}, {"max_drop": 3.0}, {"size": "1.2x"}, {"size": "3x"}):
        calls.clear()
        table = "size" in changes
        model = decompose(tiny(tied=True), task, examples=8, embedding=table)
        prune(model, task, multiple_of=2, **changes)
        recipe = override(plain, {"decompose.embedding": table, "prune.multiple_of": 2, "prune.keep": None}, "test")
        said = dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, **changes))
        assert len(calls) + 1 <= measuring.validations(said, 64) <= len(calls) + 12  # and one at the stage's end
