"""Task accuracy and response likelihood through lm-eval, with intervals, item by item."""

import logging
import math

import numpy as np
from scipy import stats


def evaluate(model, tokenizer, task, limit=None, batch_size=64):
    """Score `model` on the first `limit` test examples of `task`: greedy generation and response NLL.

    Returns `accuracy` (value and 95 % Wilson interval; None if the task does not score answers), `nll` (nats per
    response token over the pooled tokens, end token not counted, with a 95 % bootstrap interval over items)
    and `items`, one dict per example, in test order, so that two results can be paired. Raises ValueError on a
    non-finite likelihood; items are never skipped.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("evaluation needs the eval extra: pip install 'basis-select[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    examples = task.test[:limit]
    side = tokenizer.padding_side
    try:
        out = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
            tasks=_lm_eval_tasks(task, examples),
            task_manager=TaskManager(include_defaults=False),  # else it reads thousands of task files first
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    finally:
        tokenizer.padding_side = side
    by_doc = {name: {sample["doc_id"]: sample for sample in samples} for name, samples in out["samples"].items()}
    items = []
    for i, example in enumerate(examples):
        nll, tokens = by_doc["response_nll"][i]["nll"]
        if not math.isfinite(nll):
            raise ValueError(f"test item {i} of {task.name} has a likelihood of {-nll}: the model is broken")
        item = {"prompt": example.prompt, "answer": example.answer, "nll": nll, "tokens": tokens}
        if task.score:
            sample = by_doc["response"][i]
            item |= {"generated": sample["resps"][0][0], "correct": bool(sample["correct"])}
        items.append(item)
    return {
        "task": task.name,
        "n": len(items),
        "accuracy": _wilson([item["correct"] for item in items]) if task.score else None,
        "nll": _pooled([item["nll"] for item in items], [item["tokens"] for item in items]),
        "items": items,
    }


def _lm_eval_tasks(task, examples):
    """lm-eval task configs over these examples: same prompts, same tokens as in training."""
    import datasets

    rows = [
        {
            "prompt": e.prompt,
            "response": e.response,
            "answer": e.answer or "",
            "tokens": len(e.input_ids) - e.start - 1,
        }
        for e in examples
    ]
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
        "process_results": lambda doc, results: {"nll": (-results[0][0], doc["tokens"])},
        "metric_list": [
            {
                "metric": "nll",
                "aggregation": lambda pairs: sum(n for n, _ in pairs) / sum(t for _, t in pairs),
                "higher_is_better": False,
            }
        ],
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
            "max_gen_toks": max(row["tokens"] for row in rows) + 8,
        },
        "process_results": lambda doc, results: {"correct": int(task.score(results[0], doc["answer"]))},
        "metric_list": [{"metric": "correct", "aggregation": "mean", "higher_is_better": True}],
    }
    return [generation, likelihood]


def _wilson(correct):
    interval = stats.binomtest(sum(correct), len(correct)).proportion_ci(method="wilson")
    return {"value": sum(correct) / len(correct), "low": float(interval.low), "high": float(interval.high)}


def _pooled(nll, tokens):
    nll, tokens = np.array(nll), np.array(tokens)
    interval = stats.bootstrap(
        (nll, tokens),
        lambda n, t, axis=-1: n.sum(axis) / t.sum(axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "value": float(nll.sum() / tokens.sum()),
        "low": float(interval.low),
        "high": float(interval.high),
    }


def compare(parent, result):
    """Pair two results of `evaluate` item by item: how many items were gained, lost, solved by both, by neither.

    `p` is McNemar's exact test that gains and losses are equally likely. Raises ValueError when the items differ.
    """
    if [i["prompt"] for i in parent["items"]] != [i["prompt"] for i in result["items"]]:
        raise ValueError("these two results were measured on different items and cannot be paired")
    pairs = [(a["correct"], b["correct"]) for a, b in zip(parent["items"], result["items"], strict=True)]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return {
        "both": pairs.count((True, True)),
        "gained": gained,
        "lost": lost,
        "neither": pairs.count((False, False)),
        "p": float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }
