"""What the stages of a plan cost that do not train: cuts that are tried on the validation split, published checkpoints
and what is measured of them. And how fast the machine is.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import torch

from ..data.tasks import Task
from ..evaluation.accuracy import LOGITS, ROWS
from ..evaluation.speed import wait
from ..system.machine import fast_bf16
from ..system.processes import device
from ..target import BYTES
from .recipe import Recipe

EFFICIENCY = 0.45  # of the matmul rate measured here that a whole training step reaches: quickstart, 2 cores
TOGETHER = 0.5  # of that rate, what decoding many rows at once reaches
ALONE = 0.1  # and one row, which waits for weights
BISECTION = 12  # validation passes of prune.max_drop: five halvings, then seven steps to 1 %
TIMED = 6 * 32  # tokens that the timing of one checkpoint computes: prompt and response, six rounds


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one stage costs; `flops` of products, `memory` in bytes beside the libraries' own (0: less than others)."""

    steps: int | None = None
    tokens: int | None = None
    flops: float = 0
    seconds: float = 0
    memory: float = 0


@dataclasses.dataclass(frozen=True)
class Final:
    """A checkpoint that is published: `parameters`; those that `reads` every token and those of the output `head`."""

    parameters: float
    reads: float
    head: int
    vocabulary: int
    dtype: str

    @property
    def bytes(self) -> float:
        """In memory where it is measured: in its own dtype only where that computes natively."""
        native = self.dtype == "bfloat16" and fast_bf16(device())
        return self.parameters * (2 if native else 4)


def validations(r: Recipe, bases: int) -> int:
    """How often pruning computes the validation NLL at most; `bases` are the embedding's. Its own at the end counts."""
    if r.prune.max_drop is not None:
        return 2 + BISECTION
    if r.decompose.embedding and r.prune.keep_embedding is None:
        return 3 + min(12, 2 + int(math.log2(bases / r.prune.multiple_of)))
    return 1


def pruning(passes: int, task: Task, whole: float, final: Final, rates: dict[str, float]) -> Estimate:
    """The Estimate of `passes` over the validation split; whole: parameters with all bases, some copied."""
    tokens = passes * sum(len(e.input_ids) for e in task.validation)
    responses = passes * sum(len(e.input_ids) - e.start for e in task.validation)
    flops = 2 * tokens * final.reads + 2 * responses * final.head
    logits = sum(sorted(len(e.input_ids) - e.start for e in task.validation)[-16:]) * final.vocabulary
    memory = 4 * (whole + final.parameters) + 3 * 4 * logits
    return Estimate(None, tokens, flops, flops / rates["train"], memory)


def saving(final: Final) -> Estimate:
    """The Estimate of the stage that writes a checkpoint: loaded and read again in fp32, then cast."""
    return Estimate(memory=final.parameters * (8 + BYTES[final.dtype]))


def evaluating(task: Task, final: Final, rates: dict[str, float]) -> Estimate:
    """The Estimate of response likelihood and, where answers are scored, generation, of all test examples.

    Both are padded batches of examples in order of length. Likelihood forms the logits of every token and their
    log-probabilities, which is what takes memory; generation goes on until the longest response of a batch.
    """
    # Without the end token, which is not scored, and the last token that is, which is not read.
    lengths = sorted((len(e.input_ids) - 2 for e in task.test), reverse=True)
    rows = min(ROWS, max(1, LOGITS // (lengths[0] * final.vocabulary)))
    tokens = sum(len(batch) * batch[0] for batch in _batches(lengths, rows))
    flops = 2 * tokens * (final.reads + final.head)
    seconds = flops / rates["train"]
    if task.score:
        examples = sorted(task.test, key=lambda e: -e.start)
        for batch in _batches(examples, ROWS):
            decoded = len(batch) * max(len(e.input_ids) - e.start for e in batch)
            prompt, response = 2 * len(batch) * batch[0].start * final.reads, 2 * decoded * (final.reads + final.head)
            tokens += len(batch) * batch[0].start + decoded
            flops += prompt + response
            seconds += (prompt + response / TOGETHER) / rates["train"]
    logits = min(rows, len(lengths)) * lengths[0] * final.vocabulary
    return Estimate(None, tokens, flops, seconds, final.bytes + 2 * 4 * logits)


def _batches(items: Sequence, size: int) -> list:
    return [items[i : i + size] for i in range(0, len(items), size)]


def timing(finals: Sequence[Final], rates: dict[str, float]) -> Estimate:
    """The Estimate of timing all checkpoints in turn, which are in memory together, one row at a time."""
    flops = TIMED * sum(2 * (final.reads + final.head) for final in finals)
    seconds = flops / ALONE / rates["train"]
    return Estimate(None, TIMED * len(finals), flops, seconds, sum(final.bytes for final in finals))


def machine_rates() -> dict[str, float]:
    """FLOP/s reached here: training matmuls (bf16 where it is native), and float64 factorisations."""
    dtype = torch.bfloat16 if fast_bf16(device()) else torch.float32
    return {"train": EFFICIENCY * _matmul_rate(1024, dtype), "float64": EFFICIENCY * _matmul_rate(512, torch.float64)}


def _matmul_rate(n: int, dtype: torch.dtype) -> float:
    a = torch.randn(n, n, device=device()).to(dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        wait(a.device)
        best = min(best, time.perf_counter() - began)
    return 4 * 2 * n**3 / best
