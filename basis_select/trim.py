"""Keep only the tokens that a task needs: a smaller table, and a stock tokenizer that still writes every text."""

import copy
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint.pieces import trimmed_model
from .data.tasks import Task
from .layers.embedding import TableEmbedding
from .options import Natural, checked
from .system.reading import read_text

log = logging.getLogger(__name__)

BYTES = frozenset(f"<0x{i:02X}>" for i in range(256))  # tokens of SentencePiece that stand for one byte each
FILES = ("tokenizer.json", "tokenizer_config.json")  # what the trimmed tokenizer is read from


@checked
def trim(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    tokens: Annotated[
        Literal["task", "all"],
        Field(description="Which tokens stay: those that the task's training split needs, or all there are."),
    ] = "task",
    text: Annotated[
        str | None, Field(description="A UTF-8 file whose `frequent` most frequent tokens stay as well.")
    ] = None,
    frequent: Annotated[Natural, Field(description="How many tokens of `text` stay.")] = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict]:
    """Drop the tokens that the training split of `task` does not need, in place.

    Returns `(model, tokenizer, report)`: the model with rows for the tokens left, a new tokenizer, and how many tokens
    and parameters there were and are, and which share of the tokens of the validation and test splits are now spelled
    in pieces, which the model's config keeps as `trimmed`. The task holds tokens of the old tokenizer: load it again
    with the new one. With `tokens="all"` nothing changes.

    What stays: tokens of the training split, those that they are merged from, all single bytes (or all single
    characters where the tokenizer has no bytes), special tokens, those of the chat template and those that the model's
    config names; and, with `text`, the path of a UTF-8 file, its `frequent` most frequent tokens. So training text
    keeps its tokens, and any other text is encoded and decoded as exactly as before, but may take more tokens.

    Raises ValueError for a tokenizer that is neither BPE nor Unigram, for one whose training text would not keep its
    tokens, and for a model with other tables of tokens or whose embedding is written as bases (trim before decompose).

        >>> model, smaller, report = bs.trim(copy.deepcopy(parent), tokenizer, task)
        >>> task = bs.load_task("data.jsonl", smaller)
        >>> report["tokens_before"] - report["tokens"]
        0
    """
    if tokens == "all":
        return model, tokenizer, dict.fromkeys(("tokens", "tokens_before"), model.get_input_embeddings().num_embeddings)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"a {type(tokenizer).__name__} cannot be trimmed: it has no tokenizer.json")
    if getattr(model.config, "trimmed", None):
        raise ValueError("this model has been trimmed already: trim the one that it was made of")
    if bool(text) != bool(frequent):
        raise ValueError("`text` and `frequent` go together: how many of the most frequent tokens of a text to keep")
    _check_tables(model)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    used = {token for example in task.train for token in example.input_ids}
    if text:
        ids = tokenizer(read_text(text), add_special_tokens=False)["input_ids"]
        used |= {token for token, _ in Counter(ids).most_common(frequent)}
    before, rows = model.num_parameters(), model.get_input_embeddings().num_embeddings
    named = {i for *_, value in _token_ids(model) for i in _flat(value)}
    wanted = {*used, *named, *_special(tokenizer, content), *_of_template(tokenizer)}
    kept = [i for i in _closed(content, wanted) if i < rows]  # Gemma 3 has a token that the table has no row for
    kept += sorted(named.intersection(range(rows)).difference(kept))  # rows without a token, such as a padding's
    smaller, new = _tokenizer(tokenizer, content, kept), {old: i for i, old in enumerate(kept)}
    _check_pieces(task, tokenizer, smaller, new)
    smaller.tokenizer_model = trimmed_model(tokenizer, smaller, new)
    report = {"tokens": len(kept), "tokens_before": rows}
    for split in ("validation", "test"):
        ids = [token for example in getattr(task, split) for token in example.input_ids]
        report[f"spelled_{split}"] = sum(token not in new for token in ids) / max(1, len(ids))
    _shrink(model, kept, new)
    report["parameters_away"] = before - model.num_parameters()
    model.config.trimmed = report
    log.info("trim: %s tokens of %s stay", f"{len(kept):,}", f"{rows:,}")
    return model, smaller, report


def trimmed_away(model: nn.Module) -> int:
    """Parameters of the rows of tokens that a model has been trimmed of."""
    return (getattr(model.config, "trimmed", None) or {}).get("parameters_away", 0)


def _check_tables(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, TableEmbedding) or not isinstance(head, nn.Linear):
        raise ValueError("the embedding or the head is written as bases: trim before decompose")
    rows = embedding.num_embeddings
    expected = model.config.get_text_config().vocab_size
    if rows != expected:
        raise ValueError(f"the embedding has {rows:,} rows, where the config says {expected:,}: it cannot be trimmed")
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and m is not embedding]
    others = [n for n in others if model.get_submodule(n).num_embeddings == rows]
    if others:
        raise ValueError(f"{', '.join(others)} has a row for every token beside the embedding: it cannot be trimmed")


def _vocabulary(content: dict) -> dict[str, int]:
    """`{token: id}` of the model of a tokenizer.json, without the tokens that are added to it."""
    kind, found = content["model"]["type"], content["model"]["vocab"]
    if kind == "BPE":
        return found
    if kind == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(found)}
    raise ValueError(f"a {kind} tokenizer cannot be trimmed: it has no smaller pieces to write other text with")


def _special(tokenizer: PreTrainedTokenizerBase, content: dict) -> set[int]:
    """Ids of special tokens, of those around a text, and of all that are added where other tokens cannot spell them."""
    bytewise = "ByteLevel" in json.dumps([content["normalizer"], content["pre_tokenizer"]])
    spelled = bytewise or content["model"].get("byte_fallback")
    found = {*tokenizer.all_special_ids, *(t["id"] for t in content["added_tokens"] if t["special"] or not spelled)}
    _renumbered(content["post_processor"], lambda i: found.add(i) or i)
    return found


def _token_ids(model: PreTrainedModel) -> list[tuple[Any, str, Any]]:
    """`[(config, key, value), ...]` of all that names tokens in the configs of a model and of its generation.

    Raises ValueError for what names tokens beside other numbers.
    """
    parts = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs), model.generation_config]
    found = []
    for part in filter(None, parts):
        for key, value in vars(part).items():
            names = re.search(r"token_ids?$|token_index$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$", key)
            if value is None or not (names or key in ("sequence_bias", "forced_decoder_ids")):
                continue
            if not names or not _are_ids(value):
                raise ValueError(f"{key} of {type(part).__name__} is {value!r}, whose tokens trim cannot renumber")
            found.append((part, key, value))
    return found


def _are_ids(value: Any) -> bool:
    """Whether this is the id of a token, or lists of them."""
    return isinstance(value, int) or (isinstance(value, list | tuple) and all(map(_are_ids, value)))


def _flat(value: int | list) -> list[int]:
    return [value] if isinstance(value, int) else [token for item in value for token in _flat(item)]


def _of_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens of the text that a chat template writes itself, as far as its source says."""
    template = tokenizer.chat_template or ""
    template = "\n".join(template.values()) if isinstance(template, dict) else template
    outside = re.split(r"\{[{%#].*?[}%#]\}", template, flags=re.DOTALL)
    quoted = [a or b for a, b in re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", template)]
    quoted = [text.replace(r"\n", "\n") for text in quoted]
    words = ("system", "user", "assistant", "tool")
    return {t for text in (*outside, *quoted, *words) for t in tokenizer.encode(text, add_special_tokens=False)}


def _closed(content: dict, wanted: set[int]) -> list[int]:
    """Ids of the tokens to keep, in order: `wanted` and all that these and any other text are built from."""
    vocabulary, model = _vocabulary(content), content["model"]
    names = {i: token for token, i in vocabulary.items()}
    kept = {names[i] for i in wanted if i in names}
    alphabet = {t for t in vocabulary if len(t) == 1}
    if model.get("byte_fallback") and vocabulary.keys() >= BYTES:
        kept |= BYTES
        around = (content["normalizer"], content["pre_tokenizer"], content["decoder"])
        alphabet &= {c for token in (*kept, *_texts(around)) for c in token}  # a decoder must find the sign of a space
    kept |= alphabet
    if model["type"] == "BPE":
        if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
            raise ValueError("a BPE tokenizer that marks where words go on or end cannot be trimmed")
        ranks = {tuple(_pair(merge)): i for i, merge in enumerate(model["merges"])}
        for token in list(kept):
            kept |= _ancestors(token, ranks) & vocabulary.keys()
        if model.get("unk_token"):
            kept.add(model["unk_token"])
    else:  # what an unknown character costs follows from the least likely piece
        kept |= {min(model["vocab"], key=lambda item: item[1])[0]}
        if model.get("unk_id") is not None:
            kept.add(names[model["unk_id"]])
    added = {t["id"] for t in content["added_tokens"]}
    own = sorted(vocabulary[token] for token in kept if token in vocabulary)
    return own + sorted(i for i in wanted if i in added and i not in names)


def _texts(part: Any) -> list[str]:
    """All texts in a part of a tokenizer.json."""
    if isinstance(part, str):
        return [part]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
    return [text for item in parts for text in _texts(item)]


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _ancestors(token: str, ranks: dict[tuple[str, ...], int]) -> set[str]:
    """Every token that merging the characters of `token` passes through."""
    parts, found = list(token), set(token)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), len(ranks)))
        if (parts[best], parts[best + 1]) not in ranks:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
        found.add(parts[best])
    return found


def _tokenizer(tokenizer: PreTrainedTokenizerBase, content: dict, kept: list[int]) -> PreTrainedTokenizerBase:
    """The same kind of tokenizer over the tokens `kept`, in their order."""
    new, model = {old: i for i, old in enumerate(kept)}, content["model"]
    content = copy.deepcopy(content)
    vocabulary = {token: new[i] for token, i in _vocabulary(content).items() if i in new}
    if model["type"] == "BPE":
        merges = [m for m in model["merges"] if vocabulary.keys() >= {*_pair(m), "".join(_pair(m))}]
        content["model"] |= {"vocab": vocabulary, "merges": merges}
    else:
        content["model"]["vocab"] = [model["vocab"][i] for i in kept if i < len(model["vocab"])]
        content["model"]["unk_id"] = new.get(model.get("unk_id"))
    content["added_tokens"] = [t | {"id": new[t["id"]]} for t in content["added_tokens"] if t["id"] in new]
    content["post_processor"] = _renumbered(content["post_processor"], new.__getitem__)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        folder = Path(folder)
        config = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        if decoder := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {new[int(i)]: t for i, t in decoder.items() if int(i) in new}
        for file, values in zip(FILES, (content, config), strict=True):
            (folder / file).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        for file in folder.iterdir():
            if file.is_file() and file.name not in FILES and not file.name.startswith("chat_template"):
                file.unlink()  # an older form of the same tokens
        return AutoTokenizer.from_pretrained(folder)


def _renumbered(part: Any, renumber: Callable[[int], int]) -> Any:
    """A post-processor with new ids: of TemplateProcessing's `ids`, and of the pairs `[token, id]` that others hold."""
    if isinstance(part, dict):
        return {
            k: [renumber(i) for i in v] if k == "ids" and isinstance(v, list) else _renumbered(v, renumber)
            for k, v in part.items()
        }
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], renumber(part[1])]
        return [_renumbered(item, renumber) for item in part]
    return part


def _check_pieces(
    task: Task, tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, new: dict[int, int]
) -> None:
    """Raise ValueError unless every training example keeps its tokens; one that was cut has others, which may go."""
    texts = [e.prompt + e.response for e in task.train]
    both = (which(texts, add_special_tokens=False)["input_ids"] for which in (tokenizer, smaller))
    for text, old, found in zip(texts, *both, strict=True):
        if all(t in new for t in old) and [new[t] for t in old] != found:
            raise ValueError(f"this tokenizer cannot be trimmed: it would encode {text!r:.100} otherwise")


@torch.no_grad()
def _shrink(model: PreTrainedModel, kept: list[int], new: dict[int, int]) -> None:
    """Take rows `kept` of embedding and head, and give the configs the new ids."""
    rows = torch.tensor(kept)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = embedding.num_embeddings
    tables = [embedding.weight] if head.weight is embedding.weight else [embedding.weight, head.weight]
    if head.bias is not None:
        tables.append(head.bias)
    for table in tables:
        table.data[: len(rows)] = table.data[rows.to(table.device)]
    named = _token_ids(model)
    padding = embedding.padding_idx
    embedding.padding_idx = None
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    model.get_input_embeddings().padding_idx = new.get(padding)
    for part, key, value in named:
        setattr(part, key, _mapped(value, new, before))


def _mapped(value: int | list, new: dict[int, int], rows: int) -> int | list:
    """The new ids; one that had no row of so many still has none, and a negative one stays."""
    if isinstance(value, int):
        return new.get(value, value if value < 0 else value - rows + len(new))
    return [_mapped(item, new, rows) for item in value]
