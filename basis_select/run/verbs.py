"""How stages call their verbs: `run_NAME` on the Work of a process, `NAME_options` and `say_NAME` on a View."""

from ..checkpoint.models import load
from ..data.tasks import Task
from ..decompose import decompose
from ..evaluation.accuracy import evaluate
from ..evaluation.speed import decode_speed
from ..extend import extend
from ..heal import heal, probes, suitable_rate
from ..learn import learn
from ..linalg.scores import SCORES
from ..prune import prune
from ..refine import refine
from ..statistics.derivatives import derivatives
from ..training.soft_labels import SoftLabels, seen, soft_labels
from ..tune import tune
from .directory import fingerprint
from .recipe import Recipe
from .room import is_table, trimmed
from .view import View, own
from .work import Work


def run_load(work: Work) -> None:
    work.model, work.tokenizer = load(work.recipe.model, "float32")


def run_tune(work: Work) -> None:
    tune(work.model, work.task, work.folder, work.recipe.seed, **own(work.recipe.tune))


def trim_options(view: View) -> dict | None:
    trim = view.recipe.trim
    if trim.tokens == "all":
        return None
    return own(trim) | ({"text": fingerprint(trim.text)} if trim.text else {})


def run_trim(work: Work) -> None:
    made = trimmed(work.recipe, work.model, work.tokenizer, work.task)
    work.model, work.tokenizer, work.task, report = made
    work.facts = {"trimmed": report}


def say_decompose(view: View) -> str:
    groups = sum(not is_table(group) for group in view.groups)
    table = ", and the embedding," if view.recipe.decompose.embedding else ""
    return f"write {groups:,} groups of {len(view.layers):,} layers{table} as bases"


def run_decompose(work: Work) -> None:
    decompose(work.model, work.task, work.moments(), work.group, **own(work.recipe.decompose))


def examples_to_label(row: Recipe, task: Task, name: str) -> list[int]:
    """Indices of the training examples that "learn" or "heal" of a recipe wants soft labels of; none if it wants none.

    Healing draws other batches than learning, and looks at `probes` where it chooses its own rate.
    """
    options, healing = getattr(row, name), name == "heal"
    if not row.soft_labels or not options.steps:
        return []
    more = probes(task, row.seed) if healing and options.lr is None else ()
    if not (options.kl or more):
        return []
    return sorted(seen(task, options.batch_size, options.steps, row.seed + healing) | set(more))


def run_label(work: Work, name: str) -> SoftLabels:
    examples = examples_to_label(work.recipe, work.task, name)
    return soft_labels(work.teacher, work.only(examples), work.recipe.soft_labels)


def learn_options(view: View) -> dict | None:
    if not view.recipe.learn.steps:
        return None
    return {**own(view.recipe.learn), "teacher": view.recipe.teacher, **view.cuts}


def run_learn(work: Work) -> None:
    options = {name: value for name, value in work.options.items() if name != "teacher"}  # which is its dtype
    learn(work.model, work.task, work.teacher, work.folder, work.recipe.seed, **options)


def derivatives_options(view: View) -> dict | None:
    """None if the score of `prune` needs nothing of the loss, or goes by the cuts that learning has made."""
    r = view.recipe
    return {} if SCORES[r.prune.score].derivatives and not (r.learn.steps and r.learn.rounds) else None


def run_derivatives(work: Work) -> list:
    return derivatives(work.model, work.task, work.recipe.seed)


def prune_options(view: View) -> dict:
    r = view.recipe
    costs = {"costs": fingerprint(r.prune.costs)} if r.prune.costs else {}
    return {**own(r.prune), "reserve": r.extend.rank, "dtype": r.dtype, **costs}


def say_prune(view: View) -> str:
    asked = {name: value for name, value in own(view.recipe.prune).items() if value is not None}
    words = {
        "keep": "{:.3g} of the parameters of the layers stay",
        "size": "the whole model becomes {} smaller" if str(asked.get("size")).endswith("x") else "{} stay in all",
        "max_drop": "as few as possible for a loss of at most {:g} nats per token",
        "mass": "{:.3g} of the scores of every layer stay",
        "latency": "as many as a speed of {} allows",
    }
    (how,) = (text.format(asked[name]) for name, text in words.items() if name in asked)
    return f"keep the best bases; {how}"


def run_prune(work: Work) -> None:
    r = work.recipe
    prune(work.model, work.task, work.derivatives, r.extend.rank, r.dtype, r.seed, **own(r.prune))


def run_extend(work: Work) -> None:
    r = work.recipe
    parent = work.parent if r.extend.init == "residual" else None
    extend(work.model, work.task, parent, r.seed, **own(r.extend))


def run_refine(work: Work) -> None:
    refine(work.model, work.task, work.parent, work.recipe.seed, **own(work.recipe.refine))


def heal_options(view: View) -> dict | None:
    return {**own(view.recipe.heal), "teacher": view.recipe.teacher} if view.recipe.heal.steps else None


def run_heal(work: Work) -> None:
    teacher, seed, options = work.teacher, work.recipe.seed, own(work.recipe.heal)
    if work.spread and options["lr"] is None:
        # On a copy, because FSDP stays with the dtype in which a model was first used.
        options["lr"] = suitable_rate(work.fresh(), work.task, teacher, seed)
    apart = work.sharded and not (work.spread or options["lora"])  # what trains of a model that was read whole
    heal(work.model, work.task, teacher, work.folder, seed, apart, **options)


def run_save(work: Work) -> None:
    """Nothing: what was read is written in another dtype."""


def run_evaluate(work: Work) -> dict:
    return evaluate(work.model, work.tokenizer, work.task)


def run_time(work: Work) -> dict:
    return decode_speed(work.finals())
