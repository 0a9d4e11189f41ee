import functools
import json

import pytest
from conftest import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from basis_select import decompose, prune, save
from basis_select.bases import groups
from basis_select.cost import Flops, moments_step, training_step
from basis_select.decompose import targets
from basis_select.learn import weights
from basis_select.plan import forecast
from basis_select.recipe import Recipe, override
from basis_select.training.data import Batches
from basis_select.training.loss import task_loss
from basis_select.tune import trainable


def shape_of(batch):
    return (*batch["input_ids"].shape, len(batch["targets"]))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
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
        "ranks": {name: layer.rank for members in groups(model) for name, layer in members},
        "groups": [[name for name, _ in members] for members in groups(model) if len(members) > 1],
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
    assert alone.gradients == 4 * sum(members[0][1].rank for members in groups(model))
    assert alone.flops < cost.flops


def test_soft_labels_take_the_place_of_the_parent(task):
    step = functools.partial(training_step, tiny().config, (8, 64, 64), trainable)
    alone, taught, told = step(), step(taught=True), step(taught=True, soft_labels=8)
    assert told.flops == alone.flops < taught.flops
    assert told.held == alone.held < taught.held


def test_a_largest_batch_that_comes_first_finds_no_optimizer_states(tokenizer, tmp_path):
    save(tiny(), tokenizer, tmp_path / "model")
    rows = [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(40)]
    rows[0]["prompt"] = 60 * "0" + rows[0]["prompt"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = Recipe(model=str(tmp_path / "model"), task=str(tmp_path / "data.jsonl"))
    sizes = {"data.validation": 4, "data.test": 4, "tune.steps": 4, "tune.batch_size": 8, "prune.keep": 0.5}
    found = {True: set(), False: set()}
    for seed in range(12):
        recipe = override(plain, {**sizes, "seed": seed}, "test")
        _, task, _, stages = forecast(recipe, rates={"train": 1e9, "float64": 1e9})
        long = max(range(len(task.train)), key=lambda i: len(task.train[i].input_ids))
        if len(task.train[long].input_ids) > 50:
            tuned = next(stage for _, stage in stages if stage.name == "tune")
            found[long in Batches(task.train, 8, 4, seed).rows(0)].add(tuned.memory)
    assert max(found[True]) < min(found[False])
