"""Models made ready to answer: what they compute is what they computed, whoever calls them, and they are not saved."""

import copy
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, logits, make_tokenizer, sampled, tiny
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask

import basis_select as bs
from basis_select.checkpoint.fast import ATTENTION, _prepared, ready
from basis_select.checkpoint.files import save
from basis_select.layers import kernels
from basis_select.layers.embedding import round_table
from basis_select.layers.rounded import RoundedLinear, quantized
from basis_select.layers.split import split
from basis_select.layers.stacking import FixedLinear, FixedProduct, Part
from basis_select.run.recipe import Recipe
from basis_select.run.work import Work
from basis_select.system.machine import fast_bf16

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def small(kind, task, share=True, bits=16, **options):
    model = bs.decompose(tiny(kind, **options), task, examples=8, share=share)
    return bs.prune(
        model, **({"keep": 0.5, "budget": "uniform"} if bits == 16 else {"size": "2x", "bits": bits}), multiple_of=4
    )


def whole_products(model):
    return [m.whole for m in model.modules() if isinstance(m, Part) and m.whole is not None]


@pytest.mark.parametrize("kind", sampled(KINDS, 2))
@pytest.mark.parametrize("share", [True, False])
def test_stacked_layers_compute_what_they_did(kind, share, task, ids):
    model = small(kind, task, share)
    fast = ready(copy.deepcopy(model), compiled=False)
    torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    together = 0 if kind in ("phi3", "gpt_neox") else 4  # these have one layer for q/k/v, and for gate/up
    assert len(whole_products(fast)) == together
    assert torch.equal(fast.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_rounded_layers_compute_what_they_did(kind, task, ids):
    model = small(kind, task, bits="auto", hidden_size=128, intermediate_size=192)
    assert set(quantized(model).values()) == {8, 4}
    fast = ready(copy.deepcopy(model), compiled=False)
    assert all(isinstance(fast.get_submodule(name), FixedLinear) for name in quantized(fast))
    for some in (ids, ids[:1, :3]):
        assert (logits(fast, some) - logits(model, some)).norm() < 5e-4 * logits(model, some).norm()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # of many tokens the weights are restored
        torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_all_that_the_kernel_reads_lies_in_one_tensor(task):
    fast = ready(small("llama", task, bits="auto", hidden_size=128, intermediate_size=192), compiled=False)
    layers = [m for m in fast.modules() if isinstance(m, FixedLinear | FixedProduct)]
    whole = layers[0].packed
    kernels.in_one(layers)
    assert all(m.packed is whole for m in layers)
    wide = [m for m in layers if isinstance(m, FixedLinear) and m.bits == 8]
    assert wide
    assert all(x.untyped_storage().data_ptr() == whole.data_ptr() for m in wide for x in (m.q, m.scale))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 31), (5, 33), (40, 64), (257, 95)])
def test_the_kernels_multiply_by_what_is_stored(bits, outputs, inputs):
    """Whatever fills no group, in the last row too; few tokens and many, of any scale, zeros among them."""
    kernels.load()
    torch.manual_seed(inputs)
    layer = RoundedLinear.rounded(torch.nn.Linear(inputs, outputs), bits)
    fixed = FixedLinear.of(layer)
    assert fixed(torch.empty(2, 0, inputs)).shape == (2, 0, outputs)
    for tokens in (1, 2, 3, 7, 32, 33):
        x = torch.randn(2, tokens, inputs) * torch.logspace(-6, 6, tokens)[:, None]
        x[0, 0] = 0
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        far = (fixed(x).double() - expected).abs()
        assert (far <= 1e-4 * (x.double().norm(dim=-1, keepdim=True) * layer.weight.norm(dim=1) + 1e-3)).all()
        alone = fixed(x[1, -1:]) - fixed(x)[1, -1:]
        assert (alone.abs() <= 1e-5 * (x[1, -1].norm() * layer.weight.norm(dim=1) + 1e-3)).all()
        narrow, wide = fixed(x.bfloat16()), fixed(x.bfloat16().float())
        assert narrow.dtype == torch.bfloat16
        if 2 * tokens <= 16:  # these are multiplied by what is stored, whatever the dtype
            torch.testing.assert_close(narrow, wide.bfloat16())
        size = x.norm(dim=-1, keepdim=True) * layer.weight.norm(dim=1) + layer.bias.abs()
        assert ((narrow.float() - wide).abs() <= 2**-7 * size).all()  # bfloat16 has eight bits
        for bad in (torch.nan, torch.inf, -torch.inf):
            x[1, -1, -1] = bad
            assert not fixed(x)[1, -1].isfinite().any()
            assert fixed(x)[0].isfinite().all()


@pytest.mark.parametrize("tokens", [3, 40, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_multiply_by_factors_in_two_parts(tokens, dtype):
    kernels.load()
    torch.manual_seed(0)
    factors = torch.nn.Linear(95, 40, bias=False), torch.nn.Linear(40, 33)
    v, u = (split(f, 7, (8, 4), RoundedLinear.rounded, dim) for dim, f in enumerate(factors))
    x = torch.randn(tokens, 95).to(dtype)
    wide = u(v(x.float()))
    found = FixedProduct(v, u)(x)
    assert found.dtype == dtype
    assert (found.float() - wide).norm() < (1e-4 if dtype == torch.float32 else 1e-2) * wide.norm()


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_products_are_the_same_on_any_number_of_threads(tokens):
    kernels.load()
    torch.manual_seed(0)
    factors = torch.nn.Linear(700, 300, bias=False), torch.nn.Linear(300, 500)
    v, u = (split(f, 45, (8, 4), RoundedLinear.rounded, dim) for dim, f in enumerate(factors))
    products = FixedProduct(v, u), FixedLinear.of(RoundedLinear.rounded(factors[0], 4))
    x, before = torch.randn(tokens, 700), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = [product(x) for product in products]
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert all(torch.equal(product(x), y) for product, y in zip(products, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 12, 24, 64])
@pytest.mark.parametrize("tokens", [1, 2, 13, 40])
def test_the_kernel_for_attention_is_attention(tokens, size, dtype):
    """For any number of heads that share keys, of keys that count, and of keys that lie in a larger cache."""
    kernels.load()
    torch.manual_seed(size)
    attention = torch.ops.basis_select.attention
    for shared, before in ((1, 0), (2, 7), (3, 40), (4, 9), (7, 33)):
        keys = tokens + before
        query = 3 * torch.randn(2, tokens, 3 * shared, size).to(dtype).transpose(1, 2)
        key, value = torch.randn(2, 2, 3, keys + 5, size).to(dtype)[..., :keys, :]
        used = torch.rand(2, 1, tokens, keys) < 0.6
        used[..., -1] = True
        for counted in (None, used, used[:1]):
            wide = (x.double() for x in (query, key, value))
            every = torch.ones(tokens, keys).tril(before).bool() if counted is None else counted.expand_as(used)
            expected = torch.nn.functional.scaled_dot_product_attention(*wide, every, scale=0.3, enable_gqa=True)
            found = attention(query, key, value, counted, 0.3)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected.transpose(1, 2).to(dtype))
        query[1, :, -1] = torch.nan
        found = attention(query, key, value, used, 0.3)
        assert found[1, -1].isnan().all()
        assert found[0].isfinite().all()
        assert found[1, :-1].isfinite().all()
    used[0, :, -1], used[1] = True, False
    found = attention(query.nan_to_num(), key, value, used, 0.3)
    assert (found[1] == 0).all()
    assert (found[0] != 0).any()
    with pytest.raises(RuntimeError, match="attention of query"):
        attention(query[:, :-1], key, value, None, 0.3)
    with pytest.raises(RuntimeError, match="attention of query"):
        attention(query, key[:, :, : tokens - 1], value[:, :, : tokens - 1], None, 0.3)


def test_attention_that_the_kernel_does_not_know_is_transformers():
    """A bias for each pair of tokens, a mask that is added or one for each head, values of another size, no mask."""
    kernels.load()
    attention, module = AttentionInterface()[ATTENTION], SimpleNamespace(is_causal=True, num_key_value_groups=2)
    for tokens, keys in ((1, 9), (5, 5), (3, 9)):
        query, key, value = (torch.randn(2, n, of, 8) for n, of in ((4, tokens), (2, keys), (2, keys)))
        used = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)[None, None]
        each = used.repeat(2, 4, 1, 1)
        each[:, 1, :, 0] = False
        added = torch.zeros(1, 1, tokens, keys).masked_fill(~used, -torch.inf)
        for mask, value_of, options in (
            (used, value, {}),
            (None, value, {}),
            (None, value, {"is_causal": False}),
            (used, value, {"position_bias": torch.randn(1, 4, tokens, keys)}),
            (each, value, {}),
            (added, value, {}),
            (used, value[..., :6], {"scaling": 0.2}),
        ):
            given = module, query, key, value_of, mask
            torch.testing.assert_close(attention(*given, **options)[0], sdpa_attention_forward(*given, **options)[0])


COMPILED = """
import sys, torch
from pathlib import Path
from basis_select.layers import kernels
from basis_select.layers.rounded import RoundedLinear
from basis_select.layers.stacking import FixedLinear

if sys.argv[2] == "DEFAULT":
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
torch.backends.cpu.get_cpu_capability = lambda: sys.argv[2]
kernels.load(Path(sys.argv[1]))
for bits in (8, 4):
    layer = RoundedLinear.rounded(torch.nn.Linear(95, 33), bits)
    weight, fixed = layer.weight, FixedLinear.of(layer)
    for tokens in (3, 39, 300):
        x = torch.randn(tokens, 95)
        whole = torch.nn.functional.linear(x, weight, fixed.bias)
        torch.testing.assert_close(fixed(x), whole, rtol=1e-3, atol=1e-4)
        assert (fixed(x.bfloat16()) - whole).norm() < 1e-2 * whole.norm()
        x[1, 2] = torch.nan
        assert fixed(x)[1].isnan().all() and fixed(x)[[0, 2]].isfinite().all()
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(2, heads, n, 20).to(dtype) for heads, n in ((6, 1), (2, 11), (2, 11)))
    whole = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    found = torch.ops.basis_select.attention(q, k, v, None, 20**-0.5)
    torch.testing.assert_close(found, whole.transpose(1, 2).to(dtype))
q, k, v = (torch.randn(2, heads, 23, 20) for heads in (6, 2, 2))
wide = (x.double() for x in (q, k, v))
whole = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
torch.testing.assert_close(torch.ops.basis_select.attention(q, k, v, None, 20**-0.5), whole.transpose(1, 2).float())
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_the_kernels_compute_the_same_whatever_the_processor_has(capability, tmp_path):
    """Without wide units, with vectors of 256 bits, and with wider ones; what this processor has is there already."""
    here = torch.backends.cpu.get_cpu_capability()
    if capability != "DEFAULT" and here not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no vectors of 256 bits")
    folder = kernels.cache() / "kernels" if capability == here else tmp_path
    environment = {**os.environ, "PYTHONPATH": str(Path(bs.__file__).parents[1])}
    environment |= {"ATEN_CPU_CAPABILITY": "default"} if capability == "DEFAULT" else {}
    subprocess.run([sys.executable, "-c", COMPILED, str(folder), capability], check=True, env=environment)


def test_without_a_compiler_one_sentence_says_so(tmp_path, monkeypatch, unloaded):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"need a C\+\+ compiler, and there is no no-such-compiler: install g"):
        kernels.load(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match=r"false could not compile kernels.cpp, the kernels of"):
        kernels.load(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_without_a_folder_for_the_kernels_one_sentence_says_so_and_work_goes_on(
    tmp_path, monkeypatch, unloaded, caplog
):
    monkeypatch.setenv("BASIS_SELECT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert not kernels.try_load("it is slower without")
    assert caplog.text.count("Not a directory") == 1
    assert caplog.text.count("it is slower without") == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_embedding_of_few_bits_still_has_rows(tied, ids):
    model = tiny(tied=tied)
    round_table(model, 4)
    fast = ready(copy.deepcopy(model), compiled=False)
    torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_without_a_compiler_a_run_times_models_as_they_load(task, ids, tmp_path, monkeypatch, caplog, request):
    save(small("llama", task, bits="auto"), make_tokenizer(), tmp_path / "row" / "model", "bfloat16")
    recipe = Recipe(model="m", task="t")
    timed = Work(recipe, None, {}, {"row": tmp_path / "row"}).finals()["row"]
    assert any(isinstance(m, FixedLinear | FixedProduct | Part) for m in timed.modules())
    request.getfixturevalue("unloaded")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("BASIS_SELECT_CACHE", str(tmp_path / "cache"))
    timed = Work(recipe, None, {}, {"row": tmp_path / "row"}).finals()["row"]
    assert not any(isinstance(m, FixedLinear | FixedProduct | Part) for m in timed.modules())
    assert "there is no no-such-compiler: install g++ or name one in CXX; it is timed without" in caplog.text


def test_what_is_stored_in_bfloat16_is_computed_in_what_the_processor_has(task, ids, tmp_path):
    save(small("llama", task, bits="auto"), make_tokenizer(), tmp_path / "model", "bfloat16")
    fast = ready(bs.load(tmp_path / "model")[0], compiled=False)
    assert fast.dtype == (torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32)
    wide, found = (logits(m, ids).float() for m in (bs.load(tmp_path / "model", "float32")[0], fast))
    assert (found - wide).norm() < 0.02 * wide.norm()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("known", [None, 10, 16])
def test_masks_are_those_of_transformers(tokens, known):
    """Of the last tokens of what is known, or of what lies in the middle of it, with and without padding before it."""
    given = None if known is None else torch.ones(3, known, dtype=torch.bool)
    if known:
        given[1, :4], given[2, 5] = False, False
    inputs = {"batch_size": 3, "q_length": tokens, "kv_length": 16, "q_offset": torch.tensor(10 - tokens)}
    inputs |= {"kv_offset": 0, "mask_function": causal_mask_function, "attention_mask": given}
    wanted = sdpa_mask(**inputs, allow_is_causal_skip=False)
    assert torch.equal(ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION](**inputs, dtype=torch.float32), wanted)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mistral", {"sliding_window": 8}), ("gpt2", {})])
def test_tokens_are_prepared_as_transformers_prepares_them(kind, options, padding, ids):
    """All of them, though it is asked only for the first two, or for all where layers forget."""
    model = ready(tiny(kind, **options), compiled=False)
    stock, asked = model.prepare_inputs_for_generation, []

    @functools.wraps(stock)
    def noted(*args, **given):
        asked.append(given)
        return stock(*args, **given)

    ours = _prepared(noted)

    @functools.wraps(stock)
    def compared(*args, **given):
        expected, found = stock(*args, **given), ours(*args, **given)
        assert list(found) == list(expected)
        assert found.pop("cache") is expected.pop("cache")
        torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=True)  # graphs ask for it
        return found | {"cache": given["cache"]}

    model.prepare_inputs_for_generation = compared
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    for cache in (None, "static"):
        asked.clear()
        model.generate(ids, attention_mask=mask, cache_implementation=cache, disable_compile=True, **GREEDY)
        assert len(asked) == (2 if cache and not options else 6)


def test_threads_get_the_same_answers(task, ids):
    fast = ready(small("llama", task), compiled=False)
    rows = [ids[i % 2 :, i:] for i in range(8)]
    expected, found = [logits(fast, row) for row in rows], [None] * 8

    def answer(i):
        for _ in range(5):
            found[i] = logits(fast, rows[i])

    at_once(answer)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def at_once(answer):
    threads = [threading.Thread(target=answer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_is_fast_is_neither_saved_nor_adapted(task, tmp_path):
    from peft import LoraConfig, get_peft_model

    for model in (small("llama", task), small("llama", task, bits="auto")):
        fast = ready(model, compiled=False)
        with pytest.raises(ValueError, match="a model loaded with fast=True only answers"):
            save(fast, make_tokenizer(), tmp_path / "model")
        with pytest.raises(ValueError, match="a model loaded with fast=True only answers"):
            fast.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model" / "model.safetensors").exists()
        with pytest.raises(ValueError, match=r"q_proj"):
            get_peft_model(fast, LoraConfig(target_modules=r".*q_proj\.(u|v)"))


@torch.no_grad()
def short_of_likeliest(model, prompt, out):
    """By how much less `model` likes tokens that follow a prompt than those it likes best, at most.

    In bfloat16 two that are nearly as likely change places.
    """
    new = out[:, prompt.shape[1] :]
    assert new.shape[1] == GREEDY["max_new_tokens"]
    logits = model(input_ids=out).logits[:, prompt.shape[1] - 1 : -1].float()
    return float((logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]).max())


@pytest.mark.slow
def test_one_call_loads_a_model_that_generates_by_compiled_graphs(task, ids, tmp_path, caplog):
    model = small("llama", task, bits="auto")
    save(model, make_tokenizer(), tmp_path / "model", "bfloat16")
    model = bs.load(tmp_path / "model", "float32")[0]
    fast = bs.load(tmp_path / "model", fast=True)[0]
    assert fast.dtype == (torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32)
    assert "compiled in" in caplog.text
    torch._dynamo.config.error_on_recompile = True  # one graph for caches of every length
    try:
        for length in (3, 9, 14):
            prompt = ids[:1, :length]
            assert short_of_likeliest(model, prompt, fast.generate(prompt, **GREEDY)) < 0.01
    finally:
        torch._dynamo.config.error_on_recompile = False
    with torch.profiler.profile() as seen:
        fast.generate(ids[:1, :3], max_new_tokens=2, do_sample=False)
    assert sum("Torch-Compiled Region" in event.name for event in seen.events()) == 2  # a prompt and a token
    assert short_of_likeliest(model, ids, fast.generate(ids, **GREEDY)) < 0.01  # a batch of two

    prompts, found = [ids[i % 2 :][:1, i:] for i in range(8)], [None] * 8
    expected = [fast.generate(prompt, **GREEDY) for prompt in prompts]

    def answer(i):
        found[i] = fast.generate(prompts[i], **GREEDY)

    at_once(answer)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_fast_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prepares a model on one device"):
        bs.load(tmp_path, fast=True, sharded=True)
