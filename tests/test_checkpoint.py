import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KINDS, logits, make_task, make_tokenizer, sampled, tiny
from damages import flip
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.generation.configuration_utils import DYNAMIC_CACHE_IMPLEMENTATIONS, STATIC_CACHE_IMPLEMENTATIONS
from transformers.utils import is_optimum_quanto_available

import basis_select as bs
from basis_select.checkpoint.format import HINT
from basis_select.layers.group import groups


def compressed(task, kind="llama", **options):
    model = tiny(kind, **options)
    bs.decompose(model, task, examples=16)
    return bs.prune(model, keep=0.5, multiple_of=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sampled(KINDS, 6))
def test_reloaded_logits_are_bit_equal(kind, tied, dtype, task, ids, tmp_path):
    model = compressed(task, kind, tied=tied, dtype=dtype)
    bs.save(model, None, tmp_path / "a")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(stock, ids), logits(model, ids))
    stock.save_pretrained(tmp_path / "b")  # and again from a loaded model
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), ids), logits(model, ids))
    out = stock.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_weighted_checkpoints_reload_bit_equal_and_can_be_pruned_later(task, ids, tokenizer, tmp_path):
    model = bs.decompose(tiny("qwen2"), task, examples=16)
    for group in groups(model):
        group.leader.s.learned.data.uniform_(0.5, 1.5)
    bs.save(model, tokenizer, tmp_path / "a")
    names, first = load_file(tmp_path / "a" / "model.safetensors").keys(), groups(model)[0].name
    assert {f"{first}.{part}" for part in ("scale", "weight", "survived")} < names  # as the format has always had them
    assert not any(".s." in name for name in names)
    again, _ = bs.load(tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    for m in (model, again):
        bs.prune(m, keep=0.4, multiple_of=1)
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("source", ["in memory", "loaded", "dense"])
def test_save_casts_without_touching_the_model(source, task, tokenizer, ids, tmp_path):
    model = tiny(tied=True) if source == "dense" else compressed(task, tied=True)
    if source == "loaded":
        model, _ = bs.load(bs.save(model, tokenizer, tmp_path / "b"))
    before = logits(model, ids)
    bs.save(model, tokenizer, tmp_path / "a", "bfloat16")
    assert torch.equal(logits(model, ids), before)
    assert model.config.dtype != torch.bfloat16
    again, _ = bs.load(tmp_path / "a")
    assert again.dtype == torch.bfloat16
    assert bs.sizes(again, tmp_path / "a")["bytes"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert abs(bs.sizes(again, tmp_path / "a")["bytes"] - 2 * bs.sizes(again)["parameters"]) < 8_000


def test_one_v_is_stored_per_group_and_shards_load(task, tokenizer, ids, tmp_path):
    model = compressed(task)
    bs.save(model, tokenizer, tmp_path / "a", "float32", max_shard_size="40KB")
    shards = list((tmp_path / "a").glob("*.safetensors"))
    names = [name for shard in shards for name in load_file(shard)]
    assert len(shards) > 2
    assert "model.layers.0.self_attn.q_proj.v.weight" in names
    assert "model.layers.0.self_attn.k_proj.v.weight" not in names
    assert torch.equal(logits(bs.load(tmp_path / "a")[0], ids), logits(model, ids))


def test_save_writes_all_or_nothing(task, tokenizer, tmp_path, monkeypatch):
    model = compressed(task)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        bs.save(model, tokenizer, tmp_path / "full")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        bs.save(model, tokenizer, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow
def test_verify_compares_with_a_fresh_process(task, tokenizer, tmp_path):
    model = compressed(task)
    folder = bs.save(model, tokenizer, tmp_path / "a")
    assert bs.verify(folder, model) == {"bit_equal": True, "max_difference": 0.0, "hashes_match": True}
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert not bs.verify(folder, model)["bit_equal"]
    flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match="sha256 differs"):
        bs.verify(folder, model)


@pytest.mark.slow
def test_the_import_is_what_makes_transformers_read_it(task, tokenizer, ids, tmp_path):
    model = compressed(task)
    folder = bs.save(model, tokenizer, tmp_path / "a")
    code = (
        "import sys, torch, basis_select; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r});"
        "print(m(torch.tensor(eval(sys.argv[1]))).logits.double().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(ids.tolist())], capture_output=True, text=True)
    assert float(out.stdout) == pytest.approx(logits(model, ids).double().sum().item(), abs=1e-9)


STOCK = """
import sys
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print(error)
assert "basis_select" not in sys.modules
"""


@pytest.mark.slow
def test_without_the_import_transformers_refuses(task, ids, tmp_path):
    """However a checkpoint was written, and whatever part of the model is bases; a dense export loads."""
    half = {"keep": 0.5, "multiple_of": 1}
    whole_layers, embedding = {"keep": 1, "keep_embedding": 0.5}, {**half, "keep_embedding": 0.5}
    models = {  # kind, options, pruned to what
        "layers": ("llama", {}, half),
        "bfloat16": ("qwen2", {"dtype": "bfloat16", "tied": True}, half),
        "experts": ("qwen3_moe", {}, half),
        "and embedding": ("llama", {"tied": True}, embedding),
        "embedding": ("llama", {}, whole_layers),
    }
    folders = []
    for name, (kind, options, budget) in models.items():
        model = bs.decompose(tiny(kind, **options), task, examples=16, embedding="embedding" in name)
        bs.prune(model, **budget)
        bs.save(model, None, tmp_path / name / "saved")
        bs.save(model, None, tmp_path / name / "shards", "float32", max_shard_size="40KB")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name / "saved", output_loading_info=True)
        assert not any(info.values())
        model.save_pretrained(tmp_path / name / "by transformers")
        loaded.save_pretrained(tmp_path / name / "again", max_shard_size="40KB")
        folders += [tmp_path / name / how for how in ("saved", "shards", "by transformers", "again")]
        for folder in folders[-4:]:
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
            assert torch.equal(logits(again, ids), logits(model, ids))
    rows = [{"input_ids": PROMPT[0], "labels": PROMPT[0]}]
    for trained in (loaded, model):
        out = tmp_path / f"trained {len(folders)}"
        arguments = TrainingArguments(out, max_steps=1, save_steps=1, report_to="none")
        Trainer(trained, arguments, train_dataset=rows).train()
        folders.append(out / "checkpoint-1")
    bs.decompose_checkpoint(dense_folder(tmp_path / "dense"), tmp_path / "streamed", metric="plain")
    folders.append(tmp_path / "streamed")
    loaded.dequantize().save_pretrained(tmp_path / "dequantized")
    command = [sys.executable, "-c", STOCK, *map(str, folders), str(tmp_path / "dequantized")]
    done = subprocess.run(command, capture_output=True, text=True)
    *refused, dense = done.stdout.splitlines()
    assert dense == "loaded", done.stderr
    assert len(refused) == len(folders)
    assert all("`ignore_mismatched_sizes`" in line for line in refused), list(zip(folders, refused, strict=True))
    assert done.stderr.count(HINT) == len(folders)


def dense_folder(folder):
    tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_users_tools_work_on_the_factors(task, tokenizer, ids, tmp_path):
    model = compressed(task)
    folder = bs.save(model, tokenizer, tmp_path / "a")
    loaded, _ = bs.load(folder)
    lora = get_peft_model(loaded, LoraConfig(r=2, target_modules=r".*\.(u|v)", init_lora_weights=False))
    with torch.no_grad():
        adapted = lora(ids).logits
    lora.save_pretrained(tmp_path / "adapter")
    merged, _ = bs.load(tmp_path / "adapter")  # the adapter names the compressed folder as its base
    assert torch.allclose(logits(merged, ids), adapted, atol=1e-5)
    text = pipeline("text-generation", model=str(folder), max_new_tokens=3)("abc")
    assert text[0]["generated_text"].startswith("abc")
    compiled = torch.compile(bs.load(folder)[0], backend="eager", fullgraph=True)
    assert torch.allclose(logits(compiled, ids), logits(model, ids), atol=1e-6)
    dense = bs.load(folder)[0].dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), ids), logits(model, ids), atol=1e-5
    )


@pytest.fixture(scope="module", params=["layers", "layers and embedding"])
def loadable(request, tmp_path_factory):
    """A checkpoint folder and its greedy continuation of a prompt."""
    more = {"keep_embedding": 0.5} if "embedding" in request.param else {}
    model = bs.decompose(tiny(tied=True), make_task(), examples=16, embedding=bool(more))
    bs.prune(model, keep=0.5, multiple_of=1, **more)
    folder = bs.save(model, make_tokenizer(), tmp_path_factory.mktemp("loadable") / "model")
    return folder, model.generate(PROMPT, max_new_tokens=8, do_sample=False, use_cache=False)


PROMPT = torch.arange(3, 19)[None]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from CUDA only")
QUANTO = pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
NEEDS = {"offloaded": CUDA, "offloaded_static": CUDA, "quantized": QUANTO}
CACHES = (*STATIC_CACHE_IMPLEMENTATIONS, *DYNAMIC_CACHE_IMPLEMENTATIONS)


@pytest.mark.parametrize("cache", [pytest.param(name, marks=NEEDS.get(name, ())) for name in CACHES])
def test_generate_with_every_cache(cache, loadable):
    folder, expected = loadable
    model = bs.load(folder)[0].to("cuda" if "offloaded" in cache else "cpu")
    found = model.generate(PROMPT.to(model.device), max_new_tokens=8, do_sample=False, cache_implementation=cache)
    if cache == "quantized":  # it rounds
        assert found.shape == expected.shape
    else:
        assert torch.equal(found.cpu(), expected)


@pytest.mark.slow
def test_pipeline_compile_and_device_map(loadable, tmp_path):
    folder, expected = loadable
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)
    devices = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**devices, "model.layers": "disk"}, offload_folder=tmp_path
    )
    assert torch.equal(logits(offloaded, PROMPT), logits(model, PROMPT))
    compiled = torch.compile(bs.load(folder)[0], backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled, PROMPT), logits(model, PROMPT), atol=1e-6)
    text = pipeline("text-generation", model=str(folder), max_new_tokens=8, do_sample=False)
    assert (
        text(bs.load(folder)[1].decode(PROMPT[0]), return_tensors=True)[0]["generated_token_ids"][-8:]
        == expected[0, -8:].tolist()
    )


@pytest.mark.slow
def test_trainer_and_adapters(loadable, tmp_path):
    folder, _ = loadable
    rows = [{"input_ids": PROMPT[0], "labels": PROMPT[0]}] * 4

    def train(model):
        arguments = TrainingArguments(tmp_path / "out", max_steps=2, save_steps=2, learning_rate=1e-2, report_to="none")
        Trainer(model, arguments, train_dataset=rows).train()
        return model

    before = logits(bs.load(folder)[0], PROMPT)
    trained = train(bs.load(folder)[0])
    assert not torch.allclose(logits(trained, PROMPT), before, atol=1e-3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert torch.equal(logits(again, PROMPT), logits(trained.eval(), PROMPT))
    with pytest.raises(ValueError, match=r"save it with basis_select\.save"):  # Trainer records no hashes
        bs.load(tmp_path / "out" / "checkpoint-2")
    saved = bs.save(again, make_tokenizer(), tmp_path / "saved")
    assert torch.equal(logits(bs.load(saved)[0], PROMPT), logits(again, PROMPT))
    adapted = train(get_peft_model(bs.load(folder)[0], LoraConfig(r=2, target_modules=r".*layers.*\.(u|v)"))).eval()
    assert not torch.allclose(logits(adapted, PROMPT), before, atol=1e-4)
    expected = logits(adapted, PROMPT)
    assert torch.allclose(logits(adapted.merge_and_unload(), PROMPT), expected, atol=1e-5)


def test_what_an_embedding_of_bases_cannot_do_is_said(tmp_path):
    """Its table is read as weights: an adapter on it would change the head alone, unnoticed."""
    model = bs.decompose(tiny(tied=True), make_task(), examples=16, embedding=True)
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=1)
    folder = bs.save(model, None, tmp_path / "model")
    with pytest.raises(ValueError, match="adapters of the token embedding would train its head alone"):
        get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.(u|v)"))(PROMPT)
    devices = {"model": "cpu", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="cannot be offloaded"):
        offloaded(PROMPT)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what a process has mapped")
def test_a_loaded_checkpoint_is_in_memory_once(task, tokenizer, tmp_path):
    """Its tensors are copied to where kernels want them: then no view of the file may keep it."""
    bs.save(tiny(), tokenizer, tmp_path / "dense")
    bs.save(bs.decompose(tiny(), task), tokenizer, tmp_path / "bases")
    bs.export(tmp_path / "dense", "int8", tmp_path / "int8")
    for name in ("bases", "int8"):
        model, _ = bs.load(tmp_path / name)
        assert all(t.data_ptr() % 64 == 0 for t in (*model.parameters(), *model.buffers()))
        assert str(tmp_path / name) not in Path("/proc/self/maps").read_text()


def test_what_a_killed_process_left_is_removed_and_a_running_ones_is_not(tokenizer, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".small-{platform.node()}-{process}-x" for process in (gone.pid, os.getpid())] + [".small-ish"]
    for name in names:
        (tmp_path / name).mkdir()
    bs.save(tiny(), tokenizer, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], "small"])


def test_what_a_dtype_cannot_hold_is_not_saved_in_it(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(
        ValueError, match=r"mlp.up_proj.weight has numbers that float16 cannot hold: save it in float32"
    ):
        bs.save(model, make_tokenizer(), tmp_path / "small", dtype="float16")
    assert not (tmp_path / "small").exists()
