"""Which forms of a checkpoint which runtime computes as `basis_select.load` does, or the sentence that refuses.

    python eval/forms_by_runtime.py LLAMA_CPP [--only "ONNX Runtime"]
    python eval/forms_by_runtime.py LLAMA_CPP --only "ONNX Runtime,OpenVINO" --real FOLDER --exports OUT

Every case is a random llama of one layer with a byte-level tokenizer. LLAMA_CPP: as in llama_cpp_check.py. What vLLM
computes is what vllm_check.py found for llama. Writes results/forms_by_runtime.json beside this file: differences
between log-probabilities of the tokens of prompts, in nats, all in float32. With --real, exports of a checkpoint of the
quickstart are compared instead, written to OUT unless they are there, and results/exports.json says how large they are.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from conftest import make_task, tiny
from llama_cpp_check import NEW, PROMPTS, apart, convert, of_tokens, ours, theirs
from test_trim import TEXT, byte_level, wrapped
from vllm_check import RESULTS as VLLM
from vllm_check import bases, bits, int8, table, trimmed

import basis_select as bs

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "openvino", "openvino-genai", "llama-cpp-python")
FORMS = {
    "bases of 16 bits": bases,
    "8 bits": int8,
    "4 and 3 bits": partial(bits, size="3.5x"),
    "trimmed": bases,
    "embedding as bases": table,
}
IN_VLLM = {
    "bases of 16 bits": "bases",
    "8 bits": "8 bits of export",
    "4 and 3 bits": "4 and 3 bits",
    "trimmed": "trimmed",
    "embedding as bases": "embedding as bases",
}


def make(form, folder):
    """A checkpoint of a form in `folder`, of 16 bits but for weights of fewer."""
    tokenizer = wrapped(byte_level())
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
    model = tiny(tied=True, vocab_size=len(tokenizer), **sizes)
    if form == "trimmed":
        model, tokenizer = trimmed(model, folder)
    bs.save(FORMS[form](model, make_task()), tokenizer, folder, dtype="bfloat16")


def by_load(folder, prompts, scratch):
    return ours(*bs.load(folder, "float32"), prompts, NEW)


def by_transformers(folder, prompts, scratch):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return ours(model, transformers.AutoTokenizer.from_pretrained(folder), prompts, NEW)


def by_peft(folder, prompts, scratch):
    """An adapter that was saved and loaded again."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = bs.load(folder, "float32")
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*layers.*\.(u|v)"))
    adapted.save_pretrained(scratch / "adapter")
    return ours(bs.load(scratch / "adapter", "float32")[0], tokenizer, prompts, NEW)


def by_onnx(folder, prompts, scratch):
    out = scratch / "onnx"
    return ours(*bs.load(out if out.exists() else bs.export(folder, "onnx", out)), prompts, NEW)


def by_openvino(folder, prompts, scratch):
    """Log-probabilities by OpenVINO in float32, tokens by its generation library."""
    import openvino
    import openvino_genai as genai

    out, found = scratch / "openvino", []
    if not out.exists():
        bs.export(folder, "openvino", out)
    tokenizer, exact = transformers.AutoTokenizer.from_pretrained(folder), {"EXECUTION_MODE_HINT": "ACCURACY"}
    compiled = openvino.compile_model(out / "openvino_model.xml", "CPU", exact)
    pipeline = genai.LLMPipeline(str(out), "CPU", **exact)
    options = genai.GenerationConfig(max_new_tokens=NEW, do_sample=False)
    for text in prompts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1])[None],
            "beam_idx": torch.zeros(1, dtype=torch.int32),
        }
        logits = compiled.create_infer_request().infer({name: x.numpy() for name, x in batch.items()})["logits"]
        (new,) = pipeline.generate(openvino.Tensor(ids.numpy()), options).tokens
        found.append((ids[0].tolist(), of_tokens(torch.from_numpy(logits.copy())[0], ids[0].tolist()), list(new)))
    return found


def by_llama_cpp(source, pre, folder, prompts, scratch):
    """Of a dense export in float32, so that nothing is rounded again."""
    model, tokenizer = bs.load(folder, "float32")
    dense = bs.export(model, "dense", scratch / "dense", tokenizer)
    return theirs(convert(source, dense, scratch / "dense.gguf", "f32", pre), prompts, NEW)


def of_vllm():
    found = {row["form"]: row for row in json.loads(VLLM.read_text())["cases"] if row["architecture"] == "llama"}
    return {form: {"max_difference": found[IN_VLLM[form]]["max_difference"]["float32"]} for form in FORMS}


def case(runtime, folder, prompts, scratch):
    """How far a runtime is from `load`, or with which sentence it or the package refuses."""
    scratch.mkdir(parents=True, exist_ok=True)
    expected = by_load(folder, prompts, scratch)
    try:
        return apart(runtime(folder, prompts, scratch), expected)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {"refused": str(error).strip().splitlines()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--only", help="runtimes, with commas between them; the others keep their rows")
    parser.add_argument("--real", type=Path)
    parser.add_argument("--exports", type=Path)
    args = parser.parse_args()
    exports = {"ONNX Runtime": by_onnx, "OpenVINO": by_openvino}
    runtimes = {
        "basis_select.load": by_load,
        "transformers": by_transformers,
        "PEFT": by_peft,
        **exports,
        "llama.cpp by a dense export": partial(by_llama_cpp, args.llama_cpp, "gpt-2"),
    }
    only = args.only.split(",") if args.only else runtimes
    if args.real:
        keep("exports", "checkpoint", {"bytes": size(args.real, "*.safetensors")})
        for name in only:
            out = args.exports / name
            keep("exports", name, case(exports[name], args.real, PROMPTS, out) | written(out))
        return
    keep("forms_by_runtime", "vLLM", of_vllm())
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for form in FORMS:
            make(form, scratch / form)
        for name in only:
            folders = {form: (scratch / form, scratch / f"{name} {form}") for form in FORMS}
            row = {form: case(runtimes[name], folder, TEXT[1:3], own) for form, (folder, own) in folders.items()}
            keep("forms_by_runtime", name, row)


def keep(file, name, row):
    """Put a row into a result file; the others stay."""
    path = RESULTS / f"{file}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    path.write_text(json.dumps({"versions": versions, "rows": rows | {name: row}}, indent=1) + "\n")
    print(name, json.dumps(row), flush=True)


def written(scratch):
    """Bytes of the graph that an export wrote, weights included."""
    return {"bytes": size(scratch, "*/model.onnx*") + size(scratch, "*/openvino_model.*")}


def size(folder, pattern):
    return sum(path.stat().st_size for path in folder.glob(pattern))


if __name__ == "__main__":
    main()
