"""One training loop for tune, learn and heal, with checkpoints that hold only what trains, so that a killed stage
continues bit for bit.

A plain loop, not transformers' Trainer: batches, loss, rates, what is saved and when, and what processes share are all
decided here, and a subclass would have to override Trainer's private methods for most of them.
"""

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from ..data.tasks import Task
from ..data.tuned_on import remember
from ..layers.learning import Weights
from ..system import processes
from ..system.progress import progress
from ..system.reading import read_json, read_lines, sha256
from ..system.writing import replace_text, settle
from .collage import CollageAdamW
from .data import Batches, require_fit
from .loss import task_loss
from .precision import products
from .soft_labels import Teacher

log = logging.getLogger(__name__)
STATE, COMPLETE = "state.pt", "complete"  # in a training checkpoint: the state, and last of all its sha256
SAVE_EVERY = 60.0  # seconds between checkpoints within a stage
MEASURE_EVERY = 10  # steps between measurements of what bfloat16 has lost


class Beside(Protocol):
    """What goes along with a training, and may change shapes of parameters in place."""

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> bool | None:
        """Called before every step, from 0 on; whether training ends here."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold of it."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Called before the weights of a checkpoint are put back: brings all shapes to what they were."""


def train(
    model: PreTrainedModel,
    task: Task,
    *,
    name: str,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    folder: str | Path | None = None,
    teacher: Teacher | None = None,
    kl: float = 1.0,
    warmup: float = 0.05,
    precision: str = "fp32",
    checkpointing: bool = False,
    beside: Beside | None = None,
) -> list[dict]:
    """Train the parameters of `model` that require gradients, in place; returns the metrics, one dict a step.

    AdamW, gradient clipping at 1, and in step i of w + n, the first w being the share `warmup` of them, rounded up and
    at least one, the rate lr * min((i + 1) / w, (1 + cos(pi t)) / 2), t = max(0, i + 1 - w) / (n + 1): no step is at 0,
    step w - 1 is at lr. `name` is what the progress bar calls this. `precision`: "fp32", or one of collage.VARIANTS,
    with which the model is in bfloat16 while it trains (basis weights stay fp32) and comes back in its own dtype:
    parameters that trained with all that was carried for them, other parameters rounded, buffers as they were.
    A batch that is more than data.AT_ONCE tokens passes in parts, which its size then costs no memory.
    `checkpointing` keeps only the inputs of the decoder layers and computes the rest anew in the backward pass.
    `beside` is asked before every step, and may end the training; what it keeps is part of the checkpoints.
    `folder` (default: a temporary one) receives `metrics.jsonl` and the checkpoints from which a second call with the
    same arguments continues. Several processes all call this and each trains on its rows of every batch; gradients and
    metrics are those of the whole batch, a model or teacher may be sharded (`load(..., sharded=True)`), and checkpoints
    are whole. Raises FloatingPointError when the loss is not finite; the last checkpoint then still holds the last good
    state.
    """
    if steps == 0:
        return []
    require_fit(model, task)
    processes.join()
    own, buffers = model.dtype, _buffers(model)
    if precision != "fp32":
        _narrow(model, buffers)
    if isinstance(teacher, nn.Module):
        teacher.eval().requires_grad_(False)
    if checkpointing:
        checkpoint_layers(model)
    set_seed(seed)
    optimizer = _optimizer(model, lr, precision)
    batches = Batches(task.train, batch_size, steps, seed, task.pad_id, processes.index(), processes.count())
    warm = max(1, math.ceil(warmup * steps))
    rates = [lr * share_of_rate(i, steps, warm) for i in range(steps)]

    def loss(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return task_loss(model, batch, teacher, kl)

    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        rows = _run(model, optimizer, batches, rates, loss, beside, Path(place), name)
    remember(model, task.train, task.validation)
    if precision != "fp32":
        _widen(model, optimizer, own, buffers)
    if checkpointing:
        _checkpointing(model, "disable")()
    model.eval()
    return rows


def _optimizer(model: PreTrainedModel, lr: float, precision: str) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if not p.is_contiguous():  # on CPUs the fused step would mix up its numbers and say nothing
            p.data = p.data.contiguous()
    if precision == "fp32":
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    return CollageAdamW(trained, lr=lr, variant=precision)


def _run(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    rates: Sequence[float],
    loss: Callable,
    beside: Beside | None,
    folder: Path,
    name: str,
) -> list[dict]:
    """All steps that the checkpoints in `folder` have not done yet; returns the metrics of these and those."""
    checkpoint = processes.agreed(lambda: _last_checkpoint(folder))
    done = _resume(checkpoint, model, optimizer, beside) if checkpoint else 0
    processes.unify(model.parameters())
    rows = _recorded(folder / "metrics.jsonl", done)
    model.zero_grad()
    saved, steps = time.monotonic(), len(batches)

    def due() -> bool:
        return time.monotonic() - saved > SAVE_EVERY

    for i in progress(range(done, steps), name, "step", total=steps, done=done, quiet=processes.index() > 0):
        parts = batches.parts(i, model.device.type)
        if beside and beside.before_step(i, optimizer):
            break
        began = time.monotonic()
        values = _step(model, optimizer, parts, i, rates[i], loss)
        rows.append({"step": i + 1, **values, "seconds": round(time.monotonic() - began, 4)})
        if processes.index() == 0:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        if i + 1 < steps and processes.agreed(due):
            _save(model, optimizer, beside, folder / "training", i + 1)
            saved = time.monotonic()
    return rows


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, parts: list[dict], i: int, rate: float, loss: Callable
) -> dict:
    """Step i on a batch in parts, in place; returns the metrics of the whole batch."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    if isinstance(optimizer, CollageAdamW):
        optimizer.measure = i % MEASURE_EVERY == 0
    model.train()
    losses = 0
    for part in parts:
        values = torch.stack(loss(part))
        (values[0] * processes.count()).backward()  # gradients are averaged over processes
        losses += values.detach()
    values = dict(zip(("loss", "ce", "kl"), processes.total(losses).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss became {values['loss']} at step {i + 1}; "
            f"the state before it is kept, a learning rate below {optimizer.defaults['lr']:g} may help"
        )
    processes.average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
    optimizer.step()
    model.zero_grad()
    lost = optimizer.quality if getattr(optimizer, "measure", False) else {}
    return {**values, "tokens": parts[0]["tokens"], "lr": rate, **lost}


def _recorded(path: Path, steps: int) -> list[dict]:
    """The lines of the first `steps` steps in the metrics; those after them are dropped from the file."""
    rows = read_lines(path, stop=steps) if steps else []
    processes.barrier()  # all have read the file
    if processes.index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def share_of_rate(i: int, steps: int, warmup: int) -> float:
    """The rate of step i, from 0 on, as a share of the largest; warmup: steps until that is reached."""
    done = max(0, i + 1 - warmup) / (steps - warmup + 1)
    return min((i + 1) / warmup, (1 + math.cos(math.pi * done)) / 2)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of decoder layers while training, and compute the rest anew, in the same precision."""
    anew = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), products(model))}
    _checkpointing(model.train(), "enable")(anew)


def _checkpointing(model: PreTrainedModel, what: str) -> Callable:
    """The method that enables or disables it, by its name in this version of transformers."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, str, torch.Tensor]]:
    """`[(module, its name, name of a buffer, buffer), ...]`, but those of bases, which training may change."""
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, Weights)]
    return [(m, name, key, buffer) for name, m in modules for key, buffer in m._buffers.items() if buffer is not None]


def _narrow(model: PreTrainedModel, buffers: list[tuple[nn.Module, str, str, torch.Tensor]]) -> None:
    """Everything in bfloat16 but the 1-D basis weights: `learn` trains little else, and they decide what stays.

    And but the buffers that stay fp32 where transformers loads such a model in bfloat16: the frequencies of rotary
    embeddings, which bfloat16 would round to other angles than those that the trained model will see.
    """
    kept = [(m, m.scale, m.learned.data, m.survived) for m in model.modules() if isinstance(m, Weights)]
    with torch.device("meta"):
        loaded = dict(type(model)._from_config(model.config, dtype=torch.bfloat16).named_buffers())
    model.to(torch.bfloat16)
    for m, *tensors in kept:
        m.put(*tensors)
    for m, path, key, buffer in buffers:
        like = loaded.get(f"{path}.{key}" if path else key)
        if like is not None and like.dtype == torch.float32:
            m._buffers[key] = buffer


@torch.no_grad()
def _widen(
    model: PreTrainedModel,
    optimizer: CollageAdamW,
    dtype: torch.dtype,
    buffers: list[tuple[nn.Module, str, str, torch.Tensor]],
) -> None:
    """Back to `dtype`, with what the optimizer carries beside the parameters where that dtype can hold it."""
    wide = {p: trained_value(p, optimizer) for p in model.parameters() if p.requires_grad}
    model.to(dtype)
    for p, value in wide.items():
        p.copy_(value)
    for m, _, key, buffer in buffers:
        m._buffers[key] = buffer


def trained_value(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """A parameter with what the optimizer carries beside it; itself where nothing is carried."""
    return optimizer.value(p) if isinstance(optimizer, CollageAdamW) else p.detach()


def _save(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, beside: Beside | None, folder: Path, step: int
) -> None:
    """Write what continues after `step`, by all processes; this checkpoint and the one before it are kept."""
    state = optimizer.state_dict()
    state["state"] = {i: {k: processes.whole(v) for k, v in s.items()} for i, s in state["state"].items()}
    content = {"weights": _state(model), "optimizer": state, "random": processes.gathered(_random_state())}
    if beside:
        content["beside"] = beside.state_dict()
    if processes.index() == 0:
        checkpoint = folder / f"checkpoint-{step}"
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            torch.save(content, checkpoint / STATE)
            settle(checkpoint)
            replace_text(checkpoint / COMPLETE, json.dumps({STATE: sha256(checkpoint / STATE)}))
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's writer
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise OSError(
                f"the training checkpoint of step {step} could not be written, the one before it is kept: "
                f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB are free in {folder.parent} ({str(error)[:100]})"
            ) from error
        for old in list(_checkpoints(folder).values())[2:]:
            shutil.rmtree(old)


def _resume(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, beside: Beside | None) -> int:
    """Put model, optimizer and random numbers into the state of a checkpoint; returns how many steps are done."""
    saved = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if beside:
        beside.load_state_dict(saved["beside"])
    _restore(model, saved["weights"])
    trained = [p for group in optimizer.param_groups for p in group["params"]]  # numbered in that order
    for i, state in saved["optimizer"]["state"].items():
        saved["optimizer"]["state"][i] = {k: processes.sharded_like(trained[i], v) for k, v in state.items()}
    optimizer.load_state_dict(saved["optimizer"])
    if len(saved["random"]) == processes.count():
        generators = saved["random"][processes.index()]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])
    return _step_of(checkpoint)


def _random_state() -> dict[str, torch.Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters with gradients."""
    trained = [(name, processes.whole(p.detach())) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p.clone() for name, p in trained if p is not None}


@torch.no_grad()
def _restore(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(processes.sharded_like(parameters[name], value))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> dict[int, Path]:
    """`{step: path}` of the training checkpoints in a folder, the newest first."""
    return {_step_of(p): p for p in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)}


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest training checkpoint in the folder of a stage that is whole; what is not is said, and removed."""
    for step, path in _checkpoints(folder / "training").items():
        if (path / COMPLETE).exists():
            try:
                _check(path, folder / "metrics.jsonl", step)
            except (ValueError, OSError) as error:
                log.warning("%s is damaged (%s): training goes on from an earlier state", path, error)
            else:
                return path
        shutil.rmtree(path)
    return None


def _check(checkpoint: Path, metrics: Path, step: int) -> None:
    """Raise ValueError or OSError unless the state in a training checkpoint is that written, and its metrics too."""
    if sha256(checkpoint / STATE) != read_json(checkpoint / COMPLETE, {STATE: str})[STATE]:
        raise ValueError(f"{STATE} is not the file that was written")
    lines = read_lines(metrics, {"step": int, "loss": float}, step)
    if [line["step"] for line in lines] != list(range(1, step + 1)):
        raise ValueError(f"{metrics} does not hold its {step} steps")
