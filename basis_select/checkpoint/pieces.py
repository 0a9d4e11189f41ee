"""The `tokenizer.model` of SentencePiece beside a tokenizer.json: transformers reads it and no longer writes it.

llama.cpp's converter needs it: it holds the scores by which pieces merge.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import import_protobuf

log = logging.getLogger(__name__)

NAME = "tokenizer.model"
IDS = ("unk_id", "bos_id", "eos_id", "pad_id")  # of its trainer_spec, -1 where there is none


def tokenizer_model(tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """The tokenizer.model of a tokenizer, from the folder it was read from or from `trim`; None without one.

    None as well, and a warning, if it is of other tokens than the tokenizer.
    """
    proto = _proto(tokenizer)
    return proto and proto.SerializeToString()


def trimmed_model(
    tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, new: dict[int, int]
) -> bytes | None:
    """The tokenizer.model of `smaller`, whose token `new[i]` is token i of `tokenizer`; None where that has none."""
    proto = _proto(tokenizer)
    if proto is None:
        return None
    pieces = [proto.pieces[old] for old in sorted(new, key=new.get) if old < len(proto.pieces)]
    made = type(proto)()
    made.CopyFrom(proto)
    del made.pieces[:]
    made.pieces.extend(pieces)
    made.trainer_spec.vocab_size = len(pieces)
    for name in IDS:
        setattr(made.trainer_spec, name, new.get(getattr(proto.trainer_spec, name), -1))
    return made.SerializeToString() if _agrees(made, smaller) else None


def _proto(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The parsed tokenizer.model of a tokenizer, None without one that holds its tokens."""
    content, path = getattr(tokenizer, "tokenizer_model", None), getattr(tokenizer, "vocab_file", None)
    if content is None and path and Path(path).name == NAME and Path(path).is_file():
        content = Path(path).read_bytes()
    if content is None:
        return None
    try:
        proto = import_protobuf().ModelProto.FromString(content)
    except ImportError:
        log.warning("%s is left out: it can only be read with protobuf (pip install protobuf)", NAME)
        return None
    return proto if _agrees(proto, tokenizer) else None


def _agrees(proto: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether piece i is token i, for all pieces; one that a tokenizer has added tokens for may have another name."""
    added = tokenizer.added_tokens_decoder
    tokens: Sequence = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    pieces = [piece.piece for piece in proto.pieces]
    same = len(pieces) <= len(tokens) and all(
        piece == token or i in added for i, (piece, token) in enumerate(zip(pieces, tokens, strict=False))
    )
    if not same:
        log.warning("%s is left out: its pieces are not the tokens of tokenizer.json", NAME)
    return same
