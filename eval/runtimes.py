"""One model and its cut version in every runtime: bytes, response NLL, logits against eager float32, decode speed.

python eval/runtimes.py DENSE CUT TASK FOLDER OUT.json [--items N] [--tokens N] [--rounds N] [--threads N]

FOLDER keeps the exports, so that a killed run does not repeat them. In a round each row decodes `--tokens` tokens at
batch 1 once, in turn, after a prompt of 16. For SmolLM2-135M about 20 minutes, most of them compiling and exporting.
eval/tables.py writes the table.
"""

import argparse
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import openvino
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from basis_select import export, load, load_task
from basis_select.checkpoint.runtime import OnnxModel
from basis_select.checkpoint.targets import targets
from basis_select.evaluation.speed import Generation, spread, take_turns
from basis_select.layers.group import groups
from basis_select.system.writing import replace_text

GROUP = 16  # weights that share one scale in int4: ranks are multiples of 16


class OpenVino:
    """An OpenVINO export with the call of a transformers model; its cache stays inside."""

    device = torch.device("cpu")

    def __init__(self, folder, threads):
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.request = openvino.compile_model(folder / "openvino_model.xml", "CPU", options).create_infer_request()

    def __call__(self, input_ids, cache=None, use_cache=True):
        past = cache or 0
        if past == 0:
            self.request.reset_state()
        end = past + input_ids.shape[1]
        found = self.request.infer(
            {
                "input_ids": input_ids.numpy(),
                "attention_mask": torch.ones(1, end, dtype=torch.int64).numpy(),
                "position_ids": torch.arange(past, end)[None].numpy(),
                "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
            }
        )
        return SimpleNamespace(logits=torch.from_numpy(found["logits"].copy()), cache=end)


def eager(source, folder, threads, dtype):
    model = load(source, dtype)[0]
    return model, sum(p.numel() * p.element_size() for p in model.parameters())


def onnx(source, folder, threads):
    out = exported(source, "onnx", folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others have the cores in their turn
    return OnnxModel(out, options).eval(), size_of(out, "*.onnx*")


def open_vino(source, folder, threads):
    out = exported(source, "openvino", folder)
    return OpenVino(out, threads), size_of(out, "openvino_model.*")


def int8(source, folder, threads):
    out = exported(source, "int8", folder)
    return load(out)[0], size_of(out, "*.safetensors")


def torchao(source, folder, threads, width):
    """Linear layers rounded in memory by torchao, except the table of an embedding; not a checkpoint of ours."""
    model, size = eager(source, folder, threads, "bfloat16")
    layers = list(targets(model, required=False).values())
    for layer in [layer for group in groups(model) for layer in group.layers]:
        layers += [child for child in layer.children() if type(child) is nn.Linear]
    weights, rows = sum(m.weight.numel() for m in layers), sum(m.out_features for m in layers)
    if width == "int8":
        config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        size += 2 * rows - weights
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
        size += 2 * weights // GROUP - 3 * weights // 2
    quantize_(model, config, lambda m, _: m in layers)
    return model, size


RUNTIMES = {
    "eager float32": (eager, "float32"),
    "eager bfloat16": (eager, "bfloat16"),
    "compiled bfloat16": (eager, "bfloat16"),
    "ONNX Runtime float32": (onnx,),
    "OpenVINO": (open_vino,),
    "int8 checkpoint": (int8,),
    "compiled int8 checkpoint": (int8,),
    "torchao int8": (torchao, "int8"),
    "torchao int4": (torchao, "int4"),
}


def exported(source, to, folder):
    out = folder / f"{Path(source).name}-{to}"
    return out if out.exists() else export(source, to, out)


def size_of(folder, pattern):
    return sum(path.stat().st_size for path in folder.glob(pattern))


@torch.no_grad()
def score(model, examples):
    """`(nats per response token, logits of all items)`; item by item, so that padding plays no part."""
    total, tokens, seen = 0.0, 0, []
    for example in examples:
        ids = torch.tensor(example.input_ids)[None]
        logits = model(input_ids=ids).logits[0].float()
        start = example.start
        wanted = ids[0, start:, None]
        total -= logits[start - 1 : -1].log_softmax(-1).gather(1, wanted).double().sum().item()
        tokens += len(wanted)
        seen.append(logits)
    return total / tokens, torch.cat(seen)


def decoding(model, tokens):
    """What `take_turns` prepares and times, of anything called like a model: greedy tokens after a prompt."""

    @torch.no_grad()
    def prepare():
        out = model(input_ids=torch.arange(16)[None])

        @torch.no_grad()
        def run():
            nonlocal out
            for _ in range(tokens):
                out = model(input_ids=out.logits[:, -1:].argmax(-1), cache=out.cache)

        return run

    return prepare


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dense", "cut", "task"):
        parser.add_argument(name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    examples = load_task(args.task, load(args.dense)[1], test=args.items).test
    rows, runs = {}, {}
    for which, source in (("dense", args.dense), ("cut", args.cut)):
        reference = None
        for runtime, (make, *dtype) in RUNTIMES.items():
            name = f"{which}, {runtime}"
            model, size = make(source, args.folder, args.threads, *dtype)
            if runtime.startswith("compiled"):
                runs[name] = Generation(model, 16, args.tokens, compiled=True).to_decode
                model = torch.compile(model, dynamic=True)
            else:
                runs[name] = decoding(model, args.tokens)
            nll, logits = score(model, examples)
            reference = logits if reference is None else reference
            difference = (logits - reference).abs().max().item()
            rows[name] = {"bytes": size, "nll": nll, "largest logit difference": difference}
            print(name, json.dumps(rows[name]), flush=True)
    for name, seconds in take_turns(runs, args.rounds).items():
        rows[name]["tokens per second"] = spread([args.tokens / s for s in seconds])
    options = {"items": args.items, "tokens": args.tokens, "rounds": args.rounds, "threads": args.threads}
    replace_text(args.out, json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    main()
