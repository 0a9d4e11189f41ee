"""What running a model costs, beside the least it could: first token, each later token, memory, where the time goes.

The floor of a first token is the FLOPs of its products, that of a decoded token the bytes it cannot do without: every
weight and the whole cache are read once. At best a model is as many times faster than another as those are fewer.
Protocol: arXiv 2409.15790, section 4 (batch 1, greedy, pauses against throttling).
"""

import collections
import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from ..checkpoint.fast import ready
from ..layers.low_rank import LowRankLinear
from ..layers.rounded import RoundedLinear
from ..refine import blocks
from ..training.cost import forward_pass
from .speed import Generation, spread, take_turns, timed_on, wait

PARTS = ("attention", "feed-forward", "head", "embedding", "norms and rest")


def bench(
    models: dict[str, PreTrainedModel],
    *,
    prompts: Sequence[int] = (32, 128, 512),
    tokens: int = 16,
    rounds: int = 5,
    fast: bool = True,
    pause: float = 0.0,
) -> dict:
    """Measure `{name: model}`, in turn, each against the first; returns a dict of facts that JSON can hold.

    prompts: lengths for which the time to the first token is taken; `tokens` are decoded after the shortest. `fast`
    measures beside eager execution what `load(fast=True)` makes of a model, of a copy, and compiles both parts; pause:
    seconds of rest before each measurement. Times are in seconds, the median with the lowest and highest of `rounds`,
    memory in bytes. Raises ValueError for lengths that cannot be measured.

        >>> found = bs.bench({"parent": parent}, prompts=(8,), tokens=2, rounds=1, fast=False)
        >>> [(row["what"], row["times_faster"]) for row in found["rows"]]
        [('first token of 8', 1.0), ('decode', 1.0)]
    """
    if min(*prompts, tokens, rounds) < 1:
        raise ValueError("a prompt, its answer and the rounds of a measurement should each be at least 1")
    for name, model in models.items():
        most, longest = getattr(model.config, "max_position_embeddings", None), max(prompts) + tokens
        if most is not None and longest > most:
            raise ValueError(f"{name} reads at most {most} tokens, a prompt with its answer would be {longest}")
    first = next(iter(models.values()))
    short, long = min(prompts), max(prompts)
    forms = {"eager": models}
    if fast:
        forms["fast"] = {name: ready(copy.deepcopy(model), compiled=False) for name, model in models.items()}
    generations = {
        (n, name, way): Generation(forms[way][name], n, tokens, way == "fast")
        for n in prompts
        for name in models
        for way in forms
    }
    runs = {(n, name, way): g.to_prefill for (n, name, way), g in generations.items()}
    runs |= {("decode", name, way): generations[short, name, way].to_decode for name in models for way in forms}
    seconds = take_turns(runs, rounds, pause, first.device)
    floors = {name: _floors(model, prompts, generations[short, name, "eager"]) for name, model in models.items()}
    facts = {**timed_on(first.device, first.dtype), "tokens": tokens, "rounds": rounds, "pause": pause}
    facts["rows"] = [_row(*key, seconds, floors, tokens) for key in runs]
    facts["memory"] = {name: _memory(model, generations[long, name, "eager"]) for name, model in models.items()}
    facts["parts"], facts["operators"] = [], []
    for name, model in models.items():
        for what, n, prepare in ((f"first token of {long}", long, "to_prefill"), ("decode", short, "to_decode")):
            key = {"what": what, "model": name}
            shares = part_shares(model, getattr(generations[n, name, "eager"], prepare), rounds)
            facts["parts"].append({**key, "shares": shares})
            for way in forms:
                run = getattr(generations[n, name, way], prepare)()
                facts["operators"].append({**key, "way": way, "shares": operator_shares(run, model.device)})
    return facts


def _row(what: str | int, name: str, way: str, seconds: dict, floors: dict[str, dict], tokens: int) -> dict:
    """One measurement beside its floor and those of the first model."""
    base = next(iter(floors))
    steps = tokens if what == "decode" else 1
    times = spread([s / steps for s in seconds[what, name, way]])
    faster = spread([s / steps for s in seconds[what, base, way]])["median"] / times["median"]
    ideal = floors[base][what] / floors[name][what]
    return {
        "what": what if what == "decode" else f"first token of {what}",
        "model": name,
        "way": way,
        "seconds": times,
        "floor": floors[name][what],
        "unit": "B" if what == "decode" else "FLOP",
        "times_faster": faster,
        "ideal": ideal,
        "share_of_ideal": faster / ideal,
    }


def _floors(model: PreTrainedModel, prompts: Sequence[int], generation: Generation) -> dict:
    """`{prompt length: FLOPs of its first token, "decode": bytes read for a token}`."""
    found = {}
    for n in prompts:
        ids = torch.zeros(1, n, dtype=torch.long, device=model.device)
        cost = forward_pass(model, input_ids=ids, use_cache=True, logits_to_keep=1)
        found[n] = cost.flops + cost.head_flops
    return found | {"decode": weights_read(model) + _cache_bytes(generation)}


def weights_read(model: PreTrainedModel) -> int:
    """Bytes of the weights that every token needs: all but an embedding of which only rows are looked up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = getattr(embedding, "bases", embedding)
    looked_up = next(getattr(table, "u", table).parameters())
    untied = not any(p is looked_up for p in head.parameters())
    return sum(p.nbytes for p in model.parameters()) - untied * looked_up.nbytes


def _cache_bytes(generation: Generation) -> int:
    """Bytes of keys and values, or other states, at the end of a generation."""
    run = generation.to_decode()
    run()
    cache = run.args[-1]
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if torch.is_tensor(x))


def _memory(model: PreTrainedModel, generation: Generation) -> dict[str, int]:
    """Bytes of weights, buffers and the cache at the longest; activations: the most that reading the prompt adds."""
    passing = forward_pass(model, input_ids=generation.ids, use_cache=True, logits_to_keep=1).passing
    cache = _cache_bytes(generation)
    read = generation.ids.shape[1]
    return {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "cache": cache,
        "buffers": sum(b.nbytes for b in model.buffers()),
        "activations": round(passing - cache * read / (read + generation.tokens)),
    }


def part_shares(model: PreTrainedModel, prepare: Callable[[], Callable], rounds: int) -> dict[str, float]:
    """`{part: share of the time}` of what `prepare()` gives, run eagerly, by hooks on the modules of each part.

    In a decoder block the children that take a mask or a cache are attention, others with linear layers feed-forward.
    """
    parts = {model.get_input_embeddings(): "embedding", model.get_output_embeddings(): "head"}
    for block in blocks(model):
        for child in block.children():
            if any(isinstance(m, nn.Linear | LowRankLinear | RoundedLinear) for m in child.modules()):
                takes = inspect.signature(child.forward).parameters
                mixes = any("mask" in name or "cache" in name for name in takes)
                parts[child] = "attention" if mixes else "feed-forward"
    spent, began, total = collections.Counter(), {}, 0.0

    def before(module: nn.Module, args: tuple) -> None:
        wait(model.device)
        began[module] = time.perf_counter()

    def after(module: nn.Module, args: tuple, out: Any) -> None:
        wait(model.device)
        spent[parts[module]] += time.perf_counter() - began[module]

    for _ in range(rounds):
        run = prepare()
        with contextlib.ExitStack() as hooks:
            for module in parts:
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            start = time.perf_counter()
            run()
            wait(model.device)
            total += time.perf_counter() - start
    spent["norms and rest"] = total - sum(spent.values())
    return {part: spent[part] / total for part in PARTS}


def operator_shares(run: Callable[[], object], device: torch.device, most: int = 6) -> dict[str, float]:
    """`{operator: share of the time}` of the `most` costly ones by torch's profiler, and of all "others"."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        run()
    spent = collections.Counter()
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:  # a kernel's time is counted with the operator that started it
            # All kernels that torch.compile wrote for a CPU, and what calls them, are one event named by a hash.
            name = "compiled graph" if "CompiledFxGraph" in event.key else event.key
            spent[name] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = spent.total()
    shares = {name: time / total for name, time in spent.most_common(most)}
    return shares | {"others": 1 - sum(shares.values())}


def table(facts: dict) -> str:
    """The facts of `bench` as Markdown: times beside their floors, memory, and where the time goes."""
    lines = ["| | model | way | ms, median (range) | floor | reached | times faster | ideal | share of ideal |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for r in facts["rows"]:
        s = r["seconds"]
        ms = f"{s['median'] * 1e3:.1f} ({s['low'] * 1e3:.1f} to {s['high'] * 1e3:.1f})"
        scale, unit = (1e6, "MB") if r["unit"] == "B" else (1e9, "GFLOP")
        floor = f"{r['floor'] / scale:.1f} {unit} | {r['floor'] / s['median'] / 1e9:.1f} G{r['unit']}/s"
        compared = f"{r['times_faster']:.2f} | {r['ideal']:.2f} | {r['share_of_ideal']:.0%}"
        lines.append(f"| {r['what']} | {r['model']} | {r['way']} | {ms} | {floor} | {compared} |")
    lines += ["", "| model | parameters | cache | buffers | activations |", "|---|---:|---:|---:|---:|"]
    for name, memory in facts["memory"].items():
        lines.append(f"| {name} | {' | '.join(f'{b / 1e6:.1f} MB' for b in memory.values())} |")
    lines += ["", f"| eager | model | {' | '.join(PARTS)} |", f"|---|---|{'---:|' * len(PARTS)}"]
    for r in facts["parts"]:
        lines.append(f"| {r['what']} | {r['model']} | {' | '.join(f'{s:.0%}' for s in r['shares'].values())} |")
    lines += ["", "| | model | way | operators |", "|---|---|---|---|"]
    for r in facts["operators"]:
        shares = ", ".join(f"{name.removeprefix('aten::')} {s:.0%}" for name, s in r["shares"].items())
        lines.append(f"| {r['what']} | {r['model']} | {r['way']} | {shares} |")
    return "\n".join(lines) + "\n"
