"""Task accuracy and response likelihood through lm-eval, with intervals, item by item."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from ..data.encoding import Encoder
from ..data.tasks import Example, Task
from ..layers.rounded import multiplied_out
from ..training.data import require_fit
from ..training.precision import products

SEED = 1234  # what lm-eval's own command draws shots with
ROWS = 64  # of a batch, at most
MORE = 7  # tokens that a response may be longer than the longest reference
LOGITS = 2**28  # of a batch whose every token is scored, at most: under 2 GiB with their log-probabilities


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict:
    """Score `model` on the first `limit` test examples of `task`: greedy generation and response NLL.

    Both use the examples' own tokens: generation starts from those before the first that is trained, and ends at the
    end token or a text in `task.stops`. Without `batch_size` it follows from the longest example, not from the machine:
    results repeat to the last digit.
    Returns `accuracy` (value and 95 % Wilson interval; None if the task does not score answers), `nll` (nats per
    response token over the pooled tokens, end token not counted, with a 95 % bootstrap interval over items)
    and `items`, one dict per example, in test order, so that two results can be paired. Raises ValueError on a
    non-finite logit; items are never skipped.

        >>> found = bs.evaluate(parent, tokenizer, task)
        >>> found["n"], found["nll"]["low"] <= found["nll"]["value"] <= found["nll"]["high"]
        (8, True)
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} should be at least 1, or None for all test rows")
    require_fit(model, task)
    examples = task.test[:limit]
    longest = max(len(e.input_ids) for e in examples)
    fit = max(1, LOGITS // (longest * model.config.get_text_config().vocab_size))
    with harness(model, tokenizer, batch_size or min(ROWS, fit), task.name) as lm:
        bodies = [_body(e, tokenizer.eos_token_id) for e in examples]
        pairs = list(zip(examples, bodies, strict=True))
        found = lm._loglikelihood_tokens(
            [((e.prompt, e.response), list(e.input_ids[: e.start]), body) for e, body in pairs]
        )
        items = [
            {"prompt": e.prompt, "answer": e.answer, "nll": -log_p, "tokens": len(body) - e.spelled}
            for (e, body), (log_p, _) in zip(pairs, found, strict=True)
        ]
        if task.score:
            texts = generated(model, tokenizer, task, examples, batch_size or ROWS)
            for item, text in zip(items, texts, strict=True):
                item |= {"generated": text, "correct": task.score(text, item["answer"])}
    return {
        "task": task.name,
        "n": len(items),
        **summary(items),
        "items": items,
    }


def summary(items: Sequence[dict]) -> dict:
    """`accuracy` and `nll` of some items of `evaluate`."""
    return {
        "accuracy": wilson([item["correct"] for item in items]) if "correct" in items[0] else None,
        "nll": pooled([item["nll"] for item in items], [item["tokens"] for item in items]),
    }


def _body(example: Example, end: int | None) -> list[int]:
    """The response's tokens without the end token, unless it is all there is."""
    body = list(example.input_ids[example.start :])
    return body[:-1] if body[-1] == end and len(body) > 1 else body


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    rows: int = ROWS,
) -> list[str]:
    """The greedy response to each prompt, as text: without what ends it, and without what of the prompt is in it.

    rows: of a batch. A response has at most MORE tokens more than the longest that an example has.
    """
    most = max(len(e.input_ids) - e.start for e in examples) + MORE
    ends = end_tokens(model, tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    order = sorted(range(len(examples)), key=lambda i: -examples[i].start)
    texts = {}
    for at in range(0, len(order), rows):
        batch = [examples[i] for i in order[at : at + rows]]
        ids, real = padded([e.input_ids[: e.start] for e in batch], task.pad_id)
        width = ids.shape[1]
        with products(model):
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=real.to(model.device),
                max_new_tokens=min(most, max(1, (positions or width + most) - width)),
                do_sample=False,
                eos_token_id=sorted(ends),
                pad_token_id=task.pad_id,
                stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, task.stops, width)] if task.stops else []),
            )
        for i, example, tokens in zip(order[at : at + rows], batch, out[:, width:].tolist(), strict=True):
            text = _until(tokens, tokenizer, ends, task.stops)
            whole = tokenizer.decode(_body(example, tokenizer.eos_token_id), skip_special_tokens=True)
            if whole.endswith(example.response):
                text = text.removeprefix(whole.removesuffix(example.response))
            texts[i] = text
    return [texts[i] for i in range(len(examples))]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens after which a response has ended: the tokenizer's, and those of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}


def _until(tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: set[int], stops: Sequence[str]) -> str:
    """The text of `tokens` before the first end token or stop."""
    tokens = tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
    for stop in stops:  # a turn end may be a special token, which the text returned does not show
        if stop in tokenizer.decode(tokens):
            tokens = tokens[: next(n for n in range(len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return text


class _Stops(StoppingCriteria):
    """A row is done when one of `stops` is in what was generated for it, special tokens and all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], width: int):
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.last = 2 * max(len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.last :])
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, real)`, (B, L) each, of lists of tokens that end together: padded at their start."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    real = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        real[row, width - len(tokens) :] = 1
    return ids, real


def lm_eval() -> ModuleType:
    """The package. Raises ValueError that names the extra where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise ValueError("evaluation needs the eval extra: pip install 'basis-select[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@functools.cache
def _adapter() -> type:
    """lm-eval's model for transformers, with our way from text to tokens."""

    class Adapter(lm_eval().models.huggingface.HFLM):
        @functools.cached_property
        def encoder(self) -> Encoder:
            return Encoder(self.tokenizer)

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> list[int]:
            return self.encoder.text(string, add_special_tokens is False)[-(left_truncate_len or 0) :]

        def tok_batch_encode(
            self,
            strings: Sequence[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            return padded(rows, self.tokenizer.pad_token_id)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            ids, start = self.encoder.pair(context, continuation)
            return ids[:start], ids[start:]

    return Adapter


@contextmanager
def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, name: str, longest: int | None = None
) -> Iterator[Any]:
    """lm-eval's view of a model, while it measures a task called `name`.

    `longest` bounds the tokens of a request below what the model can take. Raises ValueError at the first logit that
    is not finite.
    """
    side = tokenizer.padding_side
    try:
        with multiplied_out(model), _finite_logits(model, name), products(model):
            yield _adapter()(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                device=str(model.device),
                max_length=longest,
                softmax_dtype="float32",  # of a bfloat16 model's logits
            )
    finally:
        tokenizer.padding_side = side


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    batch_size: int,
    name: str,
    longest: int | None = None,
    execute: bool = False,
    limit: int | None = None,
    samples: list[int] | None = None,
) -> tuple[Any, dict]:
    """`(lm, results)` of lm-eval on one of its tasks, within `harness`.

    `execute` lets tasks run model-written code; `samples` are the indices of its documents, all without.
    """
    package = lm_eval()
    with harness(model, tokenizer, batch_size, name, longest) as lm:
        # What its simple_evaluate does beside this takes longer than a small task: it asks pip for all packages.
        loaded = package.tasks.TaskManager(include_defaults=False).load([task])
        for one in loaded["tasks"].values():
            one.set_fewshot_seed(SEED)
        set_seed(SEED)
        out = package.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            samples=samples and {name: samples},
            bootstrap_iters=0,
            confirm_run_unsafe_code=execute,
        )
    return lm, out


@contextmanager
def _finite_logits(model: PreTrainedModel, name: str) -> Iterator[None]:
    def check(module: torch.nn.Module, args: tuple, logits: torch.Tensor) -> None:
        if not torch.isfinite(logits.sum(dtype=torch.float32)):
            count = int((~torch.isfinite(logits)).sum())
            if count:
                raise ValueError(
                    f"{count:,} of {logits.numel():,} logits of one batch of {name} are not finite: the model is broken"
                )

    hook = model.get_output_embeddings().register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def likelihood(sample: dict, counter: Encoder) -> dict:
    """`{nll, tokens}` of a sample of a likelihood task of lm-eval: nats of the response, and its tokens."""
    ids, start = counter.pair(*sample["arguments"][0])
    return {"nll": -sample["resps"][0][0][0], "tokens": len(ids) - start}


def wilson(correct: Sequence[bool]) -> dict[str, float]:
    """Share of true items, with its 95 % interval."""
    interval = stats.binomtest(sum(correct), len(correct)).proportion_ci(method="wilson")
    return {"value": sum(correct) / len(correct), "low": float(interval.low), "high": float(interval.high)}


def pooled(nll: Sequence[float], tokens: Sequence[int]) -> dict[str, float | None]:
    """NLL per token of all items together, with its 95 % bootstrap interval over items."""
    return bootstrap(lambda n, t, axis=-1: n.sum(axis) / t.sum(axis), nll, tokens)


def bootstrap(statistic: Callable, *columns: Sequence[float], paired: bool = True) -> dict[str, float | None]:
    """`statistic(*columns)` with its 95 % percentile interval when items are drawn anew; None where one item is all.

    Items are the rows of `columns`, or those of each column by itself unless they are `paired`.
    """
    columns = tuple(np.array(column, dtype=float) for column in columns)
    value, low, high = float(statistic(*columns)), None, None
    if min(map(len, columns)) > 1:
        interval = stats.bootstrap(
            columns, statistic, paired=paired, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"value": value, "low": low, "high": high}


def compare(parent: dict, result: dict) -> dict:
    """Pair two results item by item: how many items were gained, lost, solved by both, by neither.

    `p` is McNemar's exact test that gains and losses are equally likely; `nll` the difference of the NLL per token
    and `score` that of scores between 0 and 1 (result minus parent), with 95 % bootstrap intervals over items. Each
    is there if the task measures it.
    Raises ValueError when the items differ.

        >>> before = bs.evaluate(parent, tokenizer, task)
        >>> paired = bs.compare(before, bs.evaluate(parent, tokenizer, task))
        >>> paired["gained"], paired["lost"], paired["nll"]["value"]
        (0, 0, 0.0)
    """
    if list(map(_identity, parent["items"])) != list(map(_identity, result["items"])):
        raise ValueError("these two results were measured on different items and cannot be paired")
    pairs = list(zip(parent["items"], result["items"], strict=True))
    found = {}
    if "correct" in pairs[0][0]:
        solved = [(bool(a["correct"]), bool(b["correct"])) for a, b in pairs]
        gained, lost = solved.count((False, True)), solved.count((True, False))
        found |= {
            "both": solved.count((True, True)),
            "gained": gained,
            "lost": lost,
            "neither": solved.count((False, False)),
            "p": float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        }
    if "score" in pairs[0][0]:
        found["score"] = bootstrap(lambda d, axis=-1: d.mean(axis), [b["score"] - a["score"] for a, b in pairs])
    if "nll" in pairs[0][0]:
        columns = zip(*((a["nll"], a["tokens"], b["nll"], b["tokens"]) for a, b in pairs), strict=True)
        found["nll"] = bootstrap(
            lambda m, s, n, t, axis=-1: n.sum(axis) / t.sum(axis) - m.sum(axis) / s.sum(axis), *columns
        )
    return found


def _identity(item: dict) -> str:
    return item["prompt_sha256"] if "prompt_sha256" in item else item["prompt"]
