import contextlib
import copy
import functools
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, log_probabilities, make_task, make_tokenizer, sampled, tiny
from torch.optim.optimizer import register_optimizer_step_pre_hook

from basis_select import decompose, heal, learn, load, prune, refine, save, tune
from basis_select.checkpoint.verify import probe_logits
from basis_select.heal import add_adapters, suitable_rate
from basis_select.layers.group import groups, table_of
from basis_select.layers.rounded import RoundedLinear
from basis_select.run.work import load_teacher
from basis_select.system import processes
from basis_select.training import precision
from basis_select.training.collage import VARIANTS
from basis_select.training.data import AT_ONCE, Batches


@pytest.fixture(scope="module")
def made():
    """A tuned parent and what is left of it after a cut."""
    parent, task = tiny(tied=True), make_task()
    tune(parent, task, steps=60, batch_size=8, lr=1e-2)
    return parent, prune(decompose(copy.deepcopy(parent), task, metric="plain"), keep=0.15, multiple_of=1)


@pytest.fixture
def broken(made):
    return copy.deepcopy(made)


@pytest.mark.parametrize("kind", ["fp32", "plus"])
def test_a_weight_with_gaps_in_memory_trains_as_one_without(task, kind):
    whole, gaps = tiny(), tiny()
    for layer in (m for m in gaps.modules() if isinstance(m, torch.nn.Linear)):
        layer.weight = torch.nn.Parameter(torch.nn.functional.pad(layer.weight.detach(), (0, 5))[:, :-5])
    for model in (whole, gaps):
        tune(model, task, steps=3, batch_size=4, lr=1e-2, precision=kind)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), gaps.parameters(), strict=True))


@pytest.mark.slow
def test_healing_in_bfloat16_comes_back_with_what_was_carried(task, broken, tmp_path):
    parent, start = broken
    kl = {}
    for kind in ("fp32", *VARIANTS):
        model = heal(
            copy.deepcopy(start),
            task,
            parent,
            tmp_path / kind,
            steps=40,
            batch_size=8,
            lr=3e-3,
            precision=kind,
        )
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        rows = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        kl[kind] = sum(row["kl"] for row in rows[-8:]) / 8
        measured = [row["descent_quality"] for row in rows if "descent_quality" in row]
        assert len(measured) == (0 if kind == "fp32" else 4)
        carried = any((p != p.bfloat16().float()).any() for name, p in model.named_parameters() if "u.weight" in name)
        assert carried == (kind in ("fp32", "plus", "light", "kahan", "master"))
    assert kl["plus"] < 1.1 * kl["fp32"]
    assert kl["plus"] < 0.9 * rows[0]["kl"]


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_no_step_is_without_a_rate_and_one_has_the_whole(steps, task, tmp_path):
    """The rates that metrics say are those that the optimizer had."""
    used = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    tune(tiny(), task, tmp_path, steps=steps, batch_size=2, lr=1e-3)
    handle.remove()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == used
    warm = math.ceil(0.05 * steps)
    assert rates[:warm] == pytest.approx([1e-3 * (i + 1) / warm for i in range(warm)])
    assert max(rates) == rates[warm - 1] == 1e-3
    assert rates[warm - 1 :] == sorted(rates[warm - 1 :], reverse=True)
    assert rates[-1] > 0
    cosine = [(1 + math.cos(math.pi * i / (steps - warm + 1))) / 2 for i in range(steps - warm + 1)]
    assert rates[warm - 1 :] == pytest.approx([1e-3 * share for share in cosine])


@pytest.mark.parametrize(
    ("kind", "variant"),
    sampled([*((kind, "plus") for kind in KINDS), *(("llama", v) for v in VARIANTS[1:])], 12),
)
@pytest.mark.parametrize("verb", [tune, learn, heal])
def test_what_comes_back_from_bfloat16_is_what_is_saved(verb, kind, variant, task, tmp_path):
    """Logits and buffers, bit for bit: rotary frequencies too, which no file holds."""
    model = tiny(kind)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    parent, options = [], {"steps": 2, "batch_size": 4, "lr": 1e-3, "precision": variant}
    if verb is not tune:
        parent, model = [tiny(kind)], decompose(model, task, metric="plain")
    verb(prune(model, keep=0.4, multiple_of=2) if verb is heal else model, task, *parent, **options)
    save(model, make_tokenizer(), tmp_path / "model")
    again, _ = load(tmp_path / "model")
    assert torch.equal(probe_logits(model), probe_logits(again))
    for name, buffer in buffers.items():
        assert torch.equal(model.get_buffer(name), buffer), name
        assert model.get_buffer(name).dtype == buffer.dtype


def test_training_in_bfloat16_sees_the_buffers_that_loading_in_bfloat16_gives(task, tmp_path):
    for kind in ("llama", "gemma3_text"):
        model, seen = tiny(kind), {}
        save(model, make_tokenizer(), tmp_path / kind)
        loaded, _ = load(tmp_path / kind, "bfloat16")
        handle = model.get_output_embeddings().register_forward_hook(
            lambda *args, seen=seen, model=model: seen.update({name: b.clone() for name, b in model.named_buffers()})
        )
        tune(model, task, steps=1, batch_size=4, precision="plus")
        handle.remove()
        for name, buffer in loaded.named_buffers():
            assert seen[name].dtype == buffer.dtype
            assert torch.equal(seen[name], buffer), name


def test_bfloat16_products_in_fp32_are_rounded_once(ids, in_fp32):
    """On a processor without native bf16: the same values as torch's emulation, gradients too, to one rounding."""
    model, found = tiny("qwen2").bfloat16().requires_grad_(True), []
    for context in (precision.autocast(model), contextlib.nullcontext()):
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        found.append([loss, *grads])
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        scale = other.float().square().mean().sqrt()
        assert ((mine.float() - other.float()).square().mean().sqrt()) <= 0.05 * scale


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_short_attention_is_attention(kind, ids, monkeypatch):
    """Values and gradients of an fp32 model in mixed precision, fused kernel and plain products: to bf16's rounding."""
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    model, found, calls = tiny(kind).requires_grad_(True), [], []
    apply = precision._CausalAttention.apply
    monkeypatch.setattr(precision._CausalAttention, "apply", lambda *args: calls.append(1) or apply(*args))
    for longest in (0, 128):
        monkeypatch.setattr(precision._ShortAttention, "LONGEST", longest)
        with precision.autocast(model):
            loss = model(input_ids=ids, labels=ids).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(calls) == model.config.num_hidden_layers
    for mine, other in zip(*found, strict=True):
        scale = other.float().square().mean().sqrt()
        assert (mine.float() - other.float()).square().mean().sqrt() <= 0.05 * scale


@pytest.mark.parametrize("tokens", [3, 64, 65, 200])
@pytest.mark.parametrize("sharper", [1, 4])
def test_gradients_of_short_attention(tokens, sharper):
    """As near to those of float32 as the fused kernel's, of scores up to 100 too, where heads share keys."""
    shapes = [(2, tokens, heads, 16) for heads in (6, 2, 2)]
    x = [torch.randn(shape).mul(by).bfloat16() for shape, by in zip(shapes, (sharper, sharper, 1), strict=True)]
    fused = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True, scale=0.25)
    found = []
    for attend, dtype in ((precision._CausalAttention.apply, None), (fused, None), (fused, torch.float32)):
        q, k, v = (part.to(dtype).transpose(1, 2).requires_grad_() for part in x)
        y = attend(q, k, v, 0.25) if attend is not fused else fused(q, k, v)
        found.append([y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y).cumsum(-1) / 16)])
    for mine, theirs, exact in zip(*found, strict=True):
        near = (theirs - exact).norm() + 0.01 * exact.norm()
        assert (mine - exact).norm() <= 2 * near


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", sampled(["fp32", "plus"], 2))
def test_checkpointing_changes_no_gradient(task, broken, kind, native, monkeypatch):
    parent, start = broken
    monkeypatch.setattr(precision, "fast_bf16", lambda device: native)
    options = {"steps": 3, "batch_size": 8, "lr": 1e-3, "precision": kind}
    models = [heal(copy.deepcopy(start), task, parent, checkpointing=on, **options) for on in (False, True)]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6 if kind == "fp32" else 1e-3), name
    assert not any(getattr(m, "gradient_checkpointing", False) for m in models[1].modules())


def test_weights_learned_in_bfloat16_stay_whole(task):
    """The factors compute in bfloat16; the weights that decide what stays, and what comes back, are fp32."""
    parent = tiny()
    learned = [
        learn(decompose(copy.deepcopy(parent), task), task, parent, keep=0.4, steps=8, batch_size=8, precision=kind)
        for kind in ("fp32", "plus")
    ]
    fp32, plus = ([group.leader for group in groups(m)] for m in learned)
    for a, b in zip(fp32, plus, strict=True):
        assert torch.equal(a.v.weight, b.v.weight)
        assert torch.equal(a.s.scale, b.s.scale)
        assert not torch.equal(b.s.learned, b.s.learned.bfloat16().float())
        assert (a.s.learned - b.s.learned).abs().mean() < 0.2 * (a.s.learned - 1).abs().mean()


@pytest.mark.slow
def test_a_killed_healing_in_bfloat16_continues_bit_for_bit(task, broken, tmp_path, monkeypatch):
    parent, start = broken
    monkeypatch.setattr("basis_select.training.engine.SAVE_EVERY", 0.0)
    options = {"steps": 12, "batch_size": 8, "lr": 3e-3, "precision": "plus"}
    calm = heal(copy.deepcopy(start), task, parent, tmp_path / "calm", **options)

    class Killed(Exception):
        pass

    def dies(batch, left=[7]):  # noqa: B006
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return log_probabilities(parent, batch)

    with pytest.raises(Killed):
        heal(copy.deepcopy(start), task, dies, tmp_path / "killed", **options)
    again = heal(copy.deepcopy(start), task, parent, tmp_path / "killed", **options)
    for name, p in calm.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


@pytest.mark.parametrize("kind", sampled(["fp32", "plus"], 2))
def test_adapters_are_merged_and_change_no_rank(task, broken, tmp_path, kind):
    parent, start = broken
    options = {"steps": 40, "batch_size": 8, "lr": 1e-2, "lora": 4, "precision": kind}
    model = heal(copy.deepcopy(start), task, parent, tmp_path, **options)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in start.named_parameters()}
    kl = [json.loads(line)["kl"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(kl[-5:]) < 0.95 * sum(kl[:5])
    for name, p in model.named_parameters():
        before = start.get_parameter(name)
        before = before.bfloat16().float() if kind == "plus" else before
        assert (p != before).any() == (".u." in name or ".v." in name), name


def test_adapters_are_refused_on_a_sharded_model(task, monkeypatch):
    monkeypatch.setattr(processes, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="spread over processes cannot take in adapters: load it whole"):
        heal(tiny(), task, steps=1, lr=1e-3, lora=2)


def test_adapters_leave_the_bases_of_the_embedding_alone(task):
    parent = tiny(tied=True)
    start = prune(decompose(copy.deepcopy(parent), task, embedding=True), keep=0.5, keep_embedding=0.5, multiple_of=1)
    model = heal(copy.deepcopy(start), task, parent, steps=2, batch_size=8, lr=1e-2, lora=2)
    assert torch.equal(table_of(model).leader.u.weight, table_of(start).leader.u.weight)
    assert not torch.equal(groups(model)[0].leader.u.weight, groups(start)[0].leader.u.weight)


def test_a_batch_in_parts_trains_as_one_does(task, broken, monkeypatch, in_fp32, tmp_path):
    parent, small = broken
    models, losses = [], []
    for at_once in (2**11, 64):
        monkeypatch.setitem(AT_ONCE, "cpu", at_once)
        model, folder = copy.deepcopy(small), tmp_path / str(at_once)
        models.append(heal(model, task, parent, folder, steps=3, batch_size=8, lr=1e-3))
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] != losses[0]
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_healing_brings_the_loss_down(task, broken, tmp_path):
    parent, start = broken
    heal(start, task, parent, tmp_path, steps=80, batch_size=8, lr=3e-3)
    kl = [json.loads(line)["kl"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


def test_the_further_from_the_parent_the_faster_it_heals(task):
    parent = tiny(tied=True)

    def sharper(times):
        return lambda batch: (times * log_probabilities(parent, batch)).log_softmax(-1)

    rates = [suitable_rate(parent, task, sharper(times)) for times in (1, 8, 20, 1000)]
    assert rates == sorted(rates)
    assert rates[0] == 1e-5 < rates[1] < rates[2] < rates[3] <= 1e-3
    rounded = copy.deepcopy(parent)
    rounded.set_submodule("lm_head", RoundedLinear.rounded(rounded.lm_head, 8))
    assert suitable_rate(rounded, task, sharper(8)) == pytest.approx(3 * rates[1], rel=0.1)
    with pytest.raises(ValueError, match="pass a teacher or lr"):
        heal(parent, task, steps=1)


def test_a_teacher_in_int8_says_nearly_the_same(tmp_path, task, ids):
    pytest.importorskip("torchao")
    save(tiny(tied=True), make_tokenizer(), tmp_path / "model")
    parent, teacher = load(tmp_path / "model")[0], load_teacher(tmp_path, "int8", shard=False)
    batch = next(iter(Batches(task.train, 8, 1, 0)))
    near, far = log_probabilities(parent, batch), log_probabilities(teacher, batch)
    assert 0 < (near.exp() * (near - far)).sum(-1).mean() < 1e-3
    assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    model = prune(decompose(parent, task, examples=8), keep=0.4, multiple_of=2)
    heal(model, task, teacher, steps=2, batch_size=4, lr=1e-3)
    with pytest.raises(ValueError, match="with --shard choose bfloat16"):
        load_teacher(tmp_path, "int8", shard=True)


SLIDING = {"sliding_window": 4, "num_hidden_layers": 4}
LAYERS_THAT_DIFFER = {
    "gemma3_text": SLIDING | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": SLIDING | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "xglm": {"attention_heads": 4, "num_layers": 2, "ffn_dim": 96, "d_model": 64},  # arguments by position
}


@pytest.mark.parametrize("kind", LAYERS_THAT_DIFFER)
def test_every_block_is_refined_with_its_own_arguments(kind, task, monkeypatch, in_fp32):
    """Inputs and targets of each block are the hidden states that the two whole models have there."""
    parent = tiny(kind, **LAYERS_THAT_DIFFER[kind])
    model = prune(decompose(copy.deepcopy(parent), task, metric="plain"), keep=0.5, multiple_of=1)
    module, found = sys.modules[refine.__module__], []
    monkeypatch.setattr(module, "_fit", lambda m, block, x, more, y, *rest: found.append((x, more, y)))
    refine(model, task, parent, steps=6, batch_size=4)
    batches = list(Batches(task.train, 4, 6, 0))
    assert len(found) == len(module.blocks(model))
    for j, batch in enumerate(batches):
        read, written = [], []
        hooks = [
            b.register_forward_pre_hook(lambda m, args, read=read: read.append(args[0])) for b in module.blocks(model)
        ]
        hooks += [b.register_forward_hook(lambda m, a, y, to=written: to.append(y)) for b in module.blocks(parent)]
        with torch.no_grad():
            for m in (model, parent):
                m(input_ids=batch["input_ids"], use_cache=False)
        for hook in hooks:
            hook.remove()
        for (inputs, _, targets), x, y in zip(found, read, written, strict=True):
            torch.testing.assert_close(inputs[j], x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(targets[j], y, rtol=1e-5, atol=1e-5)


def test_what_blocks_share_is_held_once(task, monkeypatch):
    parent = tiny("gemma3_text", **LAYERS_THAT_DIFFER["gemma3_text"])
    model, tensors, lengths = copy.deepcopy(parent), [], {}
    monkeypatch.setattr(
        sys.modules[refine.__module__], "_fit", lambda m, block, x, more, *rest: tensors.extend(torch_leaves(more))
    )
    refine(model, task, parent, steps=6, batch_size=4)
    for batch in Batches(task.train, 4, 6, 0):
        lengths[batch["input_ids"].shape[1]] = 1
    # Of each length one mask, positions, and cosines and sines of both kinds of layers.
    assert len({id(t) for t in tensors}) <= 6 * len(lengths) < len(tensors) / 6


def torch_leaves(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def test_blocks_that_cannot_be_refined_alone_are_named(task):
    parent = tiny()
    between = copy.deepcopy(parent)
    between.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ValueError, match="LlamaDecoderLayer 1 of LlamaForCausalLM does not read what the block before"):
        refine(copy.deepcopy(parent), task, between, steps=1)
    twice = copy.deepcopy(parent)
    twice.model.layers[1] = twice.model.layers[0]
    with pytest.raises(ValueError, match="LlamaDecoderLayer 0 of LlamaForCausalLM is not called once"):
        refine(copy.deepcopy(parent), task, twice, steps=1)


def test_adapters_are_on_layers_of_a_subclass_too():
    class Own(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    model = tiny()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.__class__ = Own
    add_adapters(model, 2)
    assert type(model.get_submodule("model.layers.0.mlp.up_proj").get_base_layer()) is Own
    trained = {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14
