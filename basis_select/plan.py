"""What a recipe will do and cost, from the model's config and the task's token counts alone: no weights are read."""

import dataclasses
import time

import torch
from transformers import AutoModelForCausalLM

from .decompose import same_input, targets
from .linalg.budget import allocate, uniform_scores
from .linalg.metrics import METRICS
from .models import config_and_tokenizer
from .recipe import RESULT
from .tasks import load_task
from .training.data import Batches
from .training.loss import fast_bf16

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EFFICIENCY = 0.45  # of the matmul rate measured here that a whole training step reaches: quickstart, 2 cores
GENERATED_PER_ITEM = 2.0  # an evaluated item costs about this many plain forwards of its tokens: likelihood, generation


def plan(recipe):
    """The text of `basis-select plan`. Raises ValueError, like `run`, for data or budgets that cannot work."""
    config, tokenizer = config_and_tokenizer(recipe.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    task = load_task(recipe.task, tokenizer, recipe.seed, **dataclasses.asdict(recipe.data))
    layers = targets(model)
    rates = _rates()
    total = sum(p.numel() for p in model.parameters())
    targeted = sum(m.weight.numel() for m in layers.values())
    lines = [
        f"model    {recipe.model}: {total / 1e6:.1f} M parameters, {targeted / 1e6:.1f} M of them in "
        f"{len(layers)} targeted linear layers",
        f"task     {recipe.task}: {len(task.train)} training, {len(task.validation)} validation, {len(task.test)} "
        f"test examples of {sum(len(e.input_ids) for e in task.train) / len(task.train):.0f} tokens on average",
        "",
    ]
    rows, disk = {}, 4 * total
    for name, row in {RESULT: recipe, **recipe.variants()}.items():
        members = same_input(model, layers, task) if row.decompose.share else [[n] for n in layers]
        _allocate(row, layers, members)
        stages, after = _stages(row, task, model, layers, members, total, targeted, rates)
        rows[name] = stages
        kept = total - targeted + after
        lines.append(
            f"{name}: {after / 1e6:.2f} M targeted parameters ({targeted / after:.2f}x fewer), "
            f"{kept / 1e6:.2f} M in all, {kept * BYTES[row.dtype] / 1e6:.0f} MB in {row.dtype}"
        )
        disk += 4 * total + 8 * targeted + 12 * kept
    lines += ["", f"{'stage':34}{'steps':>7}{'tokens':>11}{'TFLOP':>9}{'about':>9}"]
    seconds, seen = 0.0, set()
    for name, stages in rows.items():
        for stage, options, steps, tokens, flops, cost in stages:
            if (stage, options) in seen:  # rows share it
                continue
            seen.add((stage, options))
            seconds += cost
            lines.append(
                f"{name[:20]:22}{stage:12}{steps or '':>7}{tokens or '':>11}{flops / 1e12:>9.1f}{cost:>7.0f} s"
            )
    memory = total * 4 * (4 if recipe.tune.steps else 2) + (targeted * 4 * 3 if recipe.learn.steps else 0)
    lines += [
        "",
        f"about {seconds / 60:.0f} minutes here ({rates['train'] / 1e9:.0f} GFLOP/s in training matmuls), "
        f"{memory / 2**30:.1f} GiB of memory, {disk / 1e9:.1f} GB of disk for stages",
    ]
    return "\n".join(lines)


def check_budget(recipe, source, task):
    """Raise ValueError if no choice of ranks for the model at `source` meets the recipe's size."""
    config, _ = config_and_tokenizer(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = targets(model)
    _allocate(recipe, layers, same_input(model, layers, task) if recipe.decompose.share else [[n] for n in layers])


def _allocate(r, layers, members):
    if r.prune.budget == "mass":
        return
    shapes = [[layers[n] for n in names] for names in members]
    costs = [g[0].in_features + sum(m.out_features for m in g) for g in shapes]
    dense = [sum(m.weight.numel() for m in g) for g in shapes]
    scores = [
        uniform_scores(min(g[0].in_features, sum(m.out_features for m in g)), c, d)
        for g, c, d in zip(shapes, costs, dense, strict=True)
    ]
    room = int(r.prune.keep * sum(dense)) - r.extend.rank * sum(costs)
    try:
        allocate(scores, costs, dense, room, r.prune.multiple_of)
    except ValueError as error:
        raise ValueError(f"prune.keep={r.prune.keep} with extend.rank={r.extend.rank}: {error}") from None


def _stages(r, task, model, layers, members, total, targeted, rates):
    """`[(name, options, steps, tokens, flops, seconds), ...]` of one row, and its targeted parameters."""
    shapes = [[layers[n] for n in names] for names in members]
    costs = [g[0].in_features + sum(m.out_features for m in g) for g in shapes]
    dense = [sum(m.weight.numel() for m in g) for g in shapes]
    after = targeted if r.prune.budget == "mass" else r.prune.keep * targeted  # by mass the size is an outcome
    head = model.get_output_embeddings().weight.numel()
    per_step, responses = _tokens(task, r.tune.batch_size)
    forward = 2 * targeted * per_step + 2 * head * responses
    stages = []

    def add(name, options, steps, tokens, flops, rate):
        stages.append((name, repr(options), steps, tokens, flops, flops / rate))

    if r.tune.steps:
        add("tune", r.tune, r.tune.steps, r.tune.steps * per_step, 3 * forward * r.tune.steps, rates["train"])
    uses = METRICS[r.decompose.metric]
    examples = min(r.decompose.examples, len(task.train))
    tokens = examples * per_step // r.tune.batch_size
    squares = 2 * sum(
        uses.inputs * g[0].in_features ** 2 + uses.outputs * sum(m.out_features**2 for m in g) for g in shapes
    )
    # A Gram matrix, its eigenvectors and one product per layer, in float64.
    svd = sum(6 * d * min(g[0].in_features, sum(m.out_features for m in g)) for g, d in zip(shapes, dense, strict=True))
    moments = tokens * (squares + (4 * targeted if squares else 0))
    seconds = moments / rates["train"] + svd / rates["float64"]
    add("decompose", r.decompose, None, tokens if squares else None, moments + svd, (moments + svd) / seconds)
    if r.learn.steps:
        bases = sum(
            c * min(g[0].in_features, sum(m.out_features for m in g)) for c, g in zip(costs, shapes, strict=True)
        )
        rounds = r.learn.rounds
        alive = sum(max(after, min(bases, r.prune.keep ** (k / rounds) * targeted)) for k in range(1, rounds + 1))
        alive = alive / rounds if rounds else bases
        teacher = forward if r.learn.kl else 0
        flops = r.learn.steps * (teacher + 4 * alive * per_step + 4 * head * responses)
        add("learn", (r.learn, r.prune), r.learn.steps, r.learn.steps * per_step, flops, rates["train"])
    if r.heal.steps:
        teacher = forward if r.heal.kl else 0
        flops = r.heal.steps * (teacher + 6 * after * per_step + 4 * head * responses)
        add(
            "heal",
            (r.heal, r.decompose, r.learn, r.prune),
            r.heal.steps,
            r.heal.steps * per_step,
            flops,
            rates["train"],
        )
    test = sum(len(e.input_ids) for e in task.test)
    flops = GENERATED_PER_ITEM * test * 2 * (after + head)
    add("evaluate", (r.decompose, r.learn, r.prune, r.heal), None, test, flops, rates["train"] / 3)
    return stages, after


def _tokens(task, batch_size):
    """Padded tokens and response tokens of an average batch."""
    batches = [batch for batch, _ in zip(Batches(task.train, batch_size, 32, 0), range(32), strict=False)]
    return (
        sum(b["input_ids"].numel() for b in batches) // len(batches),
        sum(len(b["targets"]) for b in batches) // len(batches),
    )


def _rates():
    """FLOP/s reached here: training matmuls (bf16 where it is native), and float64 factorisations."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    return {
        "train": EFFICIENCY * _matmul_rate(1024, dtype, device),
        "float64": EFFICIENCY * _matmul_rate(512, torch.float64, device),
    }


def _matmul_rate(n, dtype, device):
    a = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 4 * 2 * n**3 / best
