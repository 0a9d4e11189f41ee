"""Text of made-up words, and tokenizers that are trained on it as transformers has them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [f"{a}{b}{c}" for a in "bdfkm" for b in ("a", "ee", "ou") for c in ("t", "ng", "rt", "st", "\u00e9")]
TEXT = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 9)) + f" {i * 37} \u4e2d" for i in range(400)]


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def wrapped(made):
    """As transformers has it, with a token before every text and a chat template."""
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", made.token_to_id("<s>"))])
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), [*SPECIAL, "</s>"], strict=True))
    found = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    found.chat_template = "{% for m in messages %}<s>{{ m.role + ' moust\\n' + m.content }}{% endfor %}"
    return found
