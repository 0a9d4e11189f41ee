"""A task is data, a prompt and response template, and how an answer is scored."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from ..options import Count, checked
from .answers import SCORES, ScoreName
from .encoding import Encoder
from .sources import SPLITS, draw, read_generated, read_source
from .tuned_on import prompt_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str
    answer: str | None  # what a generated response must contain; None: only its likelihood is scored
    input_ids: tuple[int, ...]  # prompt, response and end token
    start: int  # index of the first token that is trained; generation is given those before it
    spelled: int = 0  # response tokens more than before the tokenizer was trimmed: NLL is per token of then


@dataclass(frozen=True)
class Task:
    """Encoded examples per split. `score(generated, answer) -> bool`, or None where answers are not scored."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    score: Callable[[str, str], bool] | None
    pad_id: int
    report: dict = field(default_factory=dict)  # what was dropped or cut, and why
    stops: tuple[str, ...] = ()  # texts that end a response beside the end token


@checked
def load_task(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    *,
    options: Annotated[
        dict | None,
        Field(description="Options of the source: `data_dir` of a set of the hub, those of a reasoning_gym family."),
    ] = None,
    prompt: Annotated[
        str | None, Field(description="A template over what a reasoning_gym row holds, as `What is {a} + {b}?`.")
    ] = None,
    score: Annotated[
        ScoreName | None,
        Field(description="How a response is scored, if not as the source does: all of it, or its last number."),
    ] = None,
    train: Annotated[Count, Field(description="Most examples of the training split.")] = 10000,
    validation: Annotated[Count, Field(description="Most examples of the validation split.")] = 200,
    test: Annotated[Count, Field(description="Most examples of the test split.")] = 200,
    max_length: Annotated[
        Count, Field(description="Tokens of the longest example: a longer prompt is dropped, a longer response cut.")
    ] = 512,
) -> Task:
    """Build a task for a tokenizer: prompts masked, every response closed by the end token or its template's turn end.

    source: a name in HUB (`options: {data_dir: FOLDER}` reads `SPLIT.jsonl` files instead of the hub), the path of
    a JSON or JSONL file of `{prompt, response}` or `{messages, tools}` rows, a folder that holds
    `train.jsonl`, `test.jsonl` and perhaps `validation.jsonl` of such rows, or
    `reasoning_gym:FAMILY` with `options` for the family and `prompt` a template over its metadata. `score`,
    "exact" or "number", replaces the source's own way. `train`, `validation` and `test` cap the splits: of a
    larger split, `seed` draws the rows that stay. No prompt occurs in two splits, and only in training may one occur
    more than once; prompts that differ only in letter case or white space count as the same.
    Examples longer than `max_length` tokens are cut at their end. What was dropped or cut is counted in `report`, never
    silently. Raises ValueError or FileNotFoundError naming the source, and for a row of a file the file and the row;
    also if the task's own responses do not score as right.

        >>> task = bs.load_task("data.jsonl", tokenizer, validation=8, test=8)
        >>> len(task.train), len(task.validation), len(task.test)
        (48, 8, 8)
    """
    source, options = str(source), options or {}
    sizes = {"train": train, "validation": validation, "test": test}
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r} should be a whole number")
    encoder = Encoder(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so no response could end: set its eos_token")
    rows, default, made = read_source(source, tokenizer, options, prompt, sizes, seed)
    read = {split: len(rows[split]) for split in SPLITS}
    rows, report = _disjoint(rows, sizes, seed, made)
    report |= {"truncated": 0, "dropped_too_long": 0}
    splits = {}
    for split in SPLITS:
        encoded = [_encode(row, encoder, max_length, report) for row in rows[split]]
        splits[split] = [e for e in encoded if e is not None]
    told = _told(report, max_length)
    for split, examples in splits.items():
        if not examples:
            found = ", ".join(f"{n:,} for {s}" for s, n in read.items())
            raise ValueError(
                f"the {split} split of {source} is empty: {told and told + '; '}of rows there were {found}"
            )
    if told:
        log.warning("%s: %s", source, told)
    log.info("%s: %s left out by the draw", source, report["not_drawn"])
    every = [row for split in SPLITS for row in rows[split]]
    scored = _scoring(source, every, SCORES.get(score, default))
    return Task(source, **splits, score=scored, pad_id=_pad(tokenizer), report=report, stops=_stops(every, tokenizer))


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _told(report: dict, max_length: int) -> str:
    """What `report` counts of cut, dropped and repeated rows, as a phrase."""
    reasons = {
        "truncated": f"examples were cut to max_length={max_length} tokens",
        "dropped_too_long": f"were dropped since their prompt alone fills max_length={max_length} tokens",
        "overlaps_dropped": "were dropped since their prompt is in another split",
        "repeats_dropped": "were dropped since their prompt came before in the same split",
        "repeats_in_train": "training rows repeat the prompt of another, and stay",
    }
    return ", ".join(f"{report[key]:,} {reason}" for key, reason in reasons.items() if report[key])


def _scoring(source: str, rows: list[dict], score: Callable | None) -> Callable | None:
    """How responses are scored: `score`, else the first of SCORES by which all rows are right. None without answers.

    Raises ValueError, with an example, if the rows' own responses do not score as right.
    """
    lacking = [row for row in rows if row["answer"] is None]
    if lacking and score:
        raise ValueError(f"{lacking[0].get('where', source)} has no answer to score: leave out the row, or `score`")
    if lacking:
        if len(lacking) < len(rows):
            log.warning("%s: %d of %d rows have no answer: accuracy is not measured", source, len(lacking), len(rows))
        return None
    wrong = {}
    for function in [score] if score else SCORES.values():
        wrong = [r for r in rows if not function(r["response"].removesuffix(r.get("turn_end", "")), r["answer"])]
        if not wrong:
            return function
    names = " or ".join(name for name, function in SCORES.items() if score in (None, function))
    where, response, answer = wrong[0].get("where"), wrong[0]["response"][-80:], wrong[0]["answer"][-80:]
    raise ValueError(
        f"{len(wrong):,} of the {len(rows):,} responses of {source} do not score as right by {names}"
        f"; {where or 'one'} has the answer {answer!r} and the response {response!r}: "
        "an answer should be the text of the whole response, or the number that the response ends in"
    )


def _stops(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that end a response of these rows, beside the end token: none that is in a response itself."""
    found = {row.get("turn_end", "").strip() for row in rows} | {row.get("next", "") for row in rows}
    found = {text for text in found if text and tokenizer.eos_token not in text}
    bodies = [row["response"].removesuffix(row.get("turn_end", "")) for row in rows]
    return tuple(sorted(text for text in found if not any(text in body for body in bodies)))


def counted_as(task: Task, original: Task) -> Task:
    """`task`, whose responses count as many tokens as in `original`: the same examples, before tokens were trimmed.

    Raises ValueError where one of them was left out, or one that is not trained on was cut: in other tokens a cut
    response is another text, whose likelihood says nothing of the first.
    """
    found, longest = {}, None
    if task.report.get("truncated"):
        longest = max(len(e.input_ids) for split in SPLITS for e in getattr(task, split))
    for split in SPLITS:
        ours, theirs = getattr(task, split), getattr(original, split)
        cut = split != "train" and any(len(e.input_ids) == longest for e in ours)
        if cut or [(e.prompt, e.response) for e in ours] != [(e.prompt, e.response) for e in theirs]:
            raise ValueError(
                f"{task.name}: the tokenizer was trimmed, and in its tokens some row of the {split} split does not fit "
                "into max_length: raise it (data.max_length in a recipe)"
            )
        found[split] = [
            replace(e, spelled=len(e.input_ids) - e.start - (len(o.input_ids) - o.start))
            for e, o in zip(ours, theirs, strict=True)
        ]
    return replace(task, **found)


def _encode(row: dict, encoder: Encoder, max_length: int, report: dict) -> Example | None:
    ids, start = encoder.pair(row["prompt"], row["response"], row.get("rendered", False))
    if start >= max_length:
        report["dropped_too_long"] += 1
        return None
    if start == len(ids):
        raise ValueError(
            f"{row.get('where', 'a row')}: the tokenizer has no token for the response {row['response']!r}"
        )
    ids = encoder.closed(ids, start, row.get("turn_end", ""))
    if len(ids) > max_length:
        report["truncated"] += 1
        ids = ids[:max_length]
    return Example(row["prompt"], row["response"], row["answer"], tuple(ids), start)


def _disjoint(
    rows: dict[str, list[dict]], sizes: dict[str, int], seed: int = 0, made: bool = False
) -> tuple[dict[str, list[dict]], dict]:
    """`(rows, report)`: no prompt in two splits, the test first, and each split as large as it may be, drawn by `seed`.

    Of rows that are `made` there are as many as one likes: the first are taken, and no prompt twice.
    """
    seen, kept = set(), {}
    report = {"overlaps_dropped": 0, "repeats_dropped": 0, "repeats_in_train": 0, "not_drawn": {}}
    for split in reversed(SPLITS):
        own, left = set(), []
        for row in rows[split]:
            key = prompt_key(row["prompt"])
            if key in seen:
                report["overlaps_dropped"] += 1
            elif key in own and (made or split != "train"):
                report["repeats_dropped"] += 1
            else:
                left.append(row)
                own.add(key)
        kept[split] = left[: sizes[split]] if made else draw(left, sizes[split], seed)[1]
        report["not_drawn"][split] = 0 if made else len(left) - len(kept[split])
        seen |= {prompt_key(row["prompt"]) for row in kept[split]}
    prompts = Counter(prompt_key(row["prompt"]) for row in kept["train"])
    report["repeats_in_train"] = prompts.total() - len(prompts)
    return kept, report


def generated(family: str, split: str, size: int, seed: int = 0) -> list[dict]:
    """The first `size` rows of which `load_task("reasoning_gym:FAMILY", seed=seed)` makes a split."""
    sizes = dict.fromkeys(SPLITS, 1) | {split: size}
    return _disjoint(read_generated(family, {}, None, sizes, seed)[0], sizes, made=True)[0][split]
