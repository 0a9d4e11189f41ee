"""Every targeted nn.Linear becomes a LowRankLinear with all its bases: the function does not change yet."""

import logging
import random

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .bases import LowRankLinear
from .embedding import decompose_embedding
from .linalg import metrics
from .linalg.metrics import METRICS
from .training.data import Batches
from .training.loss import autocast, response_logits

log = logging.getLogger(__name__)
MAX_MOMENT = 16384  # a side longer than this has its moment replaced by its mean eigenvalue times the identity


def targets(model, required=True):
    """`{name: nn.Linear}` that can be decomposed, in model order.

    The output head counts unless it is tied to the embedding. Conv1D layers and 3-D expert parameters are not
    nn.Linear: if `required`, they are named in a warning, and finding nothing raises ValueError.
    """
    tied = getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight
    head = model.get_output_embeddings() if tied else None
    factors = {child for m in model.modules() if isinstance(m, LowRankLinear) for child in m.children()}
    found, skipped = {}, []
    for name, module in model.named_modules():
        if module in factors:
            continue
        if type(module) is nn.Linear and module is not head:
            found[name] = module
        elif isinstance(module, Conv1D) or any(p.dim() == 3 for p in module.parameters(recurse=False)):
            skipped.append(f"{name} ({type(module).__name__})")
    if not required:
        return found
    if skipped:
        shown = ", ".join(skipped[:4]) + (f" and {len(skipped) - 4} more" if len(skipped) > 4 else "")
        log.warning("not nn.Linear, left as they are: %s", shown)
    if not found:
        raise ValueError(
            f"nothing to decompose in {type(model).__name__}: it has no nn.Linear layer besides the tied head"
            + (f"; {shown} cannot be decomposed" if skipped else "")
        )
    return found


@torch.no_grad()
def decompose(
    model,
    task=None,
    moments=None,
    *,
    metric: str = "kronecker",
    share: bool = True,
    examples: int = 256,
    embedding: bool = False,
):
    """Write every targeted layer of `model` as a weighted sum of all its bases, in place; returns the model.

    `metric` is one of METRICS. `share`: layers that read the same tensor get one input basis. The second
    moments of metrics that use them come from `examples` training examples of `task`, drawn at random, whose tokens
    all count except padding; `moments` are those of an earlier `second_moments`. `embedding`: the token embedding, and
    the head if tied to it, become bases too. Raises ValueError for an unknown metric, a missing task, a
    model that is already decomposed, and, with the layer's name, for non-finite weights or moments. The Fisher
    information as a product of A and G is K-FAC's (arXiv 1503.05671); the formulas stand in linalg/metrics.py.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    if any(isinstance(m, LowRankLinear) for m in model.modules()):
        raise ValueError("this model is decomposed already")
    uses = METRICS[metric]
    if task is None and (share or embedding or uses.inputs or uses.outputs):
        raise ValueError(f"metric {metric!r} with share={share} looks at task data: pass a task")
    layers = targets(model)
    members = same_input(model, layers, task) if share else [[name] for name in layers]
    inputs, outputs = {}, {}
    if uses.inputs or uses.outputs:
        inputs, outputs = map(dict, moments or second_moments(model, members, task, examples, uses))
    for names in tqdm(members, desc="decompose", unit="layer"):
        linears = [layers[name] for name in names]
        if uses.inputs and names[0] not in inputs:
            log.warning("%s is never reached by the task's data: left dense", ", ".join(names))
            continue
        try:  # moments are dropped as they are used: at most one layer's float64 work exists at a time
            u, s, v = metrics.decompose(
                [linear.weight for linear in linears],
                [uses.outputs(outputs.pop(name)) for name in names] if uses.outputs else None,
                uses.inputs(inputs.pop(names[0])) if uses.inputs else None,
            )
        except ValueError as error:
            raise ValueError(f"{' + '.join(names)}: {error}") from error
        _install(model, names, linears, u, s, v)
    return decompose_embedding(model, task) if embedding else model


def _install(model, names, linears, u, s, v):
    leader = None
    for name, linear, block in zip(names, linears, u.split([m.out_features for m in linears]), strict=True):
        layer = LowRankLinear.like(linear, len(s), weighted=True, leader=leader)
        layer.u.weight.copy_(block)
        if linear.bias is not None:
            layer.u.bias.copy_(linear.bias)
        if leader is None:
            leader = layer
            leader.v.weight.copy_(v)
            leader.scale.copy_(s)
        layer.requires_grad_(False)
        model.set_submodule(name, layer)


@torch.no_grad()
def same_input(model, layers, task):
    """Names of layers that read the very same tensor, found by watching one forward: `[[q, k, v], [o], ...]`.

    A layer that is not called in it (an unused expert) stands alone.
    """
    seen, order, held = {}, {}, []

    def watch(name):
        def hook(module, args):
            held.append(args[0])  # alive, so that no second tensor can get its id
            order.setdefault(name, (id(args[0]), module.in_features))

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in layers.items()]
    try:
        model(input_ids=next(iter(Batches(task.train[:1], 1, 1, seed=0)))["input_ids"].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        seen.setdefault(order.get(name, name), []).append(name)
    return list(seen.values())


def second_moments(model, members, task, examples, uses):
    """`A = E[x x^T]` by leader name and `G = E[g g^T]` by layer name, fp32, over tokens that are not padding.

    g is the gradient, at the layer's output, of the summed negative log-likelihood of responses drawn from
    the model itself, so that G is the Fisher information (the curvature of KL(parent || y) at the parent) and
    does not vanish on a parent that fits its labels. A side longer than MAX_MOMENT is stored as its mean, shape ().
    """
    inputs, outputs = {}, {}
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    mask, count = {}, {"body": 0, "head": 0}  # the head sees response tokens only (response_logits)

    @torch.no_grad()
    @torch.autocast(model.device.type, enabled=False)  # sums of products are what bf16 must not touch
    def add(store, name, x):
        x = x.detach().flatten(0, -2)[mask["head" if name == head else "body"]].float()
        if x.shape[1] > MAX_MOMENT:
            store[name] = store.get(name, 0) + x.square().mean(1).sum()
        else:
            if name not in store:
                store[name] = x.new_zeros(x.shape[1], x.shape[1])
            _add_gram(store[name], x)

    def on_forward(name, leads):
        def hook(module, args, output):
            if leads and uses.inputs:
                add(inputs, name, args[0])
            if uses.outputs and output.requires_grad:
                output.register_hook(lambda g: add(outputs, name, g))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(on_forward(name, name == names[0]))
        for names in members
        for name in names
    ]
    generator = torch.Generator(model.device).manual_seed(0)
    training = model.training
    frozen = {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    embedding = model.get_input_embeddings()
    # With every parameter frozen the graph starts at the embedding's output: no gradient of a weight is formed.
    handles.append(embedding.register_forward_hook(lambda m, a, y: y.requires_grad_()))
    size = 8
    rows = random.Random(0).sample(task.train, min(examples, len(task.train)))
    try:
        batches = Batches(rows, batch_size=size, steps=-(-len(rows) // size), seed=0)
        for batch in tqdm(batches, desc="second moments", unit="batch"):
            mask["body"] = batch["real"].flatten().to(model.device)
            mask["head"] = batch["targets"].to(model.device) >= 0
            count = {which: count[which] + int(mask[which].sum()) for which in count}
            with torch.enable_grad(), autocast(model):
                logits = response_logits(model, batch).float()
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
                    drawn[~mask["head"]] = -100
                if uses.outputs:
                    nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in frozen.items():
            p.requires_grad_(flag)
        model.train(training)
    # The loss is a sum over the tokens a layer sees: A is their mean, G is per token of the body for every
    # layer alike, so that A and G of all layers give comparable estimates.
    for name, moment in inputs.items():
        moment /= count["head" if name == head else "body"]
    for moment in outputs.values():
        moment /= count["body"]
    for moment in (*inputs.values(), *outputs.values()):
        if moment.dim():
            moment.copy_(moment.tril() + moment.tril(-1).T)
    return inputs, outputs


def _add_gram(total, x):
    """Add `x^T x` to the lower triangle of `total: (n, n)` with little more than half the work of a full product."""
    n = x.shape[1]
    if n <= 256:
        total.addmm_(x.T, x)
        return
    half = n // 2
    first, last = x[:, :half], x[:, half:]
    total[half:, :half].addmm_(last.T, first)
    _add_gram(total[:half, :half], first)
    _add_gram(total[half:, half:], last)
