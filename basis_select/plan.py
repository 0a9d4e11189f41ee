"""What a recipe will do and cost, from the model's config and the task's token counts alone: no weights are read."""

import dataclasses
import time

import torch
from transformers import AutoModelForCausalLM

from .decompose import MAX_MOMENT, moment_bytes, moment_room, passes, same_input, targets
from .derivatives import PROBES
from .linalg.budget import BYTES, allocate, keep_for, table_rank, uniform_scores
from .linalg.metrics import METRICS
from .linalg.scores import SCORES
from .models import config_and_tokenizer
from .recipe import RESULT
from .tasks import load_task
from .training.data import Batches
from .training.precision import fast_bf16

EFFICIENCY = 0.45  # of the matmul rate measured here that a whole training step reaches: quickstart, 2 cores
GENERATED_PER_ITEM = 2.0  # an evaluated item costs about this many plain forwards of its tokens: likelihood, generation


def plan(recipe):
    """The text of `basis-select plan`. Raises ValueError, like `run`, for data or budgets that cannot work."""
    config, tokenizer = config_and_tokenizer(recipe.model)
    model = dense_on_meta(config)
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
    rows, disk, moments = {}, 4 * total, 0
    for name, row in {RESULT: recipe, **recipe.family(), **recipe.variants()}.items():
        shapes = _shapes(row, model, layers, task)
        keep = _fraction(row, model, shapes)
        stages, after = _stages(row, task, model, shapes, keep, rates)
        rows[name] = stages
        moments = max(moments, *_moments(row, shapes, total))
        kept = total - targeted + after - _saved(row, model)
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
    training = total * 4 * (4 if recipe.tune.steps else 2) + (targeted * 4 * 3 if recipe.learn.steps else 0)
    memory = max(training, 4 * (total + targeted) + moments)
    lines += [
        "",
        f"about {seconds / 60:.0f} minutes here ({rates['train'] / 1e9:.0f} GFLOP/s in training matmuls), "
        f"{memory / 2**30:.1f} GiB of memory, {disk / 1e9:.1f} GB of disk for stages",
    ]
    return "\n".join(lines)


def check_budget(recipe, source, task):
    """Raise ValueError if no choice of ranks for the model at `source` meets the recipe's size."""
    model = dense_on_meta(config_and_tokenizer(source)[0])
    shapes = _shapes(recipe, model, targets(model), task)
    _fraction(recipe, model, shapes)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Layers that will share one input basis."""

    reads: int
    writes: tuple

    rank = property(lambda self: min(self.reads, sum(self.writes)))
    basis_cost = property(lambda self: self.reads + sum(self.writes))
    dense_cost = property(lambda self: self.reads * sum(self.writes))

    @property
    def square(self):
        """Entries of the output moment."""
        whole = sum(self.writes)
        return whole**2 if whole <= MAX_MOMENT else sum(w * w for w in self.writes)


def _moments(r, shapes, total):
    """Bytes of the second moments that each pass of `decompose` over its examples collects: one number for a pass."""
    uses = METRICS[r.decompose.metric]
    sizes = [moment_bytes(g.reads, g.writes, uses) for g in shapes]
    coming = 4 * (total + sum(g.rank * g.basis_cost for g in shapes))  # the model and its factors
    parts = passes(range(len(shapes)), sizes, moment_room(torch.device("cpu"), coming))
    return [sum(sizes[i] for i in part) for part in parts]


def _shapes(r, model, layers, task):
    members = same_input(model, layers, task) if r.decompose.share else [[n] for n in layers]
    return [_Shape(layers[g[0]].in_features, tuple(layers[n].out_features for n in g)) for g in members]


def dense_on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def keep_of(r, model, targeted):
    """The fraction of the `targeted` parameters of a dense model, on any device, that a row of a recipe keeps."""
    total = sum(p.numel() for p in model.parameters())
    return keep_for(total, targeted, r.dtype, r.prune.keep, r.prune.size, _saved(r, model))


def _saved(r, model):
    """Parameters by which a row makes the embedding smaller."""
    if r.prune.keep_embedding is None:
        return 0
    table = model.get_input_embeddings().weight
    return table_rank(r.prune.keep_embedding, *table.shape, r.prune.multiple_of)[1]


def _fraction(r, model, shapes):
    """The fraction of the targeted parameters that stays; 1 where it is an outcome. ValueError if it cannot be met."""
    if r.prune.mass is not None or r.prune.max_drop is not None:
        return 1.0
    costs, dense = [g.basis_cost for g in shapes], [g.dense_cost for g in shapes]
    keep = keep_of(r, model, sum(dense))
    scores = [uniform_scores(g.rank, g.basis_cost, g.dense_cost) for g in shapes]
    room = int(keep * sum(dense)) - (r.extend.rank + r.learn.new) * sum(costs)
    try:
        allocate(scores, costs, dense, room, r.prune.multiple_of)
    except ValueError as error:
        how = f"prune.keep={r.prune.keep}" if r.prune.size is None else f"prune.size={r.prune.size}"
        raise ValueError(f"{how} with extend.rank={r.extend.rank}: {error}") from None
    return keep


def _stages(r, task, model, shapes, keep, rates):
    """`[(name, options, steps, tokens, flops, seconds), ...]` of one row, and its targeted parameters."""
    targeted = sum(g.dense_cost for g in shapes)
    after = keep * targeted
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
    collected = _moments(r, shapes, sum(p.numel() for p in model.parameters()))
    squares, times = sum(collected) / 4, len(collected)
    # The metric and a Gram matrix of the smaller side, its eigenvectors, one more product: in float64.
    svd = sum(2 * bool(uses.outputs) * g.square * g.rank + 6 * g.dense_cost * g.rank + 10 * g.rank**3 for g in shapes)
    # Half of a Gram matrix is computed: one multiplication and one addition for every entry.
    # Every pass goes forward through the model; backward, twice, only as far as the layers whose moments it collects.
    walks = 2 * times + (2 * (times + 1) if uses.outputs else 0)
    moments = tokens * (squares + walks * targeted * bool(squares))
    seconds = moments / rates["train"] + svd / rates["float64"]
    add("decompose", r.decompose, None, tokens if squares else None, moments + svd, (moments + svd) / seconds)
    if r.learn.steps:
        bases = sum(g.basis_cost * g.rank for g in shapes)
        rounds = r.learn.rounds
        alive = sum(max(after, min(bases, keep ** (k / rounds) * targeted)) for k in range(1, rounds + 1))
        alive = alive / rounds if rounds else bases
        teacher = forward if r.learn.kl else 0
        flops = r.learn.steps * (teacher + 4 * alive * per_step + 4 * head * responses)
        add(
            "learn",
            (r.learn, r.decompose, r.sizes or r.prune),
            r.learn.steps,
            r.learn.steps * per_step,
            flops,
            rates["train"],
        )
    if SCORES[r.prune.score].derivatives and not (r.learn.steps and r.learn.rounds):
        # Two gradients of the full set of bases for every probe, in fp32.
        tokens = PROBES * 8 * per_step // r.tune.batch_size
        flops = 2 * tokens * 4 * sum(g.basis_cost * g.rank for g in shapes)
        add("derivatives", (r.decompose, r.learn), PROBES, tokens, flops, rates["train"] / 2)
    if r.refine.steps:
        flops = r.refine.steps * (2 * targeted + 8 * after) * per_step
        options = (r.refine, r.decompose, r.learn, r.prune)
        add("refine", options, r.refine.steps, r.refine.steps * per_step, flops, rates["train"])
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
