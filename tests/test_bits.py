"""A size in bytes: what is on disk never exceeds it, loads as what was in memory, heals, and costs what was said."""

import copy
import itertools
import json
import re

import pytest
import torch
from conftest import addition_recipe, logits, make_task, make_tokenizer, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import basis_select as bs
from basis_select.bits import Form, forms, largest_share
from basis_select.checkpoint.format import BasisSelectConfig
from basis_select.checkpoint.targets import targets
from basis_select.export import to_int8
from basis_select.layers.embedding import round_table
from basis_select.layers.group import groups
from basis_select.layers.rounded import RoundedLinear, multiplied_out, quantized
from basis_select.layers.rounding import (
    apart,
)
from basis_select.linalg.budget import best_for, rising
from basis_select.run.pipeline import run
from basis_select.run.plan import plan, text
from basis_select.run.recipe import read
from basis_select.target import target
from basis_select.training.loss import response_nll

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
KINDS = [("llama", True, False), ("llama", False, False), ("llama", True, True), ("gemma3_text", True, False)]
KINDS += [("gemma3_text", True, True), ("gpt_neox", False, False), ("qwen2", True, False), ("phi3", False, False)]


def decomposed(kind="llama", tied=True, embedding=False, **options):
    return bs.decompose(tiny(kind, tied, **options), make_task(), examples=16, embedding=embedding)


@pytest.fixture(scope="module")
def bases():
    return decomposed()


def weight_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("kind", "tied", "embedding"), KINDS)
def test_a_size_is_met_on_disk_and_what_is_loaded_computes_the_same(kind, tied, embedding, ids, task, tmp_path):
    model = decomposed(kind, tied, embedding)
    whole, sizes = 2 * bs.sizes(model)["parameters_dense"], [1.9, 2.6, 4]
    for size in sizes:
        cut = bs.prune(copy.deepcopy(model), task, size=f"{size}x", bits="auto", multiple_of=4)
        folder = bs.save(cut, make_tokenizer(), tmp_path / f"{size}", dtype="bfloat16")
        used = weight_bytes(folder) / (whole / size)
        assert used <= 1
        assert used > 0.85 or size == sizes[0]  # whole at 8 bits, it needs no more
        again, _ = bs.load(folder, dtype="float32")
        assert torch.allclose(logits(again, ids), logits(cut, ids), atol=2e-3)
        assert quantized(again) == quantized(cut)
        assert bs.sizes(again)["parameters"] == bs.sizes(cut)["parameters"]
    stored = load_file(next(folder.glob("*.safetensors")))
    assert {str(t.dtype) for name, t in stored.items() if name.endswith(".q")} == {"torch.int8", "torch.uint8"}


@pytest.mark.parametrize(("more", "bits"), [(8, 4), (8, 3), (4, 3), (3, 2)])
def test_heads_of_more_bits_than_tails_are_what_their_factors_multiply_to(more, bits, bases, ids, tmp_path):
    model = copy.deepcopy(bases)
    for group in groups(model):
        Form(group.rank, bits, 32, more).put(group, model)
    assert {*quantized(model).values()} == {more, bits}
    folder = bs.save(model, make_tokenizer(), tmp_path / "split")
    again, _ = bs.load(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert set(config["heads"].values()) == {32}
    dense = bs.checkpoint.format.BasisSelectQuantizer(BasisSelectConfig())._dequantize(again)
    assert not quantized(dense)
    assert torch.allclose(logits(dense, ids), logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "plus"])
def test_healing_trains_what_is_rounded_and_ends_in_what_is_saved(bases, task, ids, tmp_path, precision):
    model = bs.prune(copy.deepcopy(bases), task, size="4x", bits="auto", multiple_of=4)
    before = {name: m.q.clone() for name, m in model.named_modules() if isinstance(m, RoundedLinear)}
    names, start = quantized(model), copy.deepcopy(model)
    bs.heal(model, task, steps=20, batch_size=8, lr=3e-3, kl=0, precision=precision)
    assert quantized(model) == names
    changed = {n for n, q in before.items() if not torch.equal(q, model.get_submodule(n).q)}
    assert changed == set(names) - {"lm_head"}  # the table stays as it is
    assert response_nll(model, task.train, 0) < response_nll(start, task.train, 0) - 0.2
    again, _ = bs.load(bs.save(model, make_tokenizer(), tmp_path / "healed"))
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("size", ["1.2x", "2x"])
def test_a_layer_of_zeros_stays_one(size, task, ids):
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    bs.prune(bs.decompose(model, task, examples=16), task, size=size, bits="auto", multiple_of=4)
    assert logits(model, ids).isfinite().all()
    made = model.model.layers[0].self_attn.o_proj
    assert not (made.dense_weight() if hasattr(made, "dense_weight") else made.weight).any()


def test_a_copy_that_is_spread_over_one_process_trains_as_the_model_itself_does(bases, task):
    start = bs.prune(copy.deepcopy(bases), task, size="4x", bits="auto", multiple_of=4)
    own, spread = copy.deepcopy(start), copy.deepcopy(start)
    for model, sharded in ((own, False), (spread, True)):
        bs.heal(model, task, sharded=sharded, steps=3, batch_size=8, lr=3e-3, kl=0)
    assert quantized(spread) == quantized(start)
    state = own.state_dict()
    assert any(not torch.equal(x, state[name]) for name, x in start.state_dict().items())
    assert all(torch.equal(x, state[name]) for name, x in spread.state_dict().items())
    assert spread.tuned_on.trained([task.train[0].prompt]) == [True]


def test_what_is_multiplied_out_has_the_very_weights_and_comes_back(bases, ids):
    model = copy.deepcopy(bases)
    for group in groups(model):
        group.round(model, 32, 16, (8, 4))
    round_table(model, 8)
    model.bfloat16()
    modules, whole = dict(model.named_modules()), logits(model, ids)
    few = [name for name, m in modules.items() if isinstance(m, RoundedLinear) and m.bits == 4]
    with multiplied_out(model):
        for name in few:
            assert torch.equal(model.get_submodule(name).weight.float(), copy.deepcopy(modules[name]).float().weight)
        apart = logits(model, ids)
    assert few
    assert (apart - whole).norm() < 0.02 * whole.norm()
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, ids), whole)


def test_prices_are_the_bytes_of_tensors_and_values_grow_with_bits(bases):
    for group in groups(bases):
        found = {form: (price, value) for form, price, value in forms(group, 16)}
        assert found[Form(None, 8)][1] > found[Form(None, 4)][1] > found[Form(None, 3)][1]
        assert found[Form(48, 8)][1] > found[Form(48, 4)][1] > found[Form(48, 3)][1]
        for form in (Form(None, 4), Form(None, 3), Form(48, head=32), Form(32, 8), Form(48, 3, 32, 4)):
            model = copy.deepcopy(bases)
            here = next(g for g in groups(model) if g.names == group.names)
            form.put(here, model)
            tensors = {n: t for n, t in model.state_dict().items() if n.startswith(tuple(f"{m}." for m in group.names))}
            held = sum(t.numel() * (1 if n.endswith(".q") else 2) for n, t in tensors.items())
            assert held < found[form][0] <= held + sum(len(n) + 95 for n in tensors)


def test_the_less_rounding_counts_the_more_numbers_of_fewer_bits_are_chosen(bases, task):
    found = [
        bs.sizes(bs.prune(copy.deepcopy(bases), task, size="5x", bits="auto", multiple_of=4, rounding=share))
        for share in (1, 0.01)
    ]
    counted, mended = ({int(b): n for b, n in sizes["bits"].items()} for sizes in found)
    assert sum(mended.values()) > sum(counted.values())
    assert mended[2] > counted.get(2, 0)
    assert mended[2] > 0.8 * sum(mended.values())


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_the_best_choices_never_cost_more_and_leave_out_nothing_that_fits(points):
    climbs = [rising([((i, j), price, value) for j, (price, value) in enumerate(p)]) for i, p in enumerate(points)]
    for climb in climbs:
        assert all(a[1] < b[1] and a[2] < b[2] for a, b in itertools.pairwise(climb))
    prices = {choice: price for climb in climbs for choice, price, _ in climb}
    least, most = sum(c[0][1] for c in climbs), sum(c[-1][1] for c in climbs)
    for budget in (least, (least + most) // 2, most):
        chosen = best_for(climbs, budget, "bytes")
        assert sum(prices[choice] for choice in chosen) <= budget
    assert chosen == [climb[-1][0] for climb in climbs]
    with pytest.raises(ValueError, match=f"smallest possible is {least:,} bytes"):
        best_for(climbs, least - 1, "bytes")


def test_the_smallest_size_that_is_said_is_there(bases, task):
    with pytest.raises(ValueError, match="is too small") as error:
        bs.prune(copy.deepcopy(bases), task, size="2KB", bits="auto")
    least = int(re.search(r"has ([\d,]+) bytes at least", str(error.value))[1].replace(",", ""))
    small = bs.prune(copy.deepcopy(bases), task, size=f"{(least + 50) / 1000}KB", bits="auto")
    assert set(quantized(small).values()) == {8, 2}  # the table's, and the fewest
    with pytest.raises(ValueError, match="is too small"):
        bs.prune(copy.deepcopy(bases), task, size=f"{(least - 50) / 1000}KB", bits="auto")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0.5}, "give a size such as 45MB or 6x"),
        ({"size": "20K"}, "give a size such as 45MB or 6x"),
        ({"size": "2x", "budget": "uniform"}, "score=energy and budget=global"),
        ({"size": "2x", "reserve": 4}, "without new bases"),
        ({"size": "2x", "dtype": "float32"}, "bfloat16 or float16"),
        ({"size": "1KB"}, r"is too small: this model has [\d,]+ bytes at least, with 2 bits and the fewest bases"),
        ({"size": "1GB"}, "more than the model has"),
        ({"size": "2x", "bits": 3}, "bits is 3"),
        ({"size": "2x", "bits": 16, "rounding": 0.1}, "choose bits=auto"),
        ({"size": "2x", "rounding": 0}, "rounding is 0, it should be a fraction"),
    ],
)
def test_what_cannot_be_shared_in_bytes_is_said_in_a_sentence(bases, task, options, says):
    with pytest.raises(ValueError, match=says):
        bs.prune(copy.deepcopy(bases), task, **{"bits": "auto", "multiple_of": 4, **options})


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_largest_share_is_known_without_values(kind):
    model, asked = tiny(kind, tied=True), target(size="8x")
    with torch.device("meta"):
        empty = type(model)._from_config(model.config)
    found = [largest_share(m, targets(m), asked, "bfloat16") for m in (model, empty)]
    assert found[0] == found[1]
    assert 0.2 < found[0] < 1


def test_a_checkpoint_of_version_1_loads(ids, tmp_path):
    model = to_int8(bs.prune(decomposed(), keep=0.5, multiple_of=4))
    folder = bs.save(model, make_tokenizer(), tmp_path / "now")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    said = config["quantization_config"]
    bits = said.pop("bits")
    said |= {"format_version": 1, "int8": list(bits)}
    del said["heads"], said["table"]
    path.write_text(json.dumps(config))
    (folder / "basis_select.json").unlink()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_checkpoint_of_version_2_loads_with_the_weights_that_it_had(bases, ids, tmp_path, caplog):
    """There weights of 4 and 3 bits had scales of 16 bits in a tensor of their own."""
    model = copy.deepcopy(bases)
    for group, form in zip(
        groups(model), itertools.cycle([Form(48, 3, 32, 4), Form(None, 4), Form(48, 8)]), strict=False
    ):
        form.put(group, model)
    folder = bs.save(model, make_tokenizer(), tmp_path / "now")
    tensors = load_file(folder / "model.safetensors")
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, RoundedLinear) and m.bits < 8]:
        tensors[f"{name}.q"], scale = apart(layer.q, layer.in_features, layer.bits)
        tensors[f"{name}.q"] = tensors[f"{name}.q"].contiguous()
        tensors[f"{name}.scale"] = 1.01 * scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 2'))
    (folder / "basis_select.json").unlink()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert "of format version 2: its weights of 4 and 3 bits are held in 16 bits" in caplog.text
    assert {*quantized(again).values()} == {8}
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, RoundedLinear)]:
        expected = layer.weight if layer.bits == 8 else 1.01 * layer.weight
        assert torch.allclose(again.get_submodule(name).weight, expected)
    kept, _ = bs.load(bs.save(again, make_tokenizer(), tmp_path / "again"))
    assert torch.equal(logits(kept, ids), logits(again, ids))


def test_weighted_bases_of_version_1_count_every_error_alike(ids, tmp_path):
    config = BasisSelectConfig(ranks={"model.layers.0.mlp.down_proj": 64}, weighted=1, format_version=1)
    model = tiny()
    bs.checkpoint.build.build(model, config)
    layer = model.model.layers[0].mlp.down_proj
    assert not [name for name in layer.state_dict() if "cost" in name]
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    assert all(torch.isfinite(torch.tensor(value)) for _, _, value in forms(groups(model)[0]))


@pytest.mark.slow
def test_a_recipe_says_its_size_in_bytes(tmp_path):
    options = {
        "tune": {"steps": 2, "batch_size": 4},
        "decompose": {"examples": 8},
        "learn": {"steps": 0},
        "prune": {"size": "4x", "bits": "auto", "multiple_of": 4},
        "heal": {"steps": 2, "batch_size": 4},
        "data": {"train": 32, "validation": 8, "test": 8},
    }
    recipe = read(addition_recipe(tmp_path, tiny(tied=True, dtype="bfloat16"), 9, **options))
    assert "MB at most" in text(plan(recipe))
    results = run(recipe, tmp_path / "run")
    found = results["result"]["sizes"]
    assert found["bytes"] == weight_bytes(tmp_path / "run" / "final")
    assert found["bytes"] * 4 <= 2 * found["parameters_dense"]
    assert found["bits"].keys() == {"8", "4", "3", "2"}
