import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import logits, make_tokenizer, sampled, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from vocabularies import TEXT, byte_level, wrapped

import basis_select as bs
from basis_select.bits import Form
from basis_select.cli import app
from basis_select.export import to_int8
from basis_select.layers.embedding import round_table
from basis_select.layers.group import groups
from basis_select.layers.rounded import FEW, RoundedLinear, quantized
from basis_select.layers.traced import for_graph

# Else OpenVINO takes bfloat16 where the CPU has it, and rounds what weights of few bits are multiplied by.
EXACT = {"EXECUTION_MODE_HINT": "ACCURACY"}
LAYERS = {"llama": 2}  # of what takes long to export, in other kinds one
KINDS = [("llama", True), ("qwen2", False), ("gemma3_text", True), ("gpt_neox", False)]


def compressed(task, kind="llama", tied=True, dtype="float32", layers=2):
    """A cut model with shared v, biases where the kind has them and the embedding as bases."""
    model = bs.decompose(tiny(kind, tied, dtype, num_hidden_layers=layers), task, examples=16, embedding=True)
    return bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=2)


def weight_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_dense_needs_nothing_of_ours(task, tokenizer, ids, tmp_path):
    """One fresh process loads all kinds without the import: same logits, nothing missing, nothing left over."""
    wanted = {}
    for kind, tied in KINDS:
        model = compressed(task, kind, tied)
        wanted[kind] = logits(model, ids)
        bs.save(model, tokenizer, tmp_path / "source" / kind)
        out = bs.export(tmp_path / "source" / kind, "dense", tmp_path / kind)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert torch.equal(logits(model, ids), wanted[kind])
    code = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, *kinds = sys.argv[1:]
found = {}
for kind in kinds:
    model, info = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    found[kind] = model(torch.tensor(eval(ids))).logits.detach()
    assert AutoTokenizer.from_pretrained(f"{folder}/{kind}").decode([97]) == "a"
assert "basis_select" not in sys.modules
save_file(found, f"{folder}/logits.safetensors")
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(ids.tolist()), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, found in load_file(tmp_path / "logits.safetensors").items():
        assert torch.allclose(found, wanted[kind], atol=1e-5), kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tied"), sampled(KINDS, 4))
def test_int8_checkpoint(kind, tied, dtype, task, tokenizer, ids, tmp_path):
    model = compressed(task, kind, tied, dtype)
    bs.save(model, tokenizer, tmp_path / "source")
    out = bs.export(tmp_path / "source", "int8", tmp_path / "int8")
    before, after = weight_bytes(tmp_path / "source"), weight_bytes(out)
    assert after < before * (0.4 if dtype == "float32" else 0.75)  # norms and the header of so small a file stay
    again, _ = bs.load(out)
    assert all(layer.q.dtype == torch.int8 for layer in again.modules() if isinstance(layer, RoundedLinear))
    wanted = logits(model, ids)
    assert 0 < (logits(again, ids) - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert bs.sizes(again)["parameters"] == bs.sizes(model)["parameters"]
    dense = bs.export(out, "dense", tmp_path / "dense")
    assert (logits(bs.load(dense)[0], ids) - logits(again, ids)).abs().max() < (1e-5 if dtype == "float32" else 0.02)
    generated = again.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 20)


@pytest.mark.slow
def test_int8_is_the_same_in_a_fresh_process(task, tokenizer, tmp_path):
    out = bs.export(compressed(task, "gemma3_text", dtype="bfloat16"), "int8", tmp_path / "int8", tokenizer)
    assert bs.verify(out) == {"bit_equal": True, "max_difference": 0.0, "hashes_match": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rounds_as_torchao_does(dtype):
    """One scale a row, symmetric; with the kernel for few tokens and without it the function is the same."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 33, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    ours = RoundedLinear.rounded(linear, 8)
    theirs = torch.nn.Sequential(linear)
    quantize_(theirs, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))
    step = ours.scale.max().item()
    assert (ours.weight - theirs[0].weight.dequantize()).abs().max() <= step
    assert torch.equal(ours.weight[3], torch.zeros(48, dtype=dtype))
    for columns, shift in ((48, 0), (48, 7), (26, 0)):  # aligned, not aligned, rows of another length
        layer = RoundedLinear.rounded(torch.nn.Linear(columns, 33, dtype=dtype), 8)
        buffer = torch.empty(layer.q.numel() + shift, dtype=torch.int8)
        layer.q.data = buffer[shift:].view_as(layer.q).copy_(layer.q)
        for tokens in (1, FEW, FEW + 1):
            x = torch.randn(tokens, columns, dtype=dtype)
            exact = x.double() @ (layer.q.double() * layer.scale.double()[:, None]).T + layer.bias.double()
            assert torch.allclose(layer(x).double(), exact, atol=1e-5 if dtype == torch.float32 else 0.03)


def test_rounded_weights_are_healed_but_not_tuned_or_extended(task):
    model = to_int8(compressed(task))
    names = quantized(model)
    for verb, options in ((bs.tune, {}), (bs.extend, {"rank": 2}), (bs.heal, {"lora": 2, "lr": 1e-4})):
        with pytest.raises(ValueError, match="needs weights of 16 bits"):
            verb(model, task, **options)
    assert quantized(bs.heal(model, task, steps=1, lr=1e-4)) == names


def test_what_cannot_be_exported_says_so_and_leaves_nothing(task, tokenizer, tmp_path, monkeypatch):
    model = compressed(task, dtype="bfloat16")
    with pytest.raises(ValueError, match="convert_hf_to_gguf"):
        bs.export(model, "gguf", tmp_path / "a")
    with pytest.raises(ValueError, match="known are dense, onnx, openvino, int8"):
        bs.export(model, "tflite", tmp_path / "a")
    with pytest.raises(ValueError, match="load it as float32"):
        bs.export(model, "onnx", tmp_path / "a")
    with pytest.raises(ValueError, match="call prune"):
        bs.export(bs.decompose(tiny(), task, examples=16), "int8", tmp_path / "a")
    with pytest.raises(ValueError, match="rounded already"):
        bs.export(to_int8(model), "int8", tmp_path / "a")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"basis-select\[export\]"):
        bs.export(compressed(task), "onnx", tmp_path / "a")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        bs.export(model, "dense", tmp_path / "a", tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_onnx(kind, tied, task, ids, tmp_path):
    """Logits, padding and generation, greedy and by beams, are those of the model that was exported."""
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    model = compressed(task, kind, tied, layers=LAYERS.get(kind, 1))
    bs.export(model, "onnx", tmp_path / "onnx", make_tokenizer())
    again, tokenizer = bs.load(tmp_path / "onnx")
    assert torch.allclose(logits(again, ids), logits(model, ids), atol=1e-5)
    stored = (tmp_path / "onnx" / "model.onnx.data").stat().st_size  # a shared v once
    assert stored < 1.2 * 4 * sum(p.numel() for p in model.parameters())
    batch = tokenizer(["one", "another one"], return_tensors="pt", padding=True, padding_side="left")
    for options in ({}, {"num_beams": 2}):
        both = [m.generate(**batch, max_new_tokens=8, do_sample=False, **options) for m in (model, again)]
        assert torch.equal(*both)
    with open(tmp_path / "onnx" / "model.onnx.data", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match="sha256 differs"):
        bs.load(tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_openvino(kind, tied, task, ids, tmp_path):
    """Logits through OpenVINO itself, with the cache inside, and text through its generation library."""
    openvino = pytest.importorskip("openvino", reason="needs the export extra")
    genai = pytest.importorskip("openvino_genai", reason="needs the export extra")
    model = compressed(task, kind, tied, layers=LAYERS.get(kind, 1))
    out = bs.export(model, "openvino", tmp_path / "ov", make_tokenizer())
    request = openvino.compile_model(out / "openvino_model.xml", "CPU", EXACT).create_infer_request()
    found = []
    for begin, end in ((0, 9), (9, 10), (10, 17)):
        batch = {
            "input_ids": ids[:, begin:end].numpy(),
            "attention_mask": torch.ones(2, end, dtype=torch.int64).numpy(),
            "position_ids": torch.arange(begin, end).expand(2, -1).numpy(),
            "beam_idx": torch.arange(2, dtype=torch.int32).numpy(),
        }
        found.append(torch.from_numpy(request.infer(batch)["logits"].copy()))
    assert torch.allclose(torch.cat(found, 1), logits(model, ids), atol=2e-3)  # weights in float16
    prompt = make_tokenizer()("one two", return_tensors="pt")
    wanted = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)[
        0, prompt.input_ids.shape[1] :
    ]
    options = genai.GenerationConfig(max_new_tokens=8, do_sample=False, apply_chat_template=False, ignore_eos=True)
    assert str(genai.LLMPipeline(str(out), "CPU", **EXACT).generate("one two", options)) == make_tokenizer().decode(
        wanted, skip_special_tokens=True
    )
    with pytest.raises(ValueError, match="LLMPipeline"):
        bs.load(out)


def of_bits(kind, tied, task):
    """A layer with all that bits can be: 3, 4, 8, heads of more bits, a table, rows that no group divides."""
    odd = {"hidden_size": 144, "intermediate_size": 200, "num_attention_heads": 6}
    model = bs.decompose(tiny(kind, tied, num_hidden_layers=1, **odd), task, examples=16)
    for i, group in enumerate(groups(model)):
        Form(group.rank, (4, 3)[i % 2], (0, 32, group.rank)[i % 3], 8).put(group, model)
    round_table(model, 8)
    assert {*quantized(model).values()} == {3, 4, 8}
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_traced_for_openvino_computes_the_same(kind, task, ids):
    model = of_bits(kind, kind == "llama", task)
    traced = for_graph(model, "openvino")
    assert torch.allclose(logits(traced, ids), logits(model, ids), atol=1e-5)
    for name, layer in traced.named_modules():
        if isinstance(layer, RoundedLinear):
            assert torch.equal(layer.weight, model.get_submodule(name).weight)
            assert type(model.get_submodule(name)) is RoundedLinear


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_onnx_with_bits(kind, tied, task, ids, tmp_path):
    """Our whole numbers and scales: the same logits and tokens, from a file of a checkpoint's size."""
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    model = of_bits(kind, tied, task)
    source = bs.save(model, make_tokenizer(), tmp_path / "source")
    out = bs.export(source, "onnx", tmp_path / "onnx")
    again, _ = bs.load(out)
    assert torch.allclose(logits(again, ids), logits(model, ids), atol=1e-5)
    assert torch.equal(*(m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, again)))
    # torch's exporter multiplies out the smallest of the weights of 8 bits.
    assert (out / "model.onnx.data").stat().st_size < 1.5 * weight_bytes(source)  # scales are wider there
    assert str(Path(bs.__file__).parents[1]).encode() not in (out / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_openvino_with_bits(kind, tied, task, ids, tmp_path):
    """Our whole numbers and scales, which its products read as they are: the same logits from a file as small."""
    openvino = pytest.importorskip("openvino", reason="needs the export extra")
    model = of_bits(kind, tied, task)
    source = bs.save(model, make_tokenizer(), tmp_path / "source")
    out = bs.export(source, "openvino", tmp_path / "openvino")
    compiled = openvino.compile_model(out / "openvino_model.xml", "CPU", EXACT)
    batch = {
        "input_ids": ids.numpy(),
        "attention_mask": torch.ones_like(ids).numpy(),
        "position_ids": torch.arange(ids.shape[1]).expand(2, -1).numpy(),
        "beam_idx": torch.arange(2, dtype=torch.int32).numpy(),
    }
    found = torch.from_numpy(compiled.create_infer_request().infer(batch)["logits"].copy())
    assert torch.allclose(found, logits(model, ids), atol=1e-4)
    about = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    products = [str(x["runtimePrecision"].astype(str)) for x in about if x["layerType"].astype(str) == "FullyConnected"]
    assert len(products) == sum(isinstance(m, RoundedLinear) for m in model.modules()) - (not tied)  # its rows are read
    assert {*products} == {"i8", "i4"}
    assert (out / "openvino_model.bin").stat().st_size < 1.2 * weight_bytes(source)


@pytest.mark.slow
def test_a_trimmed_model_goes_wherever_others_go(tmp_path):
    """Through PEFT, and from text to text through OpenVINO."""
    genai = pytest.importorskip("openvino_genai", reason="needs the export extra")
    tokenizer = wrapped(byte_level())
    rows = [{"prompt": line[:-9], "response": line[-9:]} for line in TEXT[::9]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = tiny(tied=True, vocab_size=len(tokenizer) + 3, num_hidden_layers=1)
    model, smaller, _ = bs.trim(model, tokenizer, bs.load_task(str(tmp_path / "data.jsonl"), tokenizer, test=2))
    bs.save(model, smaller, tmp_path / "small")
    ids = smaller(TEXT[1], return_tensors="pt").input_ids
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    adapted = get_peft_model(adapted, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(bs.load(tmp_path / "adapter")[0], ids), logits(adapted, ids), atol=1e-5)
    bs.export(model, "openvino", tmp_path / "openvino", smaller)
    options = genai.GenerationConfig(max_new_tokens=8, do_sample=False, apply_chat_template=False, ignore_eos=True)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :]
    found = str(genai.LLMPipeline(str(tmp_path / "openvino"), "CPU", **EXACT).generate(TEXT[1], options))
    assert found == smaller.decode(wanted, skip_special_tokens=True)


def test_cli(task, tokenizer, tmp_path, caplog):
    bs.save(compressed(task), tokenizer, tmp_path / "a")
    command = ["export", str(tmp_path / "a"), "--to", "dense", str(tmp_path / "b")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path / 'b'}: 0.3 MB\n"
    assert "no smaller than the model was" in caplog.text
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "b is not empty: choose another folder" in again.output
