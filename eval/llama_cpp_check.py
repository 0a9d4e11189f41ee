"""What llama.cpp computes from the dense export of a checkpoint, against `basis_select.load`.

    python eval/llama_cpp_check.py LLAMA_CPP FOLDER [--pre smollm] [--out FILE]

LLAMA_CPP is a folder with llama.cpp's source, whose convert_hf_to_gguf.py converts; the source archive of the package
llama-cpp-python, which runs the result, has one in vendor/llama.cpp. --pre names the pre-tokenizer of a byte-level
tokenizer, which the converter cannot tell once the tokenizer is trimmed. Writes results/llama_cpp.json beside this
file: for every kind of GGUF file its bytes, the largest difference between log-probabilities of the prompts' tokens in
nats, and whether those tokens and greedy ones are the same. The file of 32 bits is made of a float32 export, the
others of one as `basis-select export` writes it, in bfloat16.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import basis_select as bs

RESULTS = Path(__file__).parent / "results" / "llama_cpp.json"
KINDS = ("f32", "bf16", "q8_0")
NEW = 12  # greedy tokens
PROMPTS = (
    "The largest of 12,345.6, 9.87e4, 54321 is",
    "The smallest of 4.5e3, 78,901, 23456.7 is",
    "The largest of 1.1e3, 2,200, 99000.5 is",
)
CONVERT = """
import runpy, sys

source, pre, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion.base import TextModel

if pre:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(source, folder, out, kind, pre=None):
    """A GGUF file `out` of a stock checkpoint, by llama.cpp's own converter. Raises ValueError with what it says."""
    command = [sys.executable, "-c", CONVERT, str(source), pre or "", str(folder), "--outfile", str(out)]
    done = subprocess.run([*command, "--outtype", kind], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return out


def theirs(file, prompts, new):
    """`[(its tokens, their log-probabilities, new greedy tokens), ...]` of the prompts, texts, by a GGUF file."""
    from llama_cpp import Llama

    model, found = Llama(str(file), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False), []
    for text in prompts:
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(ids)
        logits, greedy = torch.from_numpy(model.scores[: len(ids)].copy()), []
        while len(greedy) < new and model.token_eos() not in greedy:
            greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(greedy[-1:])
        found.append((ids, of_tokens(logits, ids), greedy))
    return found


@torch.no_grad()
def ours(model, tokenizer, prompts, new):
    """The same by a model of `load`."""
    found = []
    for text in prompts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        batch = torch.tensor([ids])
        out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, do_sample=False)
        found.append((ids, of_tokens(model(batch).logits[0], ids), out[0, len(ids) :].tolist()))
    return found


def of_tokens(logits, ids):
    """The log-probabilities of a prompt's tokens but the first: (tokens - 1,)."""
    return logits[:-1].float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def apart(found, expected):
    """The largest difference between log-probabilities, in nats, and whether prompts and greedy tokens are the same."""
    pairs = list(zip(found, expected, strict=True))
    if any(one[0] != other[0] for one, other in pairs):
        return {"max_difference": None, "same_prompt_tokens": False, "same_greedy_tokens": False}
    return {
        "max_difference": max((one[1] - other[1]).abs().max().item() for one, other in pairs),
        "same_prompt_tokens": True,
        "same_greedy_tokens": all(one[2] == other[2] for one, other in pairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pre")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, tokenizer = bs.load(args.folder, "float32")
    expected = ours(model, tokenizer, PROMPTS, NEW)
    stored = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    rows = {"checkpoint": {"bytes": stored}}
    with tempfile.TemporaryDirectory() as scratch:
        exact = bs.export(model, "dense", Path(scratch) / "float32", tokenizer)
        usual = bs.export(args.folder, "dense", Path(scratch) / "dense")
        for kind in KINDS:
            file = Path(scratch) / f"{kind}.gguf"
            convert(args.llama_cpp, exact if kind == "f32" else usual, file, kind, args.pre)
            rows[f"GGUF, {kind}"] = {"bytes": file.stat().st_size} | apart(theirs(file, PROMPTS, NEW), expected)
            print(json.dumps(rows[f"GGUF, {kind}"]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "torch", "transformers")}
    args.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
