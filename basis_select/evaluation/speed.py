"""Times, measured so that they can be compared: what is compared takes turns in one process."""

import functools
import inspect
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from ..checkpoint.checks import is_rounded
from ..checkpoint.models import load
from ..system.machine import compile_options, fast_bf16


def load_fastest(source: str, device: torch.device | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`(model, tokenizer)` on a device, in bfloat16 where that is native there, else in fp32.

    What is rounded is loaded as it is stored: its kernels are for bfloat16, even where the device has no such units.
    """
    device = torch.device(device)
    wide = "bfloat16" if fast_bf16(device) else "float32"
    model, tokenizer = load(source, None if Path(source).is_dir() and is_rounded(source) else wide)
    return model.to(device), tokenizer


def take_turns(
    runs: Mapping[Any, Callable[[], Callable]], rounds: int, pause: float = 0.0, device: torch.device | None = None
) -> dict[Any, list[float]]:
    """`{name: [seconds, ...]}` of `{name: prepare}`, where `prepare()` gives the function that is timed.

    Each round calls every one of them once, in turn; one round before them warms up and is not counted. `pause`:
    seconds of rest before every call, against throttling. Where `device` is a GPU its work is waited for.
    """
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, prepare in runs.items():
            run = prepare()
            time.sleep(pause)
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: found[1:] for name, found in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def decode_speed(
    models: Mapping[str, PreTrainedModel], tokens: int = 16, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Median tokens per second of greedy decoding at batch 1 after a 16-token prompt, for `{name: model}`.

    Returns `{name: {"median", "low", "high"}}`.
    """
    runs = {name: Generation(model, 16, tokens).to_decode for name, model in models.items()}
    times = take_turns(runs, rounds, device=next(iter(models.values())).device)
    return {name: spread([tokens / s for s in found]) for name, found in times.items()}


class Generation:
    """Greedy generation at batch 1, in the two parts that are timed apart: the first token, and those after it.

    prompt: tokens read; tokens: how many are generated after the first. Where `compiled`, both parts are one graph
    each over a cache of fixed size, without torch.compile's checks that the model is still the one it compiled: each
    graph is called only here, with one model and one shape.
    """

    def __init__(self, model: PreTrainedModel, prompt: int, tokens: int, compiled: bool = False):
        self.model, self.tokens, self.compiled = model, tokens, compiled
        self.ids = (torch.arange(prompt, device=model.device) % (model.get_input_embeddings().num_embeddings - 1))[None]
        takes = inspect.signature(model.forward).parameters  # it swallows what it does not know
        self.named = "cache" if "cache" in takes else "past_key_values"
        self.fixed, self.read = None, self._next
        if compiled:
            self.fixed = StaticCache(model.config, max_cache_len=prompt + tokens)
            with torch.no_grad():
                self._next(self.ids, self.fixed)  # allocates the cache outside the graphs
            self.read = _compiled(self._next, self.model.device)

    @functools.cached_property
    @torch.no_grad()
    def step(self) -> Callable:
        """The function that decodes one token."""
        if not self.compiled:
            return self._next
        step = _compiled(self._next, self.model.device)
        step(self.ids[:, :1], self.fixed)
        return step

    def to_prefill(self) -> Callable:
        """The function that computes the first token, its cache empty."""
        return functools.partial(self.first, self.empty_cache())

    def to_decode(self) -> Callable:
        """The function that decodes the tokens after the first."""
        step = self.step  # compiled before the cache is filled
        cache = self.empty_cache()
        return functools.partial(self.rest, step, self.first(cache), cache)

    def empty_cache(self) -> Cache:
        if not self.compiled:
            return DynamicCache(config=self.model.config)
        self.fixed.reset()
        return self.fixed

    @torch.no_grad()
    def first(self, cache: Cache) -> torch.Tensor:
        return self.read(self.ids, cache)

    @torch.no_grad()
    def rest(self, step: Callable, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        for _ in range(self.tokens):
            token = step(token, cache)
        return token

    def _next(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self.named: cache})
        return out.logits.argmax(-1)


def _compiled(function: Callable, device: torch.device) -> Callable:
    """`function` as one graph for one shape."""

    def alone(*args: Any) -> Any:
        return function(*args)

    # torch.compile keeps its graphs by code object: with one of its own, no other model's are tried before it.
    alone.__code__ = alone.__code__.replace()
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe} | compile_options(device)
    return torch.compile(alone, dynamic=False, fullgraph=True, options=options)


def timed_on(device: torch.device, dtype: torch.dtype) -> dict:
    """What a time depends on beside the model: device, threads, dtype, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in ("basis-select", "torch", "transformers")},
    }


def wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
