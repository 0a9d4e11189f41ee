"""Task accuracy and response likelihood through lm-eval, with intervals, item by item."""

import logging
from contextlib import contextmanager

import numpy as np
import torch
from scipy import stats
from transformers import set_seed

from ..training.precision import products

SEED = 1234  # what lm-eval's own command draws shots with
ROWS = 64  # of a batch, at most
LOGITS = 2**28  # of a batch whose every token is scored, at most: under 2 GiB with their log-probabilities


def evaluate(model, tokenizer, task, limit=None, batch_size=None):
    """Score `model` on the first `limit` test examples of `task`: greedy generation and response NLL.

    Without `batch_size` it follows from the longest example, not from the machine: results repeat to the last digit.
    Returns `accuracy` (value and 95 % Wilson interval; None if the task does not score answers), `nll` (nats per
    response token over the pooled tokens, end token not counted, with a 95 % bootstrap interval over items)
    and `items`, one dict per example, in test order, so that two results can be paired. Raises ValueError on a
    non-finite logit; items are never skipped.
    """
    examples = task.test[:limit]
    longest = max(len(e.input_ids) for e in examples)
    fit = max(1, LOGITS // (longest * model.config.get_text_config().vocab_size))
    by_doc = {}
    for config, rows in zip(_lm_eval_tasks(task, examples), (min(ROWS, fit), ROWS), strict=False):
        lm, out = run(model, tokenizer, [config], batch_size or rows, task.name)
        by_doc |= {name: {sample["doc_id"]: sample for sample in samples} for name, samples in out["samples"].items()}
    items = []
    for i, example in enumerate(examples):
        item = {"prompt": example.prompt, "answer": example.answer, **likelihood(lm, by_doc["response_nll"][i])}
        if task.score:
            sample = by_doc["response"][i]
            item |= {"generated": sample["resps"][0][0], "correct": bool(sample["correct"])}
        items.append(item)
    return {
        "task": task.name,
        "n": len(items),
        "accuracy": wilson([item["correct"] for item in items]) if task.score else None,
        "nll": pooled([item["nll"] for item in items], [item["tokens"] for item in items]),
        "items": items,
    }


def lm_eval():
    """The package. Raises ValueError that names the extra where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise ValueError("evaluation needs the eval extra: pip install 'basis-select[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def run(model, tokenizer, tasks, batch_size, name, limit=None, longest=None, execute=False):
    """`(lm, results)` of lm-eval on its tasks or task configs.

    `longest` bounds the tokens of a request below what the model can take; `execute` lets tasks run model-written
    code. Raises ValueError, naming the task by `name`, at the first logit that is not finite.
    """
    package = lm_eval()
    side = tokenizer.padding_side
    try:
        with _finite_logits(model, name), products(model):
            lm = package.models.huggingface.HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                device=str(model.device),
                max_length=longest,
                softmax_dtype="float32",  # of a bfloat16 model's logits
            )
            # What its simple_evaluate does beside this takes longer than a small task: it asks pip for all packages.
            loaded = package.tasks.TaskManager(include_defaults=False).load(tasks)
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(SEED)
            set_seed(SEED)
            out = package.evaluate(
                lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=execute
            )
    finally:
        tokenizer.padding_side = side
    return lm, out


@contextmanager
def _finite_logits(model, name):
    def check(module, args, logits):
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


def likelihood(lm, sample):
    """`{nll, tokens}` of a sample of a likelihood task: nats of the response, and the tokens lm-eval scored for it."""
    context, response = sample["arguments"][0]
    bare = context.rstrip()  # lm-eval counts white space at the end of a prompt as the response's
    tokens = len(lm.tok_encode(context + response)) - len(lm.tok_encode(bare))
    return {"nll": -sample["resps"][0][0][0], "tokens": tokens}


def _lm_eval_tasks(task, examples):
    """lm-eval task configs over these examples: same prompts, same tokens as in training."""
    import datasets

    rows = [{"prompt": e.prompt, "response": e.response, "answer": e.answer or ""} for e in examples]
    longest = max(len(e.input_ids) - e.start for e in examples)
    shared = {
        "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)),
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{response}}",
        "target_delimiter": "",
        "num_fewshot": 0,
    }
    likelihood = {
        **shared,
        "task": "response_nll",
        "output_type": "loglikelihood",
        "process_results": lambda doc, results: {"nll": -results[0][0]},
        "metric_list": [{"metric": "nll", "aggregation": "mean", "higher_is_better": False}],
    }
    if not task.score:
        return [likelihood]
    generation = {
        **shared,
        "task": "response",
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": ["\nQuestion:"],
            "do_sample": False,
            "max_gen_toks": longest + 7,
        },
        "process_results": lambda doc, results: {"correct": int(task.score(results[0], doc["answer"]))},
        "metric_list": [{"metric": "correct", "aggregation": "mean", "higher_is_better": True}],
    }
    return [likelihood, generation]


def wilson(correct):
    """Share of true items, with its 95 % interval."""
    interval = stats.binomtest(sum(correct), len(correct)).proportion_ci(method="wilson")
    return {"value": sum(correct) / len(correct), "low": float(interval.low), "high": float(interval.high)}


def pooled(nll, tokens):
    """NLL per token of all items together, with its 95 % bootstrap interval over items."""
    return bootstrap(lambda n, t, axis=-1: n.sum(axis) / t.sum(axis), nll, tokens)


def bootstrap(statistic, *columns):
    """`statistic(*columns)` with its 95 % percentile interval when items, the rows of `columns`, are drawn anew."""
    columns = tuple(np.array(column, dtype=float) for column in columns)
    value, low, high = float(statistic(*columns)), None, None
    if len(columns[0]) > 1:
        interval = stats.bootstrap(
            columns, statistic, paired=True, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"value": value, "low": low, "high": high}


def compare(parent, result):
    """Pair two results item by item: how many items were gained, lost, solved by both, by neither.

    `p` is McNemar's exact test that gains and losses are equally likely; `nll` the difference of the NLL per token
    and `score` that of scores between 0 and 1 (result minus parent), with 95 % bootstrap intervals over items. Each
    is there if the task measures it.
    Raises ValueError when the items differ.
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


def _identity(item):
    return item["prompt_sha256"] if "prompt_sha256" in item else item["prompt"]
