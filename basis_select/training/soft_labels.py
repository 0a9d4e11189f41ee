"""What the dense parent says of every example, computed once: its most likely tokens and their probabilities."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..data.tasks import Task
from ..system import processes
from ..system.progress import progress
from .data import Batches, require_fit
from .loss import likeliest
from .precision import CastOnce

EXAMPLES_TOGETHER = 16  # a batch of the parent's forward pass


@dataclass(frozen=True)
class SoftLabels:
    """A teacher: `log_p: (n, top)` and `tokens: (n, top)` of the n response tokens of all examples, one after another.

    first: for every example, named by what it reads and where its response starts, the place of its first token.
    """

    log_p: torch.Tensor
    tokens: torch.Tensor
    first: dict

    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """`(log_p, tokens)`, each (n, top), at `batch["positions"]`: what `task_loss` compares with."""
        length = batch["input_ids"].shape[1]
        counts = torch.bincount(
            batch["positions"][batch["targets"] >= 0] // length, minlength=len(batch["input_ids"])
        ).tolist()
        places = []
        for ids, real, n in zip(batch["input_ids"], batch["real"], counts, strict=True):
            if n:
                places += range(start := self._place(ids[real], n), start + n)
        places += [0] * (len(batch["positions"]) - len(places))  # padding: anything finite
        return self.log_p[places], self.tokens[places].long()

    def _place(self, ids: torch.Tensor, n: int) -> int:
        try:
            return self.first[_name(ids.tolist(), len(ids) - n)]
        except KeyError:
            raise ValueError(
                "a training example has no soft labels: they were made from other examples than those trained on"
            ) from None

    def save(self, folder: str | Path) -> None:
        """Write the part of this process into `folder`."""
        names = torch.frombuffer(bytearray(b"".join(self.first)), dtype=torch.uint8).view(len(self.first), -1)
        tensors = {"log_p": self.log_p, "tokens": self.tokens, "names": names}
        tensors["first"] = torch.tensor(list(self.first.values()))
        save_file(tensors, Path(folder) / f"soft_labels-{processes.index():04}.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> "SoftLabels":
        """Those that all processes have written into `folder`."""
        parts, first, rows = [], {}, 0
        for path in sorted(Path(folder).glob("soft_labels-*.safetensors")):
            parts.append(load_file(path))
            names = parts[-1]["names"].numpy()
            places = (parts[-1]["first"] + rows).tolist()
            first |= {name.tobytes(): place for name, place in zip(names, places, strict=True)}
            rows += len(parts[-1]["tokens"])
        if len(parts) == 1:  # as mapped, not copied
            return cls(parts[0]["log_p"], parts[0]["tokens"], first)
        return cls(torch.cat([p["log_p"] for p in parts]), torch.cat([p["tokens"] for p in parts]), first)


def _name(ids: list[int], start: int) -> bytes:
    return hashlib.blake2b(repr((ids, start)).encode(), digest_size=16).digest()


def seen(task: Task, batch_size: int, steps: int, seed: int) -> set[int]:
    """Indices of the training examples that `steps` batches hold."""
    batches = Batches(task.train, batch_size, steps, seed)
    steps = min(steps, -(-len(task.train) // batch_size))  # after an epoch there is nothing new
    return {i for step in range(steps) for i in batches.rows(step)}


Teacher = PreTrainedModel | SoftLabels


@torch.no_grad()
def soft_labels(teacher: PreTrainedModel, task: Task, top: int = 64) -> SoftLabels:
    """SoftLabels of `task.train`: the `top` most likely tokens of the model `teacher` at every response token.

    A pass over the examples takes the place of one for every batch, and the teacher need not be in memory while another
    model learns from them. The rest of the vocabulary counts as one more token, of the probability that is left. On
    several processes each returns those of its part of the examples: `save` them in one folder, and `load` all.

        >>> labels = bs.soft_labels(parent, task, top=8)
        >>> model = bs.prune(bs.decompose(copy.deepcopy(parent), task, examples=16), keep=0.5)
        >>> model = bs.heal(model, task, teacher=labels, steps=2, batch_size=4)
    """
    require_fit(teacher, task)
    size = EXAMPLES_TOGETHER
    teacher.eval().requires_grad_(False)
    top = min(top, teacher.get_input_embeddings().num_embeddings - 1)
    order = sorted(task.train, key=lambda e: len(e.input_ids))
    order += order[:1] * (-len(order) % processes.count())  # a sharded teacher needs all processes for every pass
    own = order[processes.index() :: processes.count()]
    collate = Batches(own, size, 1, 0, task.pad_id).collate
    log_p, tokens, first, rows, cast = [], [], {}, 0, CastOnce(teacher)
    for i in progress(range(0, len(own), size), "soft labels", "batch", quiet=processes.index() > 0):
        examples = own[i : i + size]
        batch = collate(examples)
        with cast:
            values, indices = likeliest(teacher, batch, top)
        real = batch["targets"] >= 0
        log_p.append(values.cpu()[real])
        tokens.append(indices.int().cpu()[real])
        for e in examples:
            first[_name(list(e.input_ids), e.start)] = rows
            rows += len(e.input_ids) - e.start
    return SoftLabels(torch.cat(log_p), torch.cat(tokens), first)
