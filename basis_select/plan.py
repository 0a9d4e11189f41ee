"""What a recipe will do and cost, from the model's config and the task's token counts alone: no weights are read."""

import dataclasses
import functools

from transformers import MODEL_FOR_MASKED_LM_MAPPING

from . import plan_measuring as measuring
from .checkpoint.format import dense_on_meta
from .cost import moments_step, training_step
from .decompose import same_input, targets
from .derivatives import PROBES
from .embedding import module_name
from .evaluation.profile import prices
from .heal import add_adapters
from .learn import weights
from .linalg.budget import BYTES, keep_for, linear_prices, table_rank, uniform
from .linalg.metrics import METRICS
from .linalg.scores import SCORES
from .models import config_and_tokenizer
from .moments import EXAMPLES_TOGETHER, MAX_MOMENT, moment_bytes, moment_room, passes
from .plan_measuring import Stage
from .processes import device
from .recipe import RESULT
from .rundir import resident_memory
from .stage_work import examples_to_label
from .tasks import load_task
from .training.data import Batches, require_fit
from .tune import trainable

LIBRARIES = 2**28  # bytes more that libraries and the kernels they generate take in a run than when its plan starts


def plan(recipe, processes=1):
    """The text of `basis-select plan` for so many processes. Raises ValueError, like `run`, for data or budgets that
    cannot work.
    """
    base, rates = resident_memory() + LIBRARIES, measuring.machine_rates()
    model, task, rows, stages = forecast(recipe, processes, rates)
    layers = targets(model)
    total = sum(p.numel() for p in model.parameters())
    targeted = sum(m.weight.numel() for m in layers.values())
    lines = [
        f"model    {recipe.model}: {total / 1e6:.1f} M parameters, {targeted / 1e6:.1f} M of them in "
        f"{len(layers)} targeted linear layers",
        f"task     {recipe.task}: {len(task.train)} training, {len(task.validation)} validation, {len(task.test)} "
        f"test examples of {sum(len(e.input_ids) for e in task.train) / len(task.train):.0f} tokens on average",
        "",
    ]
    disk = 4 * total
    for name, (row, keep) in rows.items():
        shared = targeted + _shared_table(row, model)
        after = keep * shared
        kept = total - shared + after - _saved(row, model)
        lines.append(
            f"{name}: {after / 1e6:.2f} M targeted {'and embedding ' if shared > targeted else ''}parameters "
            f"({shared / after:.2f}x fewer), "
            f"{kept / 1e6:.2f} M in all, {kept * BYTES[row.dtype] / 1e6:.0f} MB in {row.dtype}"
        )
        disk += 4 * total + 8 * targeted + 12 * kept
    lines += ["", f"{'stage':34}{'steps':>7}{'tokens':>11}{'TFLOP':>11}{'about':>11}{'memory':>11}"]
    for name, s in stages:
        memory = f"{(base + s.memory) / 2**30:.1f} GiB" if s.memory else ""
        lines.append(
            f"{name[:20]:22}{s.name:12}{s.steps or '':>7}{s.tokens or '':>11}{s.flops / 1e12:>11.1f}"
            f"{s.seconds:>9.0f} s{memory:>11}"
        )
    where = "here" if processes == 1 else f"on {processes} machines like this one"
    lines += [
        "",
        f"about {sum(s.seconds for _, s in stages) / 60:.0f} minutes {where} "
        f"({rates['train'] / 1e9:.0f} GFLOP/s in training matmuls), "
        f"{(base + max(s.memory for _, s in stages)) / 2**30:.1f} GiB of memory"
        f"{'' if processes == 1 else ' a process'}, {disk / 1e9:.1f} GB of disk for stages",
    ]
    return "\n".join(lines)


def forecast(recipe, processes=1, rates=None):
    """`(model on the meta device, task, {row: (its recipe, fraction kept)}, [(row, Stage), ...])` of a recipe.

    A stage that rows share is there once. rates: FLOP/s, measured if not given.
    """
    config, tokenizer = config_and_tokenizer(recipe.model)
    require_decoder(config, recipe.model)
    model, rates = dense_on_meta(config), rates or measuring.machine_rates()
    task = load_task(recipe.task, tokenizer, recipe.seed, **dataclasses.asdict(recipe.data))
    require_fit(model, task)
    layers, rows, stages, known = targets(model), {}, {}, {}
    targeted = sum(m.weight.numel() for m in layers.values())
    finals = {"parent": _final(recipe, model, targeted)}
    for name, row in {RESULT: recipe, **recipe.family(), **recipe.variants()}.items():
        shapes = _shapes(row, model, layers, task)
        keep = _fraction(row, model, shapes)
        rows[name] = row, keep
        finals[name] = _final(row, model, targeted + _shared_table(row, model), keep, _saved(row, model))
        for stage in _stages(row, task, model, shapes, keep, rates, processes, known):
            stages.setdefault((stage.name, stage.options), (name, stage))
    measured = [(name, measuring.saving(final)) for name, final in finals.items()]
    measured += [(name, measuring.evaluating(task, final, rates)) for name, final in finals.items()]
    measured.append(("", measuring.timing(list(finals.values()), rates)))
    return model, task, rows, [*stages.values(), *measured]


def _final(r, model, shared, keep=1.0, saved=0):
    """What is published of a row; shared: the parameters of which it keeps the fraction `keep`; saved: of others."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    apart = head.numel() if head is table and not _shared_table(r, model) else 0
    return measuring.Final(total - (1 - keep) * shared - saved, keep * shared, apart, len(table), r.dtype)


def check_budget(recipe, source, task):
    """Raise ValueError if the model at `source` cannot take the task, or no choice of ranks meets the recipe's size."""
    model = dense_on_meta(config_and_tokenizer(source)[0])
    require_fit(model, task)
    shapes = _shapes(recipe, model, targets(model), task)
    _fraction(recipe, model, shapes)


def require_decoder(config, source):
    """Raise ValueError if `config` is that of an encoder, whose tokens see those after them."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{source} is a {config.model_type} model, which is no decoder: name a causal language model")


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Layers that will share one input basis, or the embedding where it takes its part of their budget."""

    names: tuple
    reads: int
    writes: tuple
    is_table: bool = False

    rank = property(lambda self: min(self.reads, sum(self.writes)))
    basis_cost = property(lambda self: self.reads + sum(self.writes))
    dense_cost = property(lambda self: self.reads * sum(self.writes))
    share = property(lambda self: self.basis_cost / self.dense_cost)

    @property
    def square(self):
        """Entries of the output moment."""
        whole = sum(self.writes)
        return whole**2 if whole <= MAX_MOMENT else sum(w * w for w in self.writes if w <= MAX_MOMENT)


def _moments(r, shapes, total):
    """Bytes of the second moments that each pass of `decompose` over its examples collects: one number for a pass."""
    uses = METRICS[r.decompose.metric]
    sizes = [moment_bytes(g.reads, g.writes, uses) for g in shapes]
    coming = 4 * (total + sum(g.rank * g.basis_cost for g in shapes))  # the model and its factors
    parts = passes(range(len(shapes)), sizes, moment_room(device(), coming))
    return [sum(sizes[i] for i in part) for part in parts]


def _shapes(r, model, layers, task):
    members = same_input(model, layers, task) if r.decompose.share else [[n] for n in layers]
    found = [_Shape(tuple(g), layers[g[0]].in_features, tuple(layers[n].out_features for n in g)) for g in members]
    if _shared_table(r, model):
        table = model.get_input_embeddings()
        vocabulary, d = table.weight.shape
        found.append(_Shape((module_name(model, table),), d, (vocabulary,), is_table=True))
    return found


def keep_of(r, model, targeted):
    """The fraction of the `targeted` parameters of a dense model, on any device, that a row of a recipe keeps."""
    total = sum(p.numel() for p in model.parameters())
    shared = targeted + _shared_table(r, model)
    return keep_for(total, shared, r.dtype, r.prune.keep, r.prune.size, _saved(r, model))


def _shared_table(r, model):
    """Parameters of the embedding if it takes its part of the budget of the targeted layers, else 0."""
    joins = r.decompose.embedding and r.prune.keep_embedding is None
    return model.get_input_embeddings().weight.numel() if joins else 0


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
    if r.prune.latency is not None:
        return _fraction_in_time(r, model, shapes)
    keep = keep_of(r, model, sum(g.dense_cost for g in shapes if not g.is_table))
    _ranks(r, shapes, keep)
    return keep


def _fraction_in_time(r, model, shapes):
    """The fraction of the targeted parameters that stays where time is the budget, shared evenly."""
    more = []
    if r.prune.keep_embedding is not None:
        vocabulary, d = model.get_input_embeddings().weight.shape
        more = [((d, (vocabulary,)), table_rank(r.prune.keep_embedding, vocabulary, d, r.prune.multiple_of)[0])]
    reserve = r.extend.rank + r.learn.new
    choices, free = prices(r.prune.costs, r.prune.latency, [(g.reads, g.writes) for g in shapes], reserve, more)
    ranks = uniform([g.rank for g in shapes], [g.share for g in shapes], choices, free, unit="seconds")
    kept = [g.dense_cost if k is None else (k + reserve) * g.basis_cost for g, k in zip(shapes, ranks, strict=True)]
    return sum(kept) / sum(g.dense_cost for g in shapes)


def _ranks(r, shapes, keep):
    """`{layer: rank}` of what `keep` leaves, the same share of every layer, without those that stay dense."""
    more = r.extend.rank + r.learn.new
    room = int(keep * sum(g.dense_cost for g in shapes)) - more * sum(g.basis_cost for g in shapes if not g.is_table)
    try:
        lines = [linear_prices(g.rank, g.basis_cost, g.dense_cost, r.prune.multiple_of) for g in shapes]
        found = uniform([g.rank for g in shapes], [g.share for g in shapes], lines, room)
    except ValueError as error:
        how = f"prune.keep={r.prune.keep}" if r.prune.size is None else f"prune.size={r.prune.size}"
        raise ValueError(f"{how} with extend.rank={r.extend.rank}: {error}") from None
    kept = [(g, rank) for g, rank in zip(shapes, found, strict=True) if rank is not None]
    return {n: rank if g.is_table else rank + more for g, rank in kept for n in g.names}


def _stages(r, task, model, shapes, keep, rates, processes, known):
    """Every Stage of one row, in order; known: those of other rows, by what they depend on; it grows."""
    targeted = sum(g.dense_cost for g in shapes)
    after = keep * targeted
    stages = []

    def add(stage, *options):
        stages.append(dataclasses.replace(stage, options=repr(options)))

    def once(key, make):
        if key not in known:
            known[key] = make()
        return known[key]

    def train(name, options, seed, trains, bases=None, sharded=True):
        taught = {"teacher": r.teacher, "soft_labels": r.soft_labels}
        step = functools.partial(training_step, model.config, trains=trains, bases=bases, **taught)
        make = functools.partial(_training, name, options, task, seed, step, rates, processes, sharded)
        return once(repr((name, options, taught, bases)), make)

    def label(stage):
        if examples := examples_to_label(r, task, stage):
            add(_labels(examples, task, model, rates), r.teacher, r.soft_labels, examples)

    if r.tune.steps:
        add(train("tune", r.tune, r.seed, trainable), r.tune)
    add(once(repr(r.decompose), lambda: _decomposition(r, task, model, shapes, rates)), r.decompose)
    if r.learn.steps:
        label("learn")
        learned = _bases(r, model, shapes, {n: g.rank for g in shapes for n in g.names}, weighted=1, new=r.learn.new)
        stage = train("learn", r.learn, r.seed, functools.partial(weights, rest=r.learn.rest), learned, False)
        if r.learn.rounds and keep < 1:  # what is alive shrinks from cut to cut
            cut = [g for g in shapes if not g.is_table]
            less = 4 * _tokens_read(r.learn, task, r.seed, model, cut) * _set_aside(r.learn, keep, cut)
            shorter = stage.seconds * (1 - less / stage.flops)
            stage = dataclasses.replace(stage, flops=stage.flops - less, seconds=shorter)
        add(stage, r.learn, r.decompose, r.sizes or r.prune)
    if SCORES[r.prune.score].derivatives and not (r.learn.steps and r.learn.rounds):
        # Two gradients of the full set of bases for every probe, in fp32.
        tokens = PROBES * _batch_shapes(task, 8, PROBES, r.seed)[2]
        flops = 2 * tokens * 4 * sum(g.basis_cost * g.rank for g in shapes)
        add(Stage("derivatives", PROBES, tokens, flops, 2 * flops / rates["train"]), r.decompose, r.learn)
    cut = (r.decompose, r.learn, r.prune)
    rest = sum(p.numel() for p in model.parameters()) - targeted
    bases = sum(g.basis_cost * g.rank for g in shapes) + rest
    tries = measuring.validations(r, min(model.get_input_embeddings().weight.shape))
    final = _final(r, model, targeted, keep, _saved(r, model))
    add(measuring.pruning(tries, task, bases, final, rates), r.extend.rank, r.dtype, *cut)
    if r.refine.steps:
        tokens = r.refine.steps * _batch_shapes(task, r.refine.batch_size, r.refine.steps, r.seed)[2]
        flops = (2 * targeted + 8 * after) * tokens
        add(Stage("refine", r.refine.steps, tokens, flops, flops / rates["train"]), r.refine, *cut)
    if r.heal.steps:
        label("heal")
        healed = _bases(r, model, shapes, _ranks(r, shapes, keep), cut=True) if keep < 1 else {}
        trains = functools.partial(trainable, embeddings=r.heal.embeddings)
        if r.heal.lora:
            trains = functools.partial(add_adapters, rank=r.heal.lora)
        add(train("heal", r.heal, r.seed + 1, trains, healed), r.heal, *cut)
    return stages


def _tokens_read(options, task, seed, model, shapes):
    """Tokens of a step that the average parameter of these bases sees: the output head sees responses only."""
    (_, _, most), share, tokens = _batch_shapes(task, options.batch_size, options.steps, seed)
    head = module_name(model, model.get_output_embeddings())
    read = sum(g.basis_cost * g.rank * (most * share[1] if head in g.names else tokens) for g in shapes)
    return read / sum(g.basis_cost * g.rank for g in shapes)


def _set_aside(options, keep, shapes):
    """Parameters that `learn` has set aside, summed over its steps."""
    whole, targeted = sum(g.basis_cost * g.rank for g in shapes), sum(g.dense_cost for g in shapes)
    first, total = int(options.unpruned * options.steps), 0
    for step in range(first, options.steps):
        cuts = (step - first) * options.rounds // (options.steps - first) + 1
        total += whole - min(whole, whole * (keep * targeted / whole) ** (cuts / options.rounds))
    return total


def _training(name, options, task, seed, step_at, rates, processes, sharded):
    """The Stage of a verb that trains, on `processes` of which each takes its part of every batch."""
    shape, share, tokens = _batch_shapes(task, options.batch_size, options.steps, seed, processes)
    how = {"precision": options.precision, "checkpointing": options.checkpointing}
    how["taught"] = getattr(options, "kl", 0) > 0
    step = step_at(shape, **how)
    flops = options.steps * processes * _average(step, share)
    parts = processes if sharded else 1
    memory = _memory(step, parts, step.held)
    later = _batch_shapes(task, options.batch_size, options.steps, seed, processes, first=1)[0]
    if later != shape:  # the largest batch comes first, before there are optimizer states
        after = step_at(later, **how)
        memory = max(_memory(step, parts, step.held - step.states), _memory(after, parts, after.held))
    return Stage(name, options.steps, options.steps * tokens, flops, flops / rates["train"] / processes, memory)


def _memory(step, parts, held):
    """Bytes of a step for one of `parts` processes: weights, states and gradients shared, but the layers at work."""
    if parts == 1:
        return held + step.passing
    return held / parts + step.passing + step.gradients * (1 / parts - 1) + 2 * step.block


def _labels(examples, task, model, rates):
    """The Stage of one pass of the parent over the training examples of these indices."""
    rows = [task.train[i] for i in examples]
    tokens, responses = sum(len(e.input_ids) for e in rows), sum(len(e.input_ids) - e.start for e in rows)
    body = sum(m.weight.numel() for m in targets(model).values() if m is not model.get_output_embeddings())
    flops = 2 * tokens * body + 2 * responses * model.get_output_embeddings().weight.numel()
    return Stage("soft_labels", None, tokens, flops, flops / rates["train"])


def _decomposition(r, task, model, shapes, rates):
    uses = METRICS[r.decompose.metric]
    size = min(EXAMPLES_TOGETHER, r.decompose.examples)
    steps = -(-min(r.decompose.examples, len(task.train)) // size)
    shape, share, tokens = _batch_shapes(task, size, steps, 0)
    total = sum(p.numel() for p in model.parameters())
    collected = _moments(r, shapes, total) if uses.inputs or uses.outputs else []
    # Half of a Gram matrix is computed: one multiplication and one addition for every entry.
    moments, passing = steps * tokens * sum(collected) / 4, 0
    if collected:
        step = moments_step(model.config, shape)
        moments += len(collected) * steps * _average(step, share)
        passing = step.passing
    # The metric and half of a Gram matrix of the smaller side, its eigenvectors, one more product: in float64.
    svd = sum(2 * bool(uses.outputs) * g.square * g.rank + 4 * g.dense_cost * g.rank + 10 * g.rank**3 for g in shapes)
    widest = max(shapes, key=lambda g: g.dense_cost)
    work = 8 * (4 * widest.dense_cost + 4 * widest.rank**2 + bool(uses.outputs) * widest.square)
    factors = 4 * sum(g.basis_cost * g.rank for g in shapes)
    # Weights read from a file stay mapped until the last of them is replaced. What activations leave free in the heap
    # stays with the process and takes up factors, but not float64 work, whose blocks are mapped anew.
    memory = 4 * total + max(collected, default=0) + max(passing, factors) + work
    if len(collected) > 1:
        memory += passing  # beside the factors of earlier passes
    seconds = moments / rates["train"] + svd / rates["float64"]
    return Stage("decompose", None, len(collected) * steps * tokens or None, moments + svd, seconds, memory)


def _bases(r, model, shapes, ranks, cut=False, **more):
    """What checkpoint/format.py needs to build a model with these ranks."""
    names = [[n for n in g.names if n in ranks] for g in shapes if not g.is_table]
    layers = {n: ranks[n] for group in names for n in group}
    found = {"ranks": layers, "groups": [g for g in names if len(g) > 1], **more}
    if r.decompose.embedding:
        table = model.get_input_embeddings()
        name, rank = module_name(model, table), min(table.weight.shape)
        if cut and r.prune.keep_embedding is not None:
            rank = table_rank(r.prune.keep_embedding, *table.weight.shape, r.prune.multiple_of)[0]
        elif cut:
            rank = ranks.get(name)
        if rank is not None:
            tied = model.get_output_embeddings().weight is table.weight
            found["embedding"] = {"name": name, "rank": rank, "tied": tied}
    return found


def _batch_shapes(task, batch_size, steps, seed, processes=1, first=0):
    """Of a stage's batches, from the `first` on if there are more: the largest (rows, length, responses), what share
    of its tokens and of its responses the average has, and the average's tokens, padding counted.

    The shape is what one of `processes` sees, the tokens are those of all.
    """
    steps = min(steps, 64)
    batches = list(Batches(task.train, batch_size, steps, seed))
    batches = batches[first:] or batches
    tokens = [b["input_ids"].numel() for b in batches]
    responses = [len(b["targets"]) for b in batches]
    length = max(b["input_ids"].shape[1] for b in batches)
    rows = -(-batch_size // processes)
    share = (sum(tokens) / len(batches) / (batch_size * length), sum(responses) / len(batches) / max(responses))
    return (rows, length, -(-max(responses) // processes)), share, round(sum(tokens) / len(batches))


def _average(step, share):
    """FLOPs of an average step from those of the largest."""
    return step.flops * share[0] + step.head_flops * share[1]
