"""A language model small enough for a tutorial: it reads characters, knows three skills, and is trained in a minute.

`copy: cabd >` is answered ` cabd`, `reverse: cabd >` by ` dbac`, `sort: cabd >` by ` abcd`. The application of the
notebooks is one of the three; what the model knows of the other two is what can go.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import basis_select as bs

FOLDER = Path("runs/small")  # beside the notebook that runs: the model is trained by the first of them
LETTERS = "abcdefgh"
SKILLS = {"copy": str, "reverse": lambda word: word[::-1], "sort": lambda word: "".join(sorted(word))}


def data(skills, rows=3000, seed=0):
    """The path of a JSONL file of `{prompt, response}` rows, as a user would write one."""
    path = FOLDER / f"{'_'.join(skills)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = ["".join(draw.choices(LETTERS, k=5)) for _ in range(rows)]
    chosen = [draw.choice(skills) for _ in words]
    made = [{"prompt": f"{s}: {w} >", "response": f" {SKILLS[s](w)}"} for s, w in zip(chosen, words, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def parent():
    """`(model, tokenizer)` of the trained model."""
    if not (FOLDER / "model").exists():
        tokenizer = characters()
        torch.manual_seed(0)
        model = LlamaForCausalLM(config()).eval()
        everything = bs.load_task(data(list(SKILLS), 12000), tokenizer)
        bs.tune(model, everything, steps=500, batch_size=64, lr=3e-3)
        bs.save(model, tokenizer, FOLDER / "model")
    return bs.load(FOLDER / "model")


def config():
    return LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def characters():
    """A tokenizer with one token for each ASCII character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(c): c for c in range(3, 128)}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
