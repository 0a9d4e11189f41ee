"""Runs a recipe stage by stage on disk.

Every stage reads checkpoints and writes one folder, `stages/NAME-KEY`, where KEY is a digest of the stage's
options and of everything upstream. A folder appears by rename when it is whole, so whatever is there is
done: a killed run continues with the same command, a changed option repeats only what depends on it, and compared
rows share the stages they have in common. State passes between stages only through disk, which makes a resumed run
bit-identical to an undisturbed one.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, set_seed

from . import processes
from . import recipe as recipes
from .checkpoint.checks import weight_hash
from .checkpoint.files import save, verify
from .checkpoint.format import dense_on_meta
from .decompose import decompose
from .derivatives import derivatives
from .evaluation.accuracy import compare, evaluate
from .evaluation.report import curve, table
from .evaluation.run_report import report
from .evaluation.speed import decode_speed
from .extend import extend
from .heal import heal
from .learn import learn
from .linalg.scores import SCORES
from .models import config_and_tokenizer, load
from .plan import check_budget, keep_of, require_decoder
from .prune import prune
from .reading import read_json, read_lines
from .refine import refine
from .rundir import (
    alone,
    check_stages,
    environment,
    fingerprint,
    forget_peak_memory,
    peak_memory,
    publish,
    replace_text,
    require_disk,
    require_own,
    settle,
    sweep,
)
from .sizes import sizes
from .stage_work import (
    decompose_in_each,
    examples_to_label,
    label_in_each,
    load_here,
    measured,
    sendable,
    train_in_each,
)
from .tasks import load_task
from .training.precision import fast_bf16
from .tune import tune
from .tuned_on import remember

log = logging.getLogger(__name__)


def run(recipe, folder, shard=False):
    """Run `recipe` in `folder`, continuing whatever is there; returns the results, also written to results.json.

    The folder receives recipe.yaml (every default written out), manifest.json, metrics.jsonl, stages/, final/
    (the checkpoint), results.json, results.md and report.html; for a recipe with `sizes` also final-SIZE/, curve.csv
    and curve.png. What an earlier run published stays until all of this one is there, and only what a run wrote is
    replaced. Of several processes the first runs this and the others train with it (processes.lead); `shard` spreads
    parent, model and optimizer over them while they tune and heal. Raises ValueError, before any work, if another run
    uses the folder, if it holds a damaged stage or files of somebody else where the run would write.
    """
    folder = Path(folder)
    require_own(folder, recipe.model)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        (folder / "stages").mkdir(exist_ok=True)
        sweep(folder)
        check_stages(folder)
        stages = Stages(recipe, folder, shard)
        rows = {recipes.RESULT: recipe, **recipe.family(), **recipe.variants()}
        loaded = stages.loaded()
        for row in rows.values():  # what cannot be met is said before hours are spent on tuning
            check_budget(row, loaded / "model", stages.task)
        finals = {"parent": stages.final(stages.parent())}
        for name, row in rows.items():
            finals[name] = stages.final(stages.compressed(row))
        evaluations = {name: stages.evaluated(final) for name, final in finals.items()}
        speeds = stages.timed(finals)
        results = {
            name: _row(name, finals[name], evaluations[name], evaluations["parent"], speeds[name]) for name in finals
        }
        results[recipes.RESULT]["reloaded"] = verify(finals[recipes.RESULT] / "model")
        (folder / "results.json").unlink(missing_ok=True)  # no push says of new weights what is true of the old ones
        publish(finals[recipes.RESULT], folder / "final")
        for size, name in zip(recipe.sizes, recipe.family(), strict=True):
            publish(finals[name], folder / f"final-{size}")
        manifest = _manifest(recipe, stages.parent(), finals[recipes.RESULT], stages.task)
        replace_text(folder / "recipe.yaml", recipes.write(recipe))
        replace_text(folder / "manifest.json", json.dumps(manifest, indent=1))
        replace_text(folder / "results.md", table(results))
        replace_text(folder / "results.json", json.dumps(results, indent=1))
        if recipe.sizes:
            curve({name: results[name] for name in ("parent", recipes.RESULT, *recipe.family())}, folder)
        report(folder)
    return results


class Stages:
    """The chain of stages of one recipe and its rows; every method returns the folder of a finished stage."""

    def __init__(self, recipe, folder, shard=False):
        self.recipe, self.folder, self.shard = recipe, folder, shard and processes.count() > 1

    @cached_property
    def source(self):
        """What tells one state of the model from another: contents of local files, the revision of one on the hub.

        Raises ValueError if it is an encoder.
        """
        model = self.recipe.model
        config, _ = config_and_tokenizer(model)
        require_decoder(config, model)
        return {"model": model, "revision": getattr(config, "_commit_hash", None), "files": fingerprint(model)}

    def loaded(self):
        """The model as it came, in fp32."""
        source = self.recipe.model

        def work(out):
            model, tokenizer = load(source, "float32")
            save(model, tokenizer, out / "model")
            return {"sizes": sizes(model, out / "model")}

        return self.stage("load", self.source, [], work)

    def parent(self):
        """The dense model that the task runs well on, in fp32."""
        r, loaded = self.recipe, self.loaded()
        if not r.tune.steps:
            return loaded
        return self.stage("tune", r.tune, [loaded], lambda out: self.train(tune, loaded, out, r.tune))

    def decomposed(self, r, moments=lambda: None):
        parent = self.parent()

        def work(out):
            if self.shard:  # a whole copy in every process is what must not be
                return self.change(decompose, parent, out, r.decompose, self.task, moments())
            options = dataclasses.asdict(r.decompose)
            return processes.everywhere(decompose_in_each, parent, sendable(self.task), moments(), out, options)

        return self.stage("decompose", r.decompose, [parent], work)

    def compressed(self, r):
        """The compressed model of one row, in fp32."""
        parent, made = self.parent(), self.decomposed(r)
        if r.learn.steps:
            made = self.learned(r, made)
        made = self.pruned(r, made)
        if r.extend.rank:
            pruned = made
            made = self.stage(
                "extend",
                r.extend,
                [pruned, parent],
                lambda out: self.change(
                    extend,
                    pruned,
                    out,
                    r.extend,
                    self.task,
                    load_here(parent / "model")[0] if r.extend.init == "residual" else None,
                    r.seed,
                ),
            )
        if r.refine.steps:
            rough = made
            made = self.stage(
                "refine",
                r.refine,
                [rough, parent],
                lambda out: self.change(
                    refine, rough, out, r.refine, self.task, load_here(parent / "model")[0], r.seed
                ),
            )
        if not r.heal.steps:
            return made
        teacher = self.teacher(r, "heal")
        return self.stage(
            "heal",
            {**dataclasses.asdict(r.heal), "teacher": r.teacher},
            [made, teacher],
            lambda out: self.train(heal, made, out, r.heal, (teacher, r.teacher)),
        )

    def learned(self, r, decomposed):
        teacher = self.teacher(r, "learn")
        cuts = self.cuts(r)
        return self.stage(
            "learn",
            {**dataclasses.asdict(r.learn), "teacher": r.teacher, **cuts},
            [decomposed, teacher],
            lambda out: self.train(learn, decomposed, out, r.learn, (teacher, r.teacher), **cuts),
        )

    def teacher(self, r, stage):
        """Where "learn" or "heal" finds its teacher: the parent, or what it says of the examples seen.

        Stages that see the same ones share what is said of them.
        """
        parent = self.parent()
        examples = examples_to_label(r, self.task, stage)
        if not examples:
            return parent
        found = {"top": r.soft_labels, "teacher": r.teacher}
        digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()

        def work(out):
            for part in out.iterdir():  # of more processes, killed while they wrote
                part.unlink()
            task = sendable(dataclasses.replace(self.task, train=[self.task.train[i] for i in examples]))
            processes.everywhere(label_in_each, parent, r.teacher, self.shard, task, r.soft_labels, out)

        return self.stage("soft_labels", {**found, "examples": digest}, [parent], work)

    def pruned(self, r, source):
        arguments = self.task, self.derivatives(r, source), r.extend.rank, r.dtype, r.seed
        costs = {"costs": fingerprint(r.prune.costs)} if r.prune.costs else {}
        return self.stage(
            "prune",
            {**dataclasses.asdict(r.prune), "reserve": r.extend.rank, "dtype": r.dtype, **costs},
            [source],
            lambda out: self.change(prune, source, out, r.prune, *arguments),
        )

    def derivatives(self, r, source):
        """What `prune` needs of the loss at `source`: computed once for all sizes. None if its score needs nothing."""
        if not SCORES[r.prune.score].derivatives or (r.learn.steps and r.learn.rounds):
            return None

        def work(out):
            model, _ = load_here(source / "model")
            found = derivatives(model, self.task, r.seed)
            tensors = {f"{i:04}.{name}": d for i, pair in enumerate(found) for name, d in zip("gh", pair, strict=True)}
            save_file(tensors, out / "derivatives.safetensors")

        tensors = load_file(self.stage("derivatives", {}, [source], work) / "derivatives.safetensors")
        return [(tensors[f"{i:04}.g"], tensors[f"{i:04}.h"]) for i in range(len(tensors) // 2)]

    def cuts(self, r):
        """How far `learn` prunes: to the smallest of the recipe's sizes. Nothing where the size is yet to be found."""
        if not r.learn.rounds or r.prune.max_drop is not None or r.prune.latency is not None:
            return {}
        how = {k: getattr(r.prune, k) for k in ("budget", "score", "multiple_of")} | {"reserve": r.extend.rank}
        if r.prune.mass is not None:
            return {"mass": r.prune.mass, **how}
        dense = dense_on_meta(config_and_tokenizer(self.loaded() / "model")[0])
        targeted = read_json(self.loaded() / "stage.json")["sizes"]["targeted"]
        return {"keep": min(keep_of(row, dense, targeted) for row in (r, *r.family().values())), **how}

    def final(self, stage):
        """The checkpoint of a stage in the dtype that is published and evaluated."""

        def work(out):
            model, tokenizer = load(stage / "model")
            save(model, tokenizer, out / "model", self.recipe.dtype)
            return {"sizes": sizes(model, out / "model")}

        return self.stage("save", {"dtype": self.recipe.dtype}, [stage], work)

    def load_final(self, final):
        """A published checkpoint, in fp32 where the device would only emulate its dtype: the values are the same."""
        native = self.recipe.dtype == "bfloat16" and fast_bf16(processes.device())
        return load_here(final / "model", None if native else "float32")

    def evaluated(self, final):
        def work(out):
            result = evaluate(*self.load_final(final), self.task)
            replace_text(out / "evaluation.json", json.dumps(result, indent=1))

        return read_json(self.stage("evaluate", {}, [final], work) / "evaluation.json")

    def timed(self, finals):
        def work(out):
            speeds = decode_speed({name: self.load_final(final)[0] for name, final in finals.items()})
            replace_text(out / "speed.json", json.dumps(speeds, indent=1))

        return read_json(self.stage("time", {}, list(finals.values()), work) / "speed.json")

    def change(self, verb, source, out, options, *arguments):
        """A verb without training: `verb(model, *arguments, **options)`."""
        model, tokenizer = load_here(source / "model")
        verb(model, *arguments, **dataclasses.asdict(options))
        remember(model, self.task.train, self.task.validation)
        save(model, tokenizer, out / "model")
        return measured(model, self.task, out)

    def train(self, verb, source, out, options, parent=None, **more):
        """A verb that trains, in all processes: `verb(model, task[, teacher], folder=, seed=, **options)`.

        parent: the stage and the dtype of the teacher.
        """
        options = {"seed": self.recipe.seed, **dataclasses.asdict(options), **more}
        return processes.everywhere(train_in_each, verb, source, parent, sendable(self.task), out, options, self.shard)

    @cached_property
    def task(self):
        tokenizer = AutoTokenizer.from_pretrained(self.loaded() / "model", trust_remote_code=False)
        return load_task(self.recipe.task, tokenizer, self.recipe.seed, **dataclasses.asdict(self.recipe.data))

    @cached_property
    def data_key(self):
        """A digest of the examples themselves, however their source was edited, and of how they are scored."""
        r, splits = self.recipe, (self.task.train, self.task.validation, self.task.test)
        examples = [[dataclasses.astuple(e) for e in split] for split in splits]
        data = [r.task, r.seed, dataclasses.asdict(r.data), examples, self.task.stops]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def stage(self, name, options, upstream, work):
        """The folder `stages/name-key`; `work(partial_folder)` fills it, unless it is there already."""
        options = options if isinstance(options, dict) else dataclasses.asdict(options)
        given = [name, options, [u.name for u in upstream], self.data_key if upstream else None]
        key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]
        target = self.folder / "stages" / f"{name}-{key}"
        if target.exists():
            return target
        log.warning("%s", target.name)
        require_disk(target.parent, upstream)
        partial = target.with_name(f".{target.name}")
        partial.mkdir(exist_ok=True)
        if (partial / "model").exists():  # killed between its last two writes
            shutil.rmtree(partial / "model")
        forget_peak_memory()
        began = time.monotonic()
        set_seed(self.recipe.seed)
        facts = {
            "stage": name,
            "options": options,
            "upstream": [u.name for u in upstream],
            "made_with": environment(),
            **(work(partial) or {}),
        }
        facts |= {"seconds": round(time.monotonic() - began, 2), "peak_memory_bytes": peak_memory()}
        if (partial / "model").exists():
            facts["weights_sha256"] = weight_hash(partial / "model")
        replace_text(partial / "stage.json", json.dumps(facts, indent=1))
        shutil.rmtree(partial / "training", ignore_errors=True)
        settle(partial)
        partial.rename(target)
        _collect_metrics(self.folder)
        return target


def _row(name, final, evaluation, parent, speed):
    facts = read_json(final / "stage.json")
    return {
        "accuracy": evaluation["accuracy"],
        "nll": evaluation["nll"],
        "n": evaluation["n"],
        "sizes": facts["sizes"],
        "decode_tokens_per_second": speed,
        "paired": compare(parent, evaluation) if name != "parent" and evaluation["accuracy"] else None,
        "stages": _history(final),
        "weights_sha256": facts["weights_sha256"],
    }


def _history(stage):
    """`[{stage, seconds, peak_memory_bytes, validation_nll}, ...]` of everything a checkpoint came from, in order."""
    seen = {}

    def visit(path):
        facts = read_json(path / "stage.json")
        for name in facts["upstream"]:
            if name not in seen:
                visit(path.parent / name)
        seen[path.name] = {
            "stage": path.name,
            **{k: facts.get(k) for k in ("seconds", "peak_memory_bytes", "validation_nll")},
        }

    visit(stage)
    return list(seen.values())


def _collect_metrics(folder):
    lines = []
    for path in sorted(folder.glob("stages/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime):
        lines += [json.dumps({"stage": path.parent.name, **row}) for row in read_lines(path)]
    replace_text(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))


def _manifest(recipe, parent, result, task):
    encoded = json.dumps([[e.input_ids for e in split] for split in (task.train, task.validation, task.test)])
    return {
        **_made_with(result),
        "seed": recipe.seed,
        "parent_weights_sha256": read_json(parent / "stage.json")["weights_sha256"],
        "data_sha256": hashlib.sha256(encoded.encode()).hexdigest(),
        "data": {
            "train": len(task.train),
            "validation": len(task.validation),
            "test": len(task.test),
            **task.report,
        },
    }


def _made_with(result):
    """`environment()` of the stages that `result` came from; where they differ, each one's, joined by commas."""
    made = [read_json(result.parent / stage["stage"] / "stage.json").get("made_with", {}) for stage in _history(result)]
    names = {name: None for one in made for name in one.get("versions", {})}
    versions = {name: _joined(one.get("versions", {}).get(name) for one in made) for name in names}
    return {"versions": versions, **{key: _joined(one.get(key) for one in made) for key in ("python", "machine")}}


def _joined(values):
    return ", ".join(dict.fromkeys(value or "unknown" for value in values))
