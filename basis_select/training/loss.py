"""The losses, on response tokens only."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..data.tasks import Example
from .data import Batches
from .precision import CastOnce, autocast

AT_ONCE = 2**22  # elements of (tokens, vocabulary) that are computed with in fp32 at once
Losses = Callable[[torch.Tensor, slice], Sequence[torch.Tensor]]


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


def pieces(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of `logits: (n, vocabulary)`, each of at most AT_ONCE elements or of one row."""
    rows = max(1, AT_ONCE // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def overwritable(logits: torch.Tensor) -> torch.Tensor:
    """Memory of the size of `logits`, with the same values: its own, unless its graph needs what stands there."""
    kept = logits._is_view() or getattr(logits.grad_fn, "_saved_result", None) is not None
    return logits.detach().clone() if kept else logits.detach()


def by_rows(logits: torch.Tensor, losses: Losses) -> Sequence[torch.Tensor]:
    """The sums of `losses(rows of logits in fp32, their slice)`, scalars, some rows at a time.

    The first of them has a gradient, which is found with it and takes the place of the logits where it can: of size
    (n, vocabulary) there is one tensor, and the logits are not to be read afterwards.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _ByRows.apply(logits, losses)
    return _sums(losses(logits[rows].float(), rows) for rows in pieces(logits))


def _sums(found: Iterable[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Sums of scalars. No more is kept: with a number behind every piece the heap could not reuse what pieces took."""
    total = 0
    for values in found:
        total += torch.stack([x.detach() for x in values])
    return tuple(x.clone() for x in total)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, losses: Losses) -> tuple[torch.Tensor, ...]:
        gradient = overwritable(logits)

        @torch.enable_grad()
        def both(rows: slice) -> Sequence[torch.Tensor]:
            part = logits[rows].detach().float().requires_grad_()
            values = losses(part, rows)
            (gradient[rows],) = torch.autograd.grad(values[0], part)
            return values

        sums = _sums(map(both, pieces(logits)))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None


@torch.no_grad()
def likeliest(teacher: PreTrainedModel, batch: dict, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` largest log-probabilities at `batch["positions"]`, in fp32, and their tokens: (n, top) each."""
    with autocast(teacher):
        logits = response_logits(teacher, batch)
    log_p, tokens = logits.new_empty(len(logits), top, dtype=torch.float32), logits.new_empty(len(logits), top).long()
    for rows in pieces(logits):
        log_p[rows], tokens[rows] = logits[rows].float().log_softmax(-1).topk(top)
    return log_p, tokens


def task_loss(
    model: PreTrainedModel,
    batch: dict,
    teacher: PreTrainedModel | Callable | None = None,
    kl: float = 1.0,
    mixed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean over response tokens of `CE(y) + kl * KL(teacher || model)`, and both parts: three scalars, in nats.

    `teacher` is a model or a function of a batch that returns the log-probabilities (n, vocabulary) at its positions
    or, as SoftLabels, those of some tokens; without one the second part is zero. `mixed=False` computes an fp32 model
    in fp32. The rows of one process give its share of the mean over the batch.
    """
    targets = batch["targets"].to(model.device)
    with autocast(model) if mixed else nullcontext():
        logits = response_logits(model, batch)
    says = None if teacher is None or kl == 0 else _sayings(teacher, batch)

    def losses(part: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        log_q = part.log_softmax(-1)
        ce = F.nll_loss(log_q, targets[rows], reduction="sum") / batch["responses"]
        if says is None:
            return ce, ce, torch.zeros_like(ce)
        each = _divergence(log_q, *(x.to(log_q.device) for x in says(rows)))
        real = targets[rows] >= 0  # masked, not indexed: shapes then do not depend on data
        divergence = (each * real).sum() / batch["responses"]
        return ce + kl * divergence, ce, divergence

    return by_rows(logits, losses)


def _sayings(teacher: PreTrainedModel | Callable, batch: dict) -> Callable[[slice], tuple[torch.Tensor, ...]]:
    """What a teacher says of the rows in a slice: their `(log_p,)`, or `(log_p, tokens)` of some tokens."""
    if isinstance(teacher, nn.Module):
        with torch.no_grad(), autocast(teacher):
            logits = response_logits(teacher, batch)
        return lambda rows: (logits[rows].float().log_softmax(-1),)
    said = teacher(batch)
    said = said if isinstance(said, tuple) else (said,)
    return lambda rows: tuple(x[rows] for x in said)


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """KL(p || q) (n,) of the whole vocabulary, or of `tokens` and all others."""
    if tokens is None:
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return _divergence_of_some(log_q, log_p, tokens)


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
    batches, cast = Batches(examples, batch_size, 1, 0, pad_id), CastOnce(model)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = batches.collate([examples[i] for i in rows])
        real = batch["targets"] >= 0
        targets = batch["targets"].to(model.device)
        with cast, autocast(model):
            logits = response_logits(model, batch)
        losses = torch.empty(len(targets), dtype=torch.float64)
        for i in pieces(logits):
            losses[i] = F.cross_entropy(logits[i].float(), targets[i], reduction="none").cpu().double()
        owner = torch.tensor(rows)[batch["positions"] // batch["input_ids"].shape[1]]
        nll.index_add_(0, owner[real], losses[real])
        tokens.index_add_(0, owner[real], torch.ones(int(real.sum()), dtype=torch.long))
    return nll, tokens - torch.tensor([example.spelled for example in examples])


def response_nll(model: PreTrainedModel, examples: Sequence[Example], pad_id: int = 0, batch_size: int = 16) -> float:
    """Mean negative log-likelihood per response token of `examples`, end token counted, in nats."""
    nll, tokens = response_nlls(model, examples, pad_id, batch_size)
    return float(nll.sum() / tokens.sum())
