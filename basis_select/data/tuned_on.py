"""What a model was tuned on, as hashes: so that no row is tested that was trained, whatever file it comes from.

A model carries it as `model.tuned_on`, a checkpoint as the file `tuned_on.json`, whose sha256 is recorded like that of
every other. Rows are compared by their prompts, letter case and white space aside. Beside them stand their passages of
WORDS words, numbers aside: a text that shares SHARE of its passages with others was most likely made from one of them.
With 8 and 0.3, 55 of GSM8K's 1,319 test questions are found in what reasoning_gym:gsm_symbolic makes of them, and 8 in
GSM8K's own training split, which do repeat it. It is a lower bound: with passages of 4 words, 77 are found.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

FILE = "tuned_on.json"
WORDS = 8  # of a passage
SHARE = 0.3
LEAST = 4  # passages of a text that can be told to be near another
COMMON = 0.01  # of a test's texts, above which a passage is its form


@dataclass(frozen=True)
class TunedOn:
    """Hashes, as sorted numpy arrays: `prompts` uint64, `passages` uint32."""

    prompts: np.ndarray
    passages: np.ndarray

    def __or__(self, other: "TunedOn") -> "TunedOn":
        return TunedOn(np.union1d(self.prompts, other.prompts), np.union1d(self.passages, other.passages))

    def trained(self, prompts: Iterable[str]) -> list[bool]:
        """Whether each of these texts is the prompt of a row that was trained on."""
        return np.isin(np.array([prompt_key(text) for text in prompts], np.uint64), self.prompts).tolist()

    def near(self, texts: Sequence[str]) -> list[bool]:
        """Whether each of these texts, all of one test, shares SHARE of its passages with rows trained on."""
        found = [passages(text) for text in texts]
        counts = Counter(passage for text in found for passage in text)
        common = {p for p, n in counts.items() if n > max(3, COMMON * len(texts))}
        own = [np.array(sorted(text - common), np.uint32) for text in found]
        return [len(p) >= LEAST and bool(np.isin(p, self.passages).mean() >= SHARE) for p in own]


def remember(model: nn.Module, *splits: Any) -> None:
    """Add the examples of `splits` to what `model` was tuned on."""
    texts = [example.prompt for split in splits for example in split]
    marks = {mark for text in texts for mark in passages(text)}
    new = TunedOn(np.unique(np.array([prompt_key(t) for t in texts], np.uint64)), np.array(sorted(marks), np.uint32))
    known = getattr(model, "tuned_on", None)
    model.tuned_on = new if known is None else known | new


def prompt_key(text: str) -> int:
    """What two prompts share that count as one."""
    return _hash(" ".join(text.lower().split()), 8)


def passages(text: str) -> set[int]:
    """The hashes of all passages of a text; of one that is shorter, its own."""
    words = re.findall(r"[^\W\d_]+|0", re.sub(r"\d[\d.,]*", "0", text.lower()))
    starts = range(max(1, len(words) - WORDS + 1))
    return {_hash(" ".join(words[i : i + WORDS]), 4) for i in starts}


def _hash(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def near(texts: Iterable[str], tests: Sequence[str]) -> list[bool]:
    """Whether each of `texts` holds SHARE of the passages of one of `tests`."""
    holders, lengths = {}, []
    for i, test in enumerate(tests):
        marks = passages(test)
        lengths.append(len(marks))
        for passage in marks:
            holders.setdefault(passage, []).append(i)
    found = []
    for text in texts:
        shared = Counter(i for passage in passages(text) for i in holders.get(passage, ()))
        found.append(any(n >= SHARE * lengths[i] and lengths[i] >= LEAST for i, n in shared.items()))
    return found


def write(model: nn.Module, folder: Path) -> None:
    """Write what `model` was tuned on beside its weights, if that is known."""
    if (known := getattr(model, "tuned_on", None)) is not None:
        fields = {name: base64.b64encode(getattr(known, name).tobytes()).decode() for name in ("prompts", "passages")}
        (folder / FILE).write_text(json.dumps(fields))


def read(model: nn.Module, folder: Path) -> None:
    """Give `model` what the checkpoint in `folder` says that it was tuned on. Raises ValueError, naming a bad file."""
    path = folder / FILE
    if not path.exists():
        return
    try:
        fields = json.loads(path.read_text())
        prompts, marks = (base64.b64decode(fields[name], validate=True) for name in ("prompts", "passages"))
        model.tuned_on = TunedOn(np.frombuffer(prompts, "<u8"), np.frombuffer(marks, "<u4"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold hashes of rows: {error}") from None
