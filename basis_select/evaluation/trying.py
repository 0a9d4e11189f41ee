"""What a model answers to text that somebody types, token by token as it comes."""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..data.encoding import Encoder
from ..data.rows import rendered
from ..training.precision import products
from .accuracy import end_tokens

Write = Callable[[str], object]  # is given pieces of text, in order


class _Pieces(TextStreamer):
    """Hands whole words on as they are generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    write: Write,
    tokens: int = 256,
    chat: bool = False,
) -> None:
    """Write the greedy response to `text`, at most so many tokens, piece by piece.

    chat: the text is a user's turn in the tokenizer's chat template; otherwise it is the prompt as it stands, as in a
    task's rows. Raises ValueError for a chat without a template.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template: leave out --chat")
    if chat:
        turn = [{"role": "user", "content": text}]
        text = rendered(tokenizer, turn, add_generation_prompt=True)
    ids = torch.tensor([Encoder(tokenizer).text(text if chat else text.rstrip(), rendered=chat)], device=model.device)
    if not ids.numel():
        raise ValueError("there is nothing to answer: the prompt has no token")
    ends = sorted(end_tokens(model, tokenizer))
    with products(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
            streamer=_Pieces(tokenizer, write),
        )


def converse(
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    lines: Iterable[str],
    write: Write,
    template: str = "{}",
    tokens: int = 256,
    chat: bool = False,
) -> None:
    """Answer every line by every model of `{name: (model, tokenizer)}`; names are written where there are several.

    template: what a prompt is made of, with the line in place of {}. Empty lines are passed over.
    """
    for line in filter(None, map(str.strip, lines)):
        for name, (model, tokenizer) in models.items():
            if len(models) > 1:
                write(f"[{name}] ")
            answer(model, tokenizer, template.replace("{}", line), write, tokens, chat)
            write("\n")
