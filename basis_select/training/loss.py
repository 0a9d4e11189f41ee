"""The losses, on response tokens only."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from .data import Batches


def fast_bf16(device):
    """Whether bf16 matmuls are native on this device; emulated ones are slower than fp32."""
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(model):
    """bf16 matmuls for an fp32 model where the device has them; a model in bf16 is left as it is."""
    device = model.device
    enabled = model.dtype == torch.float32 and fast_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def _head_reads(model, positions):
    """The output head sees only these flat token positions: no logits are formed for prompts and padding.

    Done at the head's input, so scalings and soft caps that a model applies to its logits still apply. Yields a
    list that receives what the head would have read: (B, L, d).
    """
    states = []

    def hook(module, args):
        states.append(args[0])
        return (args[0].flatten(0, -2)[positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield states
    finally:
        handle.remove()


def response_logits(model, batch):
    """Logits (n, vocabulary) at `batch["positions"]`."""
    return _logits_and_states(model, batch)[0]


def _logits_and_states(model, batch):
    with _head_reads(model, batch["positions"].to(model.device)) as states:
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
    return logits, states[0][batch["real"].to(model.device)]


@torch.no_grad()
def teach(teacher, batch):
    """What `task_loss` compares a model with: the teacher's log-probabilities (m, vocabulary) of the m response tokens,
    fp32, and its last hidden states (k, d) at all k tokens that are not padding.
    """
    with autocast(teacher):
        logits, states = _logits_and_states(teacher, batch)
    return logits[(batch["targets"] >= 0).to(teacher.device)].float().log_softmax(-1), states


def task_loss(model, batch, teacher=None, kl=1.0, states=0.0, mixed=True):
    """`CE(y) + kl * KL(teacher || model) + states * E`, and its first two parts: three scalars, in nats.

    CE and KL are means over response tokens. E is the mean over all tokens, prompts included, of the squared
    distance between the last hidden states of model and teacher relative to the teacher's squared norm. `teacher` is a
    model or a function of a batch that returns what `teach` does; without one only CE counts. `mixed=False`
    computes an fp32 model in fp32.
    """
    targets = batch["targets"].to(model.device)
    real = targets >= 0
    with autocast(model) if mixed else nullcontext():
        logits, own = _logits_and_states(model, batch)
    log_q = logits[real].float().log_softmax(-1)
    ce = F.nll_loss(log_q, targets[real])
    if teacher is None or kl == states == 0:
        return ce, ce, torch.zeros_like(ce)
    log_p, theirs = teach(teacher, batch) if isinstance(teacher, nn.Module) else teacher(batch)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    loss = ce + kl * divergence
    if states:
        own, theirs = own.float(), theirs.float()
        loss = loss + states * ((own - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
    return loss, ce, divergence


@torch.no_grad()
def response_nlls(model, examples, pad_id=0, batch_size=16):
    """`(nll, tokens)`, (n,) each in order of `examples`: summed negative log-likelihood of the response, in nats,
    and its number of tokens, the end token counted.
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
    return nll, tokens


def response_nll(model, examples, pad_id=0, batch_size=16):
    """Mean negative log-likelihood per response token of `examples`, end token counted, in nats."""
    nll, tokens = response_nlls(model, examples, pad_id, batch_size)
    return float(nll.sum() / tokens.sum())
