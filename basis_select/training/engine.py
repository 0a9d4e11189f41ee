"""One training loop for tune, learn and heal: transformers' Trainer with our batches, our loss, and
checkpoints that hold only what trains, so that a killed stage continues bit for bit.
"""

import functools
import json
import logging
import math
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from .. import ranks
from ..bases import LowRankLinear, groups, take
from ..reading import read_json, read_lines, sha256
from ..run.directory import replace_text, settle
from ..tuned_on import remember
from .collage import CollageAdamW
from .data import Batches, require_fit
from .loss import task_loss
from .precision import products

log = logging.getLogger(__name__)
LEARNED = ("kept", "last", "rounds")  # what `learn` keeps beside the weights, see there
COMPLETE = "complete"  # in a training checkpoint: the sha256 of its files
SAVE_EVERY = 60.0  # seconds between checkpoints within a stage
MEASURE_EVERY = 10  # steps between measurements of what bfloat16 has lost


def train(
    model,
    task,
    *,
    steps,
    batch_size,
    lr,
    seed,
    folder=None,
    teacher=None,
    kl=1.0,
    warmup=0.05,
    precision="fp32",
    checkpointing=False,
    callbacks=(),
):
    """Train the parameters of `model` that require gradients, in place; returns the metrics, one dict a step.

    AdamW, gradient clipping at 1, and in step i of w + n, the first w being the share `warmup` of them, rounded up and
    at least one, the rate lr * min((i + 1) / w, (1 + cos(pi t)) / 2), t = max(0, i + 1 - w) / (n + 1): no step is at 0,
    step w - 1 is at lr. `precision`: "fp32", or one of collage.VARIANTS, with which the
    model is in bfloat16 while it trains (basis weights stay fp32) and comes back in its own dtype: parameters that
    trained with all that was carried for them, other parameters rounded, buffers as they were. `checkpointing` keeps
    only the inputs of the decoder layers and computes the rest anew in the backward pass.
    `folder` (default: a temporary one) receives `metrics.jsonl` and the checkpoints from which a second call with the
    same arguments continues. On several ranks all call this and each trains on its rows of every batch; gradients and
    metrics are those of the whole batch, a model or teacher may be sharded (`load(..., sharded=True)`), and checkpoints
    are whole. Raises FloatingPointError when the loss is not finite; the last checkpoint then still holds the last good
    state.
    """
    if steps == 0:
        return []
    if folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return train(
                model,
                task,
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                folder=folder,
                teacher=teacher,
                kl=kl,
                warmup=warmup,
                precision=precision,
                checkpointing=checkpointing,
                callbacks=callbacks,
            )
    require_fit(model, task)
    ranks.join()
    folder = Path(folder)
    optimizer, own, buffers = None, model.dtype, _buffers(model)
    if precision != "fp32":
        _narrow(model, buffers)
        optimizer = CollageAdamW([p for p in model.parameters() if p.requires_grad], lr=lr, variant=precision)
    if isinstance(teacher, nn.Module):
        teacher.eval().requires_grad_(False)
    if checkpointing:
        checkpoint_layers(model)
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,  # one item of Batches is one whole batch
        train_sampling_strategy="sequential",
        learning_rate=lr,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        # Trainer writes this into the config, which is saved with the model.
        use_cache=getattr(model.config.get_text_config(), "use_cache", True),
        # Not bf16=True for mixed precision: that stays with the model. `task_loss` sees to it.
        seed=seed,
        save_strategy="no",  # Clock asks for checkpoints by time
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
    )
    args._n_gpu = min(args.n_gpu, 1)  # on the GPU where the model is, not split over all that are there
    resume = ranks.agreed(lambda: _last_checkpoint(folder))
    done = int(resume.name.rpartition("-")[2]) if resume else 0
    record = Record(folder / "metrics.jsonl", keep=done)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Batches(task.train, batch_size, steps, seed, task.pad_id, ranks.rank(), ranks.world()),
        data_collator=lambda items: items[0],
        callbacks=[*callbacks, record, Clock()],
        optimizers=(optimizer, None),
        teacher=teacher,
        kl=kl,
        record=record,
        schedule=functools.partial(share_of_rate, steps=steps, warmup=max(1, math.ceil(warmup * steps))),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    remember(model, task.train, task.validation)
    if optimizer:
        _widen(model, optimizer, own, buffers)
    if checkpointing:
        model.activation_checkpointing_disable()
    model.eval()
    return record.rows


def share_of_rate(i, steps, warmup):
    """The rate of step i, from 0 on, as a share of the largest; warmup: steps until that is reached."""
    done = max(0, i + 1 - warmup) / (steps - warmup + 1)
    return min((i + 1) / warmup, (1 + math.cos(math.pi * done)) / 2)


def checkpoint_layers(model):
    """Keep only the inputs of decoder layers while training, and compute the rest anew, in the same precision."""
    anew = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), products(model))}
    model.train().activation_checkpointing_enable(anew)


def _buffers(model):
    """`[(module, its name, name of a buffer, buffer), ...]`, but those of bases, which training may change."""
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, LowRankLinear)]
    return [(m, name, key, buffer) for name, m in modules for key, buffer in m._buffers.items() if buffer is not None]


def _narrow(model, buffers):
    """Everything in bfloat16 but the 1-D basis weights: `learn` trains little else, and they decide what stays.

    And but the buffers that stay fp32 where transformers loads such a model in bfloat16: the frequencies of rotary
    embeddings, which bfloat16 would round to other angles than those that the trained model will see.
    """
    weighted = [m for m in model.modules() if isinstance(m, LowRankLinear) and hasattr(m, "scale")]
    kept = [(m, m.weight.data, m.scale) for m in weighted]
    with torch.device("meta"):
        loaded = dict(type(model)._from_config(model.config, dtype=torch.bfloat16).named_buffers())
    model.to(torch.bfloat16)
    for m, weight, scale in kept:
        m.weight.data, m.scale = weight, scale
    for m, path, key, buffer in buffers:
        like = loaded.get(f"{path}.{key}" if path else key)
        if like is not None and like.dtype == torch.float32:
            m._buffers[key] = buffer


@torch.no_grad()
def _widen(model, optimizer, dtype, buffers):
    """Back to `dtype`, with what the optimizer carries beside the parameters where that dtype can hold it."""
    wide = {p: optimizer.value(p) for p in model.parameters() if p.requires_grad}
    model.to(dtype)
    for p, value in wide.items():
        p.copy_(value)
    for m, _, key, buffer in buffers:
        m._buffers[key] = buffer


class _Trainer(Trainer):
    def __init__(self, *args, teacher, kl, record, schedule, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.kl, self.record, self.schedule = teacher, kl, record, schedule
        self.loss_is_scaled_for_ga = False
        if ranks.started():
            self.is_distributed_loading_by_transformers = True  # no DDP: `learn` changes shapes while it trains

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, collate_fn=self.data_collator)  # Batches has dealt the rows already

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule)
        return self.lr_scheduler

    def _sync_replicated_trainable_parameters(self, model):
        ranks.unify(model.parameters())

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        ranks.average_gradients(model.parameters())
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = task_loss(model, inputs, self.teacher, self.kl)
        values = dict(zip(("loss", "ce", "kl"), ranks.total(torch.stack(parts).detach()).tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss became {values['loss']} at step {self.state.global_step + 1}; "
                f"the state before it is kept, a learning rate below {self.args.learning_rate:g} may help"
            )
        self.record.values = {**values, "tokens": inputs["tokens"]}
        return parts[0] * ranks.world()  # gradients are averaged over ranks

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's writer
                raise
            shutil.rmtree(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            folder, free = self.args.output_dir, shutil.disk_usage(self.args.output_dir).free
            raise OSError(
                f"the training checkpoint of step {self.state.global_step} could not be written, the one before it is "
                f"kept: {free / 1e9:.1f} GB are free in {folder} ({str(error)[:100]})"
            ) from error

    def _save(self, output_dir=None, state_dict=None):
        state = _state(self.model)
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(state, Path(output_dir) / "trainable.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _restore(self.model, load_file(Path(resume_from_checkpoint) / "trainable.safetensors"))

    def _save_optimizer_and_scheduler(self, output_dir):
        state = self.optimizer.state_dict()
        state["state"] = {i: {k: ranks.whole(v) for k, v in s.items()} for i, s in state["state"].items()}
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        saved = {
            name: torch.load(Path(checkpoint) / f"{name}.pt", map_location="cpu", weights_only=True)
            for name in ("optimizer", "scheduler")
        }
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, state in saved["optimizer"]["state"].items():  # numbered in that order
            saved["optimizer"]["state"][i] = {k: ranks.sharded_like(trained[i], v) for k, v in state.items()}
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["scheduler"])


def _state(model):
    """What training changes: parameters with gradients, and which bases are still alive."""
    trained = [(name, ranks.whole(p.detach())) for name, p in model.named_parameters() if p.requires_grad]
    state = {name: p.clone() for name, p in trained if p is not None}
    for name, module in model.named_modules():
        for buffer in LEARNED:
            if isinstance(module, LowRankLinear) and hasattr(module, buffer):
                state[f"{name}.{buffer}"] = getattr(module, buffer).clone()
    return state


@torch.no_grad()
def _restore(model, state):
    for members in groups(model):
        name, leader = members[0]
        for buffer in LEARNED:
            if hasattr(leader, buffer):
                setattr(leader, buffer, state.pop(f"{name}.{buffer}").to(model.device))
        if hasattr(leader, "kept") and len(leader.kept) < leader.rank:
            take(members, leader.kept)
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(ranks.sharded_like(parameters[name], value))


def _last_checkpoint(folder):
    """The newest training checkpoint in the folder of a stage that is whole; what is not is said, and removed."""
    found = {int(p.name.rpartition("-")[2]): p for p in (folder / "trainer").glob("checkpoint-*")}
    for step, path in sorted(found.items(), reverse=True):
        if (path / COMPLETE).exists():
            try:
                _check(path, folder / "metrics.jsonl", step)
            except (ValueError, OSError) as error:
                log.warning("%s is damaged (%s): training goes on from an earlier state", path, error)
            else:
                return path
        shutil.rmtree(path)
    return None


def _check(checkpoint, metrics, step):
    """Raise ValueError or OSError unless the files of a training checkpoint are those written, and its metrics too."""
    for name, digest in read_json(checkpoint / COMPLETE, {str: str}).items():
        if sha256(checkpoint / name) != digest:
            raise ValueError(f"{name} is not the file that was written")
    lines = read_lines(metrics, {"step": int, "loss": float}, step)
    if [line["step"] for line in lines] != list(range(1, step + 1)):
        raise ValueError(f"{metrics} does not hold its {step} steps")


class Clock(TrainerCallback):
    """Asks for a checkpoint every SAVE_EVERY seconds and marks, with hashes, those that are on disk to the end."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if ranks.agreed(lambda: time.monotonic() - self.last > SAVE_EVERY) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        ranks.barrier()  # all have written the state of their random numbers
        if args.should_save:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            settle(checkpoint)
            replace_text(checkpoint / COMPLETE, json.dumps({p.name: sha256(p) for p in checkpoint.iterdir()}))
        self.last = time.monotonic()


class Record(TrainerCallback):
    """Writes one line per step to metrics.jsonl; lines after the step that is resumed from are dropped."""

    def __init__(self, path, keep):
        self.rows = read_lines(path, stop=keep) if keep else []
        self.path, self.values, self.writes = path, {}, ranks.rank() == 0
        ranks.barrier()  # all have read the file
        if self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.began, self.rate = time.monotonic(), lr_scheduler.get_last_lr()[0]
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.measures = isinstance(self.optimizer, CollageAdamW) and state.global_step % MEASURE_EVERY == 0
        if self.measures:
            self.optimizer.measure = True

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.monotonic() - self.began
        row = {
            "step": state.global_step,
            **self.values,
            "lr": self.rate,
            "seconds": round(seconds, 4),
        }
        if self.measures:
            self.optimizer.measure = False
            row |= self.optimizer.quality
        self.rows.append(row)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
