"""report.html of one run: reads the files of its folder, never a whole model, and puts the blocks of html.py together.

Every section is a function of the run: it returns `(explanation, blocks)`, or a sentence why there is nothing to show.
"""

import dataclasses
from pathlib import Path

import yaml
from markupsafe import Markup

from ..evaluation import figures, html, spectra
from ..evaluation.report import ALIGN, HEAD, cells, interval, peak
from ..system.reading import misfit, read_json, read_lines, read_yaml
from ..system.writing import replace_text
from .directory import INTERVAL, SIZES, check_stages
from .recipe import RESULT, SECTIONS, Recipe

TRAINED = ("tune", "learn", "refine", "heal")
ROW = {
    "accuracy": (dict, type(None)),
    "nll": INTERVAL,
    "n": int,
    "sizes": SIZES,
    "decode_tokens_per_second": {"median": float, "low": float, "high": float},
    "paired": (dict, type(None)),
    "stages": [{"stage": str, "seconds": float, "peak_memory_bytes": int}],
    "weights_sha256": str,
}
SPECTRA = 6  # layers whose weights are drawn


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    results: dict  # of results.json: {row: facts}
    recipe: dict  # of recipe.yaml, empty without one

    def stage(self, row: str, kind: str) -> Path | None:
        """The folder of the stage of that kind that a row came through, or None if there is none or it is gone."""
        for stage in self.results[row]["stages"]:
            path = self.folder / "stages" / stage["stage"]
            if stage["stage"].startswith(f"{kind}-") and path.is_dir():
                return path
        return None

    def evaluation(self, row: str) -> dict | None:
        """What `evaluate` found for a row, item by item, or None."""
        final = self.results[row]["stages"][-1]["stage"]
        for path in self.folder.glob("stages/evaluate-*"):
            if read_json(path / "stage.json")["upstream"] == [final]:
                return read_json(path / "evaluation.json")
        return None


def report(folder: str | Path) -> Path:
    """Write report.html into the folder of a finished run; returns its path. Raises FileNotFoundError if it is none."""
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(f"{folder} holds no results.json: name the folder of a finished run")
    given = folder / "recipe.yaml"
    given = read_yaml(given) if given.exists() else {}
    results = read_json(folder / "results.json", {"parent": dict, RESULT: dict})
    if wrong := misfit(results, {str: ROW}) or _unmeasured(results):
        raise ValueError(f"{folder / 'results.json'} is damaged or was written by something else: {wrong}")
    check_stages(folder)
    if (folder / "manifest.json").exists():
        read_json(folder / "manifest.json")
    _steps(folder)
    run = Run(folder, results, given)
    shown, left_out = [], []
    for heading, section in SECTIONS_OF_A_RUN.items():
        found = section(run)
        if isinstance(found, str):
            left_out.append((heading, found))
        else:
            shown.append((heading, *found))
    title = f"basis_select: {folder.resolve().name}"
    text = html.page(title, verdict(run), numbers(run.results), shown, left_out)
    replace_text(folder / "report.html", text)
    return folder / "report.html"


def _steps(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, none without it."""
    path = folder / "metrics.jsonl"
    return read_lines(path, {"stage": str, "step": int, "loss": float}) if path.exists() else []


def _unmeasured(results: dict[str, dict]) -> str | None:
    """What a row of results lacks beside the shape of ROW, as a phrase."""
    paired, accuracy = dict.fromkeys(("both", "gained", "lost", "neither"), int) | {"p": float}, INTERVAL
    for name, row in results.items():
        for key, shape in (("accuracy", accuracy), ("paired", paired)):
            if row[key] is not None and (wrong := misfit(row[key], shape, f"{name}.{key}")):
                return wrong
        if not row["stages"]:
            return f"{name}.stages is empty"
    return None


def verdict(run: Run) -> str:
    """One sentence: what the result is, how good and how large next to its parent."""
    task, model = (str(run.recipe.get(key, f"this {key}")).partition("#")[0] for key in ("task", "model"))
    parent, result = run.results["parent"], run.results[RESULT]
    if result["accuracy"]:
        old, new = (f"{row['accuracy']['value']:.1%}" for row in (parent, result))
        quality = f"answers {new} of {result['n']} test items, its parent {old}"
    else:
        old, new = (f"{row['nll']['value']:.3f}" for row in (parent, result))
        quality = f"has a negative log-likelihood of {new} per response token, its parent {old}"
    old, new = (row["sizes"]["bytes"] for row in (parent, result))
    return (
        f"On {task}, {model} compressed {quality}, in {new / 1e6:.1f} MB instead of {old / 1e6:.1f} MB "
        f"({old / new:.2f}x fewer bytes)."
    )


def numbers(results: dict[str, dict]) -> Markup:
    """The table under the verdict: quality with 95 % intervals, and the four sizes, next to the parent's."""
    parent, result = results["parent"], results[RESULT]
    old, new, paired = parent["sizes"], result["sizes"], result["paired"]
    lines = []
    if paired:
        change = f"{paired['gained']} items gained, {paired['lost']} lost (p = {paired['p']:.2g})"
        lines.append(["accuracy", *(interval(x["accuracy"], ".1%") for x in (parent, result)), change])
    change = result["nll"]["value"] - parent["nll"]["value"]
    lines.append(["response NLL", *(interval(x["nll"], ".3f") for x in (parent, result)), f"{change:+.3f}"])
    for label, key, unit, form in (
        ("bases", "bases", 1, "{:,.0f}"),
        ("targeted parameters", "targeted", 1e6, "{:.2f} M"),
        ("all parameters", "parameters", 1e6, "{:.2f} M"),
        ("weight bytes", "bytes", 1e6, "{:.1f} MB"),
    ):
        fewer = f"{old[key] / new[key]:.2f}x fewer"
        lines.append([label, form.format(old[key] / unit), form.format(new[key] / unit), fewer])
    caption = f"Parent and result on {result['n']} test items, 95 % intervals in brackets"
    return html.table(("measure", "parent", "result", "change"), lines, "llll", caption)


def recipe(run: Run) -> tuple[str, list[Markup]] | str:
    if not run.recipe:
        return "the folder has no recipe.yaml"
    default = dataclasses.asdict(Recipe("", ""))
    short = {}
    for key, value in run.recipe.items():
        if key in SECTIONS:
            value = {name: v for name, v in value.items() if default[key].get(name) != v}
        if value != default.get(key) and value not in ({}, []):
            short[key] = value
    full = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    return (
        "The command repeats the run if recipe.yaml holds this recipe. Keys that it does not name have their defaults.",
        [
            html.code(f"basis-select run recipe.yaml --out {run.folder.resolve().name}"),
            html.code(yaml.safe_dump(short, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)),
            html.details("The same with every default written out", html.code(full)),
        ],
    )


def quality(run: Run) -> tuple[str, list[Markup]]:
    series = {"nll": {}, "accuracy": {}}
    for name, row in run.results.items():
        line = RESULT if name.startswith(f"{RESULT} at ") else name  # further sizes of the same learning
        for key, lines in series.items():
            if row[key]:
                x = row[key]
                lines.setdefault(line, []).append((row["sizes"]["bytes"], x["value"], x["low"], x["high"]))
    drawn = []
    for key, label, better in (("nll", "NLL per response token", "lower"), ("accuracy", "Accuracy", "higher")):
        if series[key]:
            title = f"{label} on the test split against bytes of the weights"
            drawn.append((figures.svg(title, figures.quality, series[key], label), f"{title}; {better} is better."))
    return (
        "Each mark is a model of this run, the parent among them; bars are 95 % intervals "
        "(Wilson for accuracy, bootstrap over items for NLL). Left is smaller.",
        [html.figures(*drawn)],
    )


def rows(run: Run) -> tuple[str, list[Markup]]:
    caption = f"Models of this run, measured on the same {run.results['parent']['n']} test items"
    return (
        "NLL is the negative log-likelihood per response token in nats. Gained and lost are test items against the "
        "parent, with McNemar's exact p: small where the difference is no accident. Targeted parameters are those of "
        "the linear layers that are decomposed.",
        [html.table(HEAD, [cells(name, row) for name, row in run.results.items()], ALIGN, caption)],
    )


def ranks(run: Run) -> tuple[str, list[Markup]] | str:
    maps = []
    for name in run.results:
        decomposed, final = run.stage(name, "decompose"), run.stage(name, "save")
        if decomposed and final:
            modules, extra = spectra.layers(spectra.bases_of(decomposed), spectra.bases_of(final))
            text = f"Ranks of {name}"
            maps.append(html.details(text, html.heat(modules, extra, text), opened=not maps))
    if not maps:
        return "the folders of the stages decompose and save are not there"
    return (
        "How many bases each layer kept, darker for a larger share of full rank; dense layers were worth more whole "
        "than as bases. Modules with an orange line read one tensor and share one v, stored once.",
        maps,
    )


def weights(run: Run) -> tuple[str, list[Markup]] | str:
    kinds = {stage["stage"].rpartition("-")[0] for stage in run.results[RESULT]["stages"]}
    decomposed, learned, pruned = (run.stage(RESULT, kind) for kind in ("decompose", "learn", "prune"))
    if not (decomposed and pruned and (learned or "learn" not in kinds)):
        return "the folders of the stages decompose, learn and prune are not there"
    before, after = spectra.weights(decomposed), spectra.weights(learned) if learned else {}
    ranks = spectra.kept_ranks(decomposed, pruned)
    known = read_json(pruned / "stage.json")["options"]["score"] in ("energy", "magnitude")
    marked = spectra.kept(after or before, ranks) if known else {}
    names = sorted((n for n in before if n in ranks), key=lambda n: ranks[n] / len(before[n][0]))
    names = [names[round(i * (len(names) - 1) / (SPECTRA - 1))] for i in range(SPECTRA)] if names else []
    drawn = []
    for name in dict.fromkeys(names):
        s, now = before[name][0], after[name][0] if after else None
        what = name if name in spectra.bases_of(decomposed)["ranks"] else f"{name} (token embedding)"
        title = f"{what}: {ranks[name]} of {len(s)} bases kept"
        drawn.append((figures.svg(title, figures.spectrum, s, now, marked.get(name)), title))
    if not drawn:
        return "all layers stayed dense"
    why = (
        "The weight of every basis of some layers of the result, from the layer that kept the smallest share to the "
        f"one that kept the largest: the line as decomposed, the marks {'as learned' if after else 'as pruned'}."
    )
    if not known:
        why += " Which ones were kept is not marked, because the score of this run is no function of the weights."
    return why, [html.figures(*drawn)]


def changes(run: Run) -> tuple[str, list[Markup]] | str:
    if run.results["parent"]["accuracy"] is None:
        return "the task does not score answers, so that none is gained or lost"
    found = {name: run.evaluation(name) for name in run.results}
    if None in found.values():
        return "the folders of the stage evaluate are not there"
    parent = found.pop("parent")
    blocks = []
    for name, evaluation in found.items():
        moved = {"gained": [], "lost": []}
        for a, b in zip(parent["items"], evaluation["items"], strict=True):
            if a["correct"] != b["correct"]:
                answers = {"parent": a["generated"], name: b["generated"]}
                moved["gained" if b["correct"] else "lost"].append(
                    {"prompt": a["prompt"], "expected": a["answer"], **answers}
                )
        blocks += [html.items(f"{name}: {len(x)} {kind}", x) for kind, x in moved.items() if x]
    return (
        "Test items that the parent answers wrongly and a smaller model rightly (gained), or the other way (lost).",
        blocks or [html.paragraph("No item was gained or lost.")],
    )


def cost(run: Run) -> tuple[str, list[Markup]]:
    rates, memory, stages, users = [], [], {}, {}
    for name, row in run.results.items():
        x = row["decode_tokens_per_second"]
        text = f"{x['median']:.1f} ({x['low']:.1f} to {x['high']:.1f})"
        rates.append((name, text, x["median"], x["low"], x["high"]))
        memory.append((name, f"{peak(row) / 2**30:.2f}", peak(row), None, None))
        for stage in row["stages"]:
            stages[stage["stage"]] = stage["seconds"]
            users.setdefault(stage["stage"], []).append(name)
    every = len(run.results)
    seconds = [
        (f"{key.rpartition('-')[0]} ({'all rows' if len(users[key]) == every else ', '.join(users[key])})",
         f"{s:.1f}", s, None, None)
        for key, s in stages.items()
    ]  # fmt: skip
    total = f"Time of the stages, {sum(stages.values()):,.0f} s together"
    speed_and_memory = [
        html.bars(("model", "tokens/s, median (range)"), rates, "Decoding speed; more is better"),
        html.bars(("model", "GiB"), memory, "Peak memory while making it; less is better"),
    ]
    return (
        "Speed of greedy decoding at batch 1, the models taking turns in one process (thin line: slowest to fastest "
        "round); memory resident at the worst moment of all stages of a row; time of every stage, once where rows "
        "share it.",
        [html.beside(speed_and_memory, [html.bars(("stage", "seconds"), seconds, total)])],
    )


def training(run: Run) -> tuple[str, list[Markup]] | str:
    lines = _steps(run.folder)
    drawn = []
    for kind in TRAINED:
        users = {}
        for name, row in run.results.items():
            for stage in row["stages"]:
                if stage["stage"].startswith(f"{kind}-"):
                    users.setdefault(stage["stage"], []).append(name)
        runs = {}
        for stage, names in users.items():
            steps = [line for line in lines if line["stage"] == stage]
            if steps:
                runs["all rows" if len(names) == len(run.results) else ", ".join(names)] = steps
        if runs:
            title = f"Loss of every step of {kind}"
            drawn.append((figures.svg(title, figures.training, runs), title))
    if not drawn:
        return "metrics.jsonl has no step of a stage that these rows came through"
    return (
        "The loss is cross-entropy on response tokens, plus the KL distance to the parent where it teaches "
        "(dashed, on its own).",
        [html.figures(*drawn)],
    )


def manifest(run: Run) -> tuple[str, list[Markup]] | str:
    if not (run.folder / "manifest.json").is_file():
        return "the folder has no manifest.json"
    found = read_json(run.folder / "manifest.json")
    pairs = []
    for key, value in found.items():
        pairs += [(f"{key}: {k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    pairs += [(f"weights of {name}, sha256", row["weights_sha256"]) for name, row in run.results.items()]
    if "reloaded" in run.results[RESULT]:
        equal = run.results[RESULT]["reloaded"]["bit_equal"]
        pairs.append(("result, loaded again in a fresh process", "bit-equal" if equal else "differs"))
    why = "What it takes to tell whether another run was the same: versions, seed, data and hashes."
    return why, [html.facts(pairs)]


SECTIONS_OF_A_RUN = {
    "Recipe": recipe,
    "Quality against bytes": quality,
    "Rows": rows,
    "Ranks per layer": ranks,
    "Weights of the bases": weights,
    "Gained and lost": changes,
    "Time and memory": cost,
    "Training": training,
    "Manifest": manifest,
}
