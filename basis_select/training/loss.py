"""The losses, on response tokens only."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

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

    Done at the head's input, so scalings and soft caps that a model applies to its logits still apply.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].flatten(0, -2)[positions],)
    )
    try:
        yield
    finally:
        hook.remove()


def response_logits(model, batch):
    """Logits (n, vocabulary) at `batch["positions"]`."""
    with _head_reads(model, batch["positions"].to(model.device)):
        return model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits


def task_loss(model, batch, teacher=None, kl=1.0):
    """Mean over response tokens of `CE(y) + kl * KL(teacher || model)`, and both parts: three scalars, in nats.

    Without a teacher the second part is zero.
    """
    targets = batch["targets"].to(model.device)
    real = targets >= 0
    with autocast(model):
        logits = response_logits(model, batch)
    log_q = logits[real].float().log_softmax(-1)
    ce = F.nll_loss(log_q, targets[real])
    if teacher is None or kl == 0:
        return ce, ce, torch.zeros_like(ce)
    with torch.no_grad(), autocast(teacher):
        log_p = response_logits(teacher, batch)[real].float().log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return ce + kl * divergence, ce, divergence


@torch.no_grad()
def response_nll(model, examples, pad_id=0, batch_size=16):
    """Mean negative log-likelihood of the response tokens of `examples`, end token counted, in nats."""
    total, count = 0.0, 0
    for batch in Batches(examples, batch_size, -(-len(examples) // batch_size), 0, pad_id):
        tokens = int((batch["targets"] >= 0).sum())
        total += task_loss(model, batch)[1].item() * tokens
        count += tokens
    return total / count
