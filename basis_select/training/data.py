"""Batches of encoded examples: bucketed by length, padded to few shapes, in an order that is a pure function
of the seed, so that a resumed run sees what an undisturbed one would have seen.
"""

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.tasks import Example, Task

LENGTH_MULTIPLE = 16  # tokens; on CPUs every new matmul shape costs the library a freshly generated kernel
RESPONSE_MULTIPLE = 64
WINDOW = 16  # batches that are sorted by length together
AT_ONCE = {"cpu": 2**11}  # tokens of a batch, padding counted, that a device passes forward and backward together:
ELSEWHERE = 2**14  # more are no faster, and memory grows with them


def require_fit(model: PreTrainedModel, task: Task) -> None:
    """Raise ValueError if a row of `task` holds tokens or positions that `model` has no row for in its tables.

    A learned table of positions is told by its length: an embedding of `max_position_embeddings` rows, or a few more.
    """
    examples = [*task.train, *task.validation, *task.test]
    table = model.get_input_embeddings()
    highest, rows = max((max(e.input_ids) for e in examples), default=0), table.num_embeddings
    for what, token in (("a row has the token", highest), ("padding is the token", task.pad_id)):
        if token >= rows:
            raise ValueError(
                f"{task.name}: {what} {token} and the model's last token is {rows - 1}: "
                "take the model's own tokenizer or resize its embedding"
            )
    longest = max((len(e.input_ids) for e in examples), default=0)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    others = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not table]
    if longest > most and any(most <= n < most + 8 for n in others):
        raise ValueError(
            f"{task.name}: a row has {longest} tokens and the model has learned {most} positions: "
            f"cut rows with max_length={most}"
        )


class Batches:
    """`steps` collated batches; item i is what step i trains on, or of it the rows of one process of several.

    Each is a dict of `input_ids: (B, L)` right-padded, `real: (B, L)` bool (not padding), `positions: (n,)` the
    flat indices `b * L + t` whose logits predict response tokens, and `targets: (n,)` those tokens, padded
    with -100. Right padding needs no attention mask: under causal attention no real token sees it. `tokens` and
    `responses` count, whatever the process, all real tokens and all response tokens of the step.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        steps: int,
        seed: int,
        pad_id: int = 0,
        process: int = 0,
        processes: int = 1,
    ):
        if not examples:
            raise ValueError("there are no examples to make batches of")
        self.examples, self.batch_size, self.steps, self.seed, self.pad_id = (
            examples,
            batch_size,
            steps,
            seed,
            pad_id,
        )
        self.process, self.processes = process, processes
        self._epoch = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        return self.parts(step, None)[0]

    def parts(self, step: int, device: str | None) -> list[dict]:
        """The batch of a step in as few parts of equal size as `device` passes at once, those of all processes as many;
        None: in one. The losses and gradients of the parts sum up to those of the batch.
        """
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rows = [self.examples[i] for i in self.rows(step)]
        most, length = -(-len(rows) // self.processes), max(len(e.input_ids) for e in rows)
        size = most if device is None else rows_at_once(most, _round_up(length, LENGTH_MULTIPLE), device)
        own, empty = rows[self.process :: self.processes], [_without_response(rows[0])]
        count = {
            "tokens": sum(len(e.input_ids) for e in rows),
            "responses": sum(len(e.input_ids) - e.start for e in rows),
        }
        return [{**self.collate(own[i : i + size] or empty), **count} for i in range(0, most, size)]

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of a step, those of all processes."""
        per_epoch = -(-len(self.examples) // self.batch_size)
        return self._order(step // per_epoch)[step % per_epoch]

    def _order(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            rng = random.Random(f"{self.seed} {epoch}")
            order = rng.sample(range(len(self.examples)), len(self.examples))
            batches, size = [], self.batch_size
            for start in range(0, len(order), size * WINDOW):
                window = sorted(order[start : start + size * WINDOW], key=lambda i: len(self.examples[i].input_ids))
                batches += [window[i : i + size] for i in range(0, len(window), size)]
            rng.shuffle(batches)
            self._epoch = (epoch, batches)
        return self._epoch[1]

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        length = _round_up(max(len(e.input_ids) for e in examples), LENGTH_MULTIPLE)
        ids = torch.full((len(examples), length), self.pad_id)
        real = torch.zeros(len(examples), length, dtype=torch.bool)
        positions, targets = [], []
        for row, example in enumerate(examples):
            tokens = example.input_ids
            ids[row, : len(tokens)] = torch.tensor(tokens)
            real[row, : len(tokens)] = True
            positions += [row * length + t - 1 for t in range(example.start, len(tokens))]
            targets += tokens[example.start :]
        padding = _round_up(max(len(positions), 1), RESPONSE_MULTIPLE) - len(positions)
        return {
            "input_ids": ids,
            "real": real,
            "positions": torch.tensor(positions + [0] * padding),
            "targets": torch.tensor(targets + [-100] * padding),
        }


def rows_at_once(rows: int, length: int, device: str) -> int:
    """How many of so many rows of `length` tokens a device passes forward and backward together.

    >>> rows_at_once(24, 176, "cpu")
    8
    """
    at_once = max(1, AT_ONCE.get(device, ELSEWHERE) // length)
    return -(-rows // -(-rows // at_once))


def drawn(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` of the examples, drawn at random: those that moments and squared gradients look at."""
    return random.Random(0).sample(examples, min(count, len(examples)))


def _without_response(example: Example) -> Example:
    """What a process computes on when a batch has no row for it: nothing to learn, but the same graph as on others."""
    return dataclasses.replace(example, start=len(example.input_ids))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
