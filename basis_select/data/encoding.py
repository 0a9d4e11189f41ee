"""How text becomes tokens: one way for training, for likelihoods and for where generation starts."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PROBES = string.ascii_letters + string.digits + string.punctuation  # to see what a tokenizer adds to a text


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Encoder:
    """Tokens of prompts and responses by a tokenizer that may put its own tokens before and after every text.

    What it puts before a text stays, once. What it puts after is left out, for more may follow: `closed` ends a
    response. A `rendered` text, of a chat template, holds its special tokens already.
    """

    tokenizer: Any

    @cached_property
    def before(self) -> list[int]:
        """Tokens that the tokenizer puts before a text. Raises ValueError where it changes the text's own."""
        text = next((t for t in PROBES if self.tokenizer.encode(t, add_special_tokens=False)), None)
        if text is None:
            raise ValueError(f"this tokenizer has no token for any of {PROBES!r}")
        bare, whole = (self.tokenizer.encode(text, add_special_tokens=special) for special in (False, True))
        for at in range(len(whole) - len(bare) + 1):
            if whole[at : at + len(bare)] == bare:
                return whole[:at]
        raise ValueError("this tokenizer encodes a text differently with its special tokens and without them")

    def text(self, text: str, rendered: bool = False) -> list[int]:
        """Tokens of a text that more may follow."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        starts = rendered or ids[: len(self.before)] == self.before
        return ids if starts else [*self.before, *ids]

    def pair(self, prompt: str, response: str, rendered: bool = False) -> tuple[list[int], int]:
        """`(tokens, start)`: both texts together, and where the response begins: at the first token that the prompt
        alone would not have there.

        So a token that crosses the boundary is the response's, and what stands before it is what the prompt alone
        begins with. White space at the end of a prompt goes with the response, whose first word it is encoded with;
        a chat template's stays where generation will find it. Before an empty prompt stands one token, as in lm-eval.
        """
        bare = prompt if rendered else prompt.rstrip()
        ids = self.text(prompt + response, rendered)
        if start := _shared(self.text(bare, rendered), ids):
            return ids, start
        first = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if first is None else first, *ids], 1

    def closed(self, ids: list[int], start: int, turn_end: str = "") -> list[int]:
        """`ids` with one end token after the response, which begins at `start`, unless a template ends its turns."""
        end = self.tokenizer.eos_token_id
        last = max((i for i in range(start, len(ids)) if ids[i] == end), default=None)
        if last is not None and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return ids if turn_end.strip() else [*ids, end]
