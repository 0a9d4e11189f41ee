"""Decode speed, measured so that the numbers can be compared: models take turns in one process."""

import statistics
import time

import torch


@torch.no_grad()
def decode_speed(models, tokens=16, rounds=5):
    """Median tokens per second of greedy decoding at batch 1 after a 16-token prompt, for `{name: model}`.

    Each round times every model once, in turn; the first round warms up and is not counted. Returns
    `{name: {"median", "low", "high"}}`.
    """
    rates = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            rates[name].append(tokens / _decode_seconds(model, tokens))
    return {
        name: {"median": statistics.median(r[1:]), "low": min(r[1:]), "high": max(r[1:])} for name, r in rates.items()
    }


def _decode_seconds(model, tokens):
    ids = torch.arange(10, 26, device=model.device)[None]
    out = model(input_ids=ids, use_cache=True)
    began = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
