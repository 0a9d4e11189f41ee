"""Which causal language models of the installed transformers work, as tiny random models.

    python eval/architectures.py [--only llama,mamba2]

Every row is an architecture: a model with two layers, made from the default config, is decomposed, pruned, saved,
loaded, generated with and exported dense. A cell says `yes`, or the sentence with which the package or transformers
refuses. Writes results/architectures.md and .json beside this file.
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import json
import logging
import signal
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import basis_select as bs
from basis_select.data.answers import exact
from basis_select.data.tasks import Example, Task
from basis_select.layers.group import groups

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 256
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
PATIENCE = 30  # seconds of computing for one architecture
STEPS = ("decompose, prune", "save, load", "generate", "export dense")
LARGEST = 30_000_000  # parameters of a model that counts as tiny
SIZES = {  # of fields of configs, by what their names mean
    ("vocab_size", "unpadded_vocab_size"): VOCABULARY,
    ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size", "model_dim"): 64,
    ("intermediate_size", "ffn_dim", "n_inner", "inner_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"): 96,
    ("ffn_hidden_size", "mlp_hidden_size", "intermediate_dim", "dim_ff", "moe_intermediate_size", "d_inner"): 96,
    ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"): 96,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"): 2,
    ("num_decoder_layers", "num_encoder_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("encoder_attention_heads", "attention_heads"): 4,
    ("num_key_value_heads", "kv_n_heads", "num_kv_heads"): 2,
    ("head_dim", "d_head", "attention_head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"): 16,
    ("kv_lora_rank", "q_lora_rank", "lora_rank"): 32,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"): 128,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "top_k", "moe_k", "moe_topk"): 2,
    ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"): 1,
    ("state_size", "mamba_d_state", "ssm_state_size", "conv_kernel"): 4,
    ("rotary_dim",): 8,
    ("image_size",): 28,
    ("patch_size",): 14,
}
HYBRID = ["linear_attention", "full_attention"]
FIELDS = {  # of architectures in which sizes depend on each other or are lists
    "bailing_hybrid": {
        "layer_types": HYBRID,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "n_group": 2,
        "topk_group": 1,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": ROPE},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 64}},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": [96, 96],
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "granitemoehybrid": {"layer_types": HYBRID, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "kimi_linear": {
        "layer_types": HYBRID,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "qk_head_dim": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "xlstm": {"num_blocks": 2, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads")
DIMS = ("head_dim", "d_head", "attention_head_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
STATES = ("state_size", "mamba_d_state", "ssm_state_size")
LEFT = [(), DIMS, LAYERS, (*LAYERS, *DIMS), (*HEADS, *DIMS), ("hidden_size", "d_model", *HEADS, *DIMS), tuple(STATES)]
OF_FIELD = {name: value for names, value in SIZES.items() for name in names}


def tiny(kind, seed=0):
    """A random two-layer model of an architecture, in eval mode, that runs.

    Where sizes do not go together, some are left as they are by default.
    """
    first = None
    for default in LEFT:
        try:
            model = _made(kind, seed, default)
            logits(model, torch.full((1, 8), 64))
            return model.requires_grad_(True)
        except Exception as error:
            first = first or error
    raise first


def _made(kind, seed, default):
    torch.manual_seed(seed)
    config = tiny_config(CONFIG_MAPPING[kind], default)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    factory = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.device("meta"):
        size = factory.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters still")
    model = factory.from_config(config, dtype=torch.float32)
    for name, p in model.named_parameters():  # biases start at zero, which would hide a dropped one
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def tiny_config(kind, left=()):
    """A config of class `kind` with every usual size small but those of `left`, those of its parts as well."""
    values = {name: value for name, value in vars(kind()).items() if not name.startswith("_")}
    sizes = {name: size for name, size in OF_FIELD.items() if name not in left}
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in values), None)
    chosen = _layers_of_each_kind(values, layers)
    known = set(inspect.signature(kind.__init__).parameters) | {name for c in kind.__mro__ for name in vars(c)}
    made, token = {}, 8
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            made[name] = tiny_config(type(value), left).to_dict()
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            made[name], token = token, token + 1
        elif isinstance(value, list | tuple) and len(value) == layers and chosen:
            made[name] = [value[i] for i in chosen]
        elif isinstance(value, int) and not isinstance(value, bool) and value > sizes.get(name, value):
            made[name] = sizes[name]
        elif name == "head_dim" and value is None and name in sizes:
            made[name] = 16
    made |= FIELDS.get(kind.model_type, {})
    return kind(**{name: value for name, value in made.items() if name in known or name in values})


def _layers_of_each_kind(values, layers):
    """Two layers, of two kinds if there are as many."""
    lists = [v for v in values.values() if isinstance(v, list | tuple) and layers and len(v) == layers]
    if not lists:
        return []
    rows = list(zip(*lists, strict=True))
    other = next((i for i, row in enumerate(rows) if row != rows[0]), min(1, layers - 1))
    return [0, other]


def make_tokenizer():
    """One token per character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(c): c for c in range(3, VOCABULARY)}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_task():
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(64, VOCABULARY, (16,), generator=generator).tolist()) for _ in range(12)]
    examples = [Example(f"p{i}", f"r{i}", f"r{i}", x, 12) for i, x in enumerate(ids)]
    return Task("random", examples[:8], examples[8:10], examples[10:], exact, 0)


def logits(model, ids):
    # Products of some shapes are rounded differently where weights require gradients.
    with torch.no_grad():
        return model.requires_grad_(False)(input_ids=ids).logits


def examine(kind):
    """`{column: what came out}` of one architecture."""
    row = {"architecture": kind, "class": "", "layers as bases": 0, **dict.fromkeys(STEPS, "")}
    try:
        model = tiny(kind)
    except Exception as error:
        return {**row, STEPS[0]: f"not made tiny: {_sentence(error)}"}
    row["class"] = type(model).__name__
    with tempfile.TemporaryDirectory() as folder:
        step = STEPS[0]
        try:
            for step, result in _steps(model, Path(folder)):
                row[step] = result
        except Exception as error:
            row[STEPS[STEPS.index(step) + bool(row[step])]] = _sentence(error)
        row["layers as bases"] = sum(len(group.layers) for group in groups(model))
    return row


def _steps(model, folder):
    ids = torch.randint(64, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    bs.decompose(model, make_task(), examples=8)
    bs.prune(model, keep=0.5, multiple_of=4)
    before = logits(model, ids)
    yield STEPS[0], "yes" if before.isfinite().all() else "not finite"
    bs.save(model, make_tokenizer(), folder / "saved")
    loaded, _ = bs.load(folder / "saved")
    apart = float((logits(loaded, ids) - before).abs().max() / before.abs().max())
    yield STEPS[1], "yes" if apart == 0 else f"logits differ by {apart:.0e} of the largest"
    new = [m.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for m in (model, loaded)]
    yield STEPS[2], "yes" if torch.equal(*new) else "other tokens"
    bs.export(model, "dense", folder / "dense", make_tokenizer())
    dense = type(model).from_pretrained(folder / "dense")
    close = torch.allclose(logits(dense, ids), before, atol=1e-3 * float(before.abs().max()))
    yield STEPS[3], "yes" if close else "other logits"


def _sentence(error):
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def in_time(seconds):
    def stop(*_):
        raise TimeoutError(f"not done in {seconds} seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def table(rows):
    """The Markdown page."""
    works = [row for row in rows if all(row[step] == "yes" for step in STEPS)]
    lines = [
        f"# Architectures of transformers {transformers.__version__}",
        "",
        f"Written by `eval/architectures.py` with torch {importlib.metadata.version('torch')}: {len(works)} of "
        f"{len(rows)} architectures work, as random models of two layers. `save, load` is `yes` where logits are equal "
        "bit for bit, `export dense` where they are up to rounding.",
        "",
        f"| architecture | layers as bases | {' | '.join(STEPS)} |",
        "|---|---:|" + "---|" * len(STEPS),
    ]
    for row in rows:
        lines.append(f"| {row['architecture']} | {row['layers as bases']} | {' | '.join(row[s] for s in STEPS)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="architectures, with commas between them; the others keep their rows")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kinds = [*dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES])]
    path, known = RESULTS / "architectures.json", {}
    if args.only and path.exists():
        known = {row["architecture"]: row for row in json.loads(path.read_text())}
    for kind in args.only.split(",") if args.only else kinds:
        with in_time(PATIENCE):
            known[kind] = examine(kind)
        print(json.dumps(known[kind]), flush=True)
        rows = [known[kind] for kind in kinds if kind in known]
        path.write_text(json.dumps(rows, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
