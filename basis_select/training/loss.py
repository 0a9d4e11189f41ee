"""The losses, on response tokens only."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data.tasks import Example
from .data import Batches
from .precision import autocast


@contextmanager
def _head_reads(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """The output head sees only these flat token positions: no logits are formed for prompts and padding.

    Done at the head's input, so scalings and soft caps that a model applies to its logits still apply.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].flatten(0, -2)[positions],)
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def frozen(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Within it no parameter of `model` requires a gradient but those that are `trained`."""
    flags = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


class _Start(torch.autograd.Function):
    """The same tensor, of which a graph starts: no leaf, so that a model may go on to change it in place."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@contextmanager
def activation_gradients(model: PreTrainedModel, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Backward passes reach activations only: no gradient of a weight is formed.

    The graph starts at the outputs of `modules`, by default of the embedding: what lies before them costs no backward.
    """
    training = model.training
    model.eval()
    starts = [model.get_input_embeddings()] if modules is None else modules
    anchor = torch.zeros((), requires_grad=True)

    def start(module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
        return y if y.requires_grad or not torch.is_grad_enabled() else _Start.apply(y, anchor)

    # Ahead of hooks that are there already, so that they find an output with a gradient.
    hooks = [m.register_forward_hook(start, prepend=True) for m in starts]
    try:
        with frozen(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def response_logits(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Logits (n, vocabulary) at `batch["positions"]`."""
    with _head_reads(model, batch["positions"].to(model.device)):
        return model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits


@torch.no_grad()
def log_probabilities(teacher: PreTrainedModel, batch: dict) -> torch.Tensor:
    """What `task_loss` compares with: log-probabilities (n, vocabulary) at `batch["positions"]`, fp32."""
    with autocast(teacher):
        return response_logits(teacher, batch).float().log_softmax(-1)


def task_loss(
    model: PreTrainedModel,
    batch: dict,
    teacher: PreTrainedModel | Callable | None = None,
    kl: float = 1.0,
    mixed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean over response tokens of `CE(y) + kl * KL(teacher || model)`, and both parts: three scalars, in nats.

    `teacher` is a model or a function of a batch that returns `log_probabilities` or, as SoftLabels, those of some
    tokens; without one the second part is zero. `mixed=False` computes an fp32 model in fp32. The rows of one process
    give its share of the mean over the batch.
    """
    targets = batch["targets"].to(model.device)
    real = targets >= 0  # masked, not indexed: shapes then do not depend on data
    with autocast(model) if mixed else nullcontext():
        logits = response_logits(model, batch)
    log_q = logits.float().log_softmax(-1)
    ce = F.nll_loss(log_q, targets, reduction="sum") / batch["responses"]
    if teacher is None or kl == 0:
        return ce, ce, torch.zeros_like(ce)
    said = log_probabilities(teacher, batch) if isinstance(teacher, nn.Module) else teacher(batch)
    if isinstance(said, tuple):
        each = _divergence_of_some(log_q, *(x.to(log_q.device) for x in said))
    else:
        each = F.kl_div(log_q, said, log_target=True, reduction="none").sum(-1)
    divergence = (each * real).sum() / batch["responses"]
    return ce + kl * divergence, ce, divergence


def _divergence_of_some(log_q: torch.Tensor, log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """KL(p || q) (n,) of `log_p: (n, top)` at `tokens: (n, top)`, all other tokens of `log_q` taken as one."""
    others = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)  # not 1 - the sum, which cancels where q is sure
    p = log_p.exp()
    left = (1 - p.sum(-1)).clamp(min=0)
    return (p * (log_p - log_q.gather(-1, tokens))).sum(-1) + torch.xlogy(left, left) - left * others


@torch.no_grad()
def response_nlls(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int = 0, batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(nll, tokens)`, (n,) each in order of `examples`: summed negative log-likelihood of the response, in nats,
    and its number of tokens, the end token counted, before the tokenizer was trimmed.
    """
    nll, tokens = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.long)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    batches = Batches(examples, batch_size, 1, 0, pad_id)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = batches.collate([examples[i] for i in rows])
        real = batch["targets"] >= 0
        with autocast(model):
            logits = response_logits(model, batch)
        losses = F.cross_entropy(logits.float(), batch["targets"].to(model.device), reduction="none").cpu().double()
        owner = torch.tensor(rows)[batch["positions"] // batch["input_ids"].shape[1]]
        nll.index_add_(0, owner[real], losses[real])
        tokens.index_add_(0, owner[real], torch.ones(int(real.sum()), dtype=torch.long))
    return nll, tokens - torch.tensor([example.spelled for example in examples])


def response_nll(model: PreTrainedModel, examples: Sequence[Example], pad_id: int = 0, batch_size: int = 16) -> float:
    """Mean negative log-likelihood per response token of `examples`, end token counted, in nats."""
    nll, tokens = response_nlls(model, examples, pad_id, batch_size)
    return float(nll.sum() / tokens.sum())
