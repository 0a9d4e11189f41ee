"""PhoneLM as a stock Llama: writes a folder that transformers 5 reads, from the hub's own weights.

python eval/phonelm.py SOURCE OUT            SOURCE: mllmTeam/PhoneLM-0.5B-Instruct, another of them, or a folder
python eval/phonelm.py --rounding 0.5b       what the one difference amounts to, on a random model of that shape

PhoneLM's own modelling file needs trust_remote_code and imports what transformers 5 no longer has. Its parameters have
Llama's names and shapes (arXiv 2411.05046; gated ReLU, no biases, tied embedding), so only config.json changes and the
weights are copied as they are. The one difference: PhoneLM rounds the cosines and sines of its rotary embedding to
steps of 1/127 of their largest; a stock Llama does not.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, LlamaConfig

from basis_select.checkpoint.models import load

SHAPES = {
    "0.5b": {"hidden_size": 1024, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.5b": {"hidden_size": 2560, "intermediate_size": 6816, "num_hidden_layers": 19, "num_attention_heads": 16},
}
FIXED = {"hidden_act": "relu", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def config(vocab_size=49152, max_position_embeddings=2048, **shape):
    """The LlamaConfig of a PhoneLM of this shape: as many key heads as heads."""
    return LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        hidden_act=FIXED["hidden_act"],
        tie_word_embeddings=FIXED["tie_word_embeddings"],
        rms_norm_eps=FIXED["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": FIXED["rope_theta"]},
        bos_token_id=1,
        eos_token_id=2,
    )


def convert(source, out):
    """Write the stock folder `out` from a PhoneLM folder or hub id, and load it once. ValueError for another model."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if theirs.get("model_type") != "phonelm":
        raise ValueError(f"{source} is a {theirs.get('model_type')} model, not a PhoneLM")
    fixed = FIXED | {"num_key_value_heads": theirs["num_attention_heads"]}
    for key, value in fixed.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{source} has {key}={theirs[key]}, a PhoneLM has {value}: it may be no Llama")
    shape = {key: theirs[key] for key in (*SHAPES["0.5b"], "vocab_size", "max_position_embeddings")}
    out.mkdir(parents=True)
    stock = config(**shape)
    stock.architectures, stock.dtype = ["LlamaForCausalLM"], theirs.get("torch_dtype", "bfloat16")
    stock.save_pretrained(out)
    for path in folder.iterdir():
        if path.name != "config.json" and path.suffix in (".safetensors", ".json", ".txt", ".model"):
            shutil.copy(path, out / path.name)
    load(out)  # raises unless every weight is there and fits
    return out


def round_rotary(model):
    """Make a Llama's rotary embedding PhoneLM's: cosines and sines in steps of 1/127 of the largest; in place."""

    def rounded(module, args, out):
        return tuple((x / x.abs().max() * 127).round() / 127 * x.abs().max() for x in out)

    model.model.rotary_emb.register_forward_hook(rounded)
    return model


@torch.no_grad()
def rounding(shape, length=256):
    """What the rounding changes in the logits of a random model in fp32, beside how far these spread."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**shape), dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, length))
    exact = model(ids).logits
    rough = round_rotary(model)(ids).logits
    divergence = torch.nn.functional.kl_div(
        rough.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none"
    )
    return {
        "max_logit_difference": (exact - rough).abs().max().item(),
        "logit_std": exact.std().item(),
        "mean_kl": divergence.sum(-1).mean().item(),
        "same_argmax": (exact.argmax(-1) == rough.argmax(-1)).float().mean().item(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--rounding", choices=SHAPES)
    a = parser.parse_args()
    if a.rounding:
        print(json.dumps(rounding(SHAPES[a.rounding]), indent=1))
    elif a.out is None:
        parser.error("name a source and a folder to write, or --rounding")
    else:
        print(convert(a.source, a.out))
