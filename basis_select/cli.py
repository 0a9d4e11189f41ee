"""basis-select: run | plan | keys | inspect | verify | eval | bench | try | profile | report | export | push."""

import functools
import json
import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Changes = Annotated[list[str] | None, typer.Argument(help="section.key=value, changes the recipe")]
MANY = 2**31 - 1
RecipeFile = Annotated[Path, typer.Argument(help="a YAML recipe", show_default=False)]
SILENT = {  # what is said whenever transformers imports its list of quantizers: the logger, and words of the line
    "torchao": "Failed to load ",  # kernels for other GPUs and Pythons
    "torchao.kernel.intmm": "Detected no triton",
    "torch.utils._pytree": " is an Enum subclass and is now natively supported",
}


def main() -> None:
    _set_up()
    app()


def _set_up() -> None:
    """What has to be set before torch and transformers are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of loading and saving; stages keep theirs
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes lines for its makers
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # Threads that spin without end slow each other beside other processes, those that never do are slow to wake
        # (eval/waiting.py). libgomp, torch's on Linux, goes by the second of these, other libraries by the first.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
    for name, words in SILENT.items():
        logging.getLogger(name).addFilter(lambda record, words=words: words not in record.getMessage())


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"error: {sentence}", err=True)
    raise typer.Exit(1) from None


def _command(function: Callable) -> Callable:
    """Register a command whose foreseeable failures are one sentence, not a traceback."""

    @app.command(name=function.__name__.rstrip("_"))
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from safetensors import SafetensorError

        from .checkpoint.cleaning import masked

        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            function(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError, SafetensorError, ImportError) as error:
            _fail(masked(" ".join(str(error).split())))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search("out of memory|allocate.* memory", str(error)):
                raise  # a fault of this package, whose place matters
            _fail(f"the memory of this machine is not enough: {' '.join(str(error).split())[:200] or 'none is left'}")
        except KeyboardInterrupt:
            typer.echo("stopped; the same command continues", err=True)
            raise typer.Exit(130) from None

    return wrapped


@_command
def run(
    recipe: RecipeFile,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="run directory, default runs/RECIPE")] = None,
    shard: Annotated[bool, typer.Option("--shard", help="under torchrun: spread models over the processes")] = False,
) -> None:
    """Compress a model for a task as the recipe says; the same command continues a killed run.

    Under torchrun all processes train together.
    """
    from .system import processes

    def work() -> None:
        read = _recipe(recipe, changes)
        from .run import pipeline
        from .run.terminal import show, what_next

        logging.getLogger(pipeline.__package__).setLevel(logging.INFO)
        folder = out or Path("runs") / recipe.stem
        show(pipeline.run(read, folder, shard))
        typer.echo(what_next(read, folder))

    processes.lead(work)


@_command
def plan(
    recipe: RecipeFile,
    changes: Changes = None,
    processes: Annotated[int, typer.Option(min=1, max=4096, help="how many share the work, a machine each")] = 1,
) -> None:
    """Say what a recipe will do and cost, without doing it."""
    read = _recipe(recipe, changes)
    from .run.plan import plan as make
    from .run.plan import text

    typer.echo(text(make(read, processes)))


@_command
def keys(
    schema: Annotated[bool, typer.Option("--schema", help="write a JSON schema for editors instead")] = False,
) -> None:
    """List the keys of a recipe: what each does, what it may be and its default."""
    from .run import recipe

    if schema:
        typer.echo(json.dumps(recipe.json_schema(), indent=1))
        return
    for section, (does, rows) in recipe.reference().items():
        typer.echo(f"{section or 'outside of sections'}: {does}")
        for key, kind, default, what in rows:
            unsaid = f"default: {default}" if default else "required"
            typer.echo(f"  {section and section + '.'}{key}: {kind} ({unsaid})")
            typer.echo(textwrap.fill(what, 100, initial_indent="      ", subsequent_indent="      "))
        typer.echo()


@_command
def inspect(folder: Annotated[Path, typer.Argument(help="a checkpoint folder")]) -> None:
    """Ranks per layer and the four sizes of a checkpoint."""
    _require_folder(folder)
    from .checkpoint.models import load
    from .sizes import layer_table, sizes

    model, _ = load(folder)
    for row in layer_table(model):
        rank = "dense" if row["rank"] is None else f"rank {row['rank']}"
        widths = f", {' and '.join(f'{n:,} of {bits} bits' for bits, n in row['bits'].items())}" if row["bits"] else ""
        note = f"  shares v of {row['shares']}" if row["shares"] else ""
        typer.echo(f"{row['name']:48} {row['in']:>6} -> {row['out']:<6} {rank}{widths}{note}")
    s = sizes(model, folder)
    typer.echo(f"bases                {s['bases']:,}")
    for name, key in (("targeted parameters", "targeted"), ("all parameters", "parameters")):
        typer.echo(f"{name:20} {s[key]:,} of {s[key + '_dense']:,} ({s[key + '_dense'] / s[key]:.2f}x fewer)")
    typer.echo(f"weight bytes         {s['bytes']:,} ({model.dtype})")


@_command
def verify(folder: Annotated[Path, typer.Argument(help="a checkpoint folder")]) -> None:
    """Check a checkpoint's hashes, if it has any, and compare logits of a fresh process with a load in this one."""
    _require_folder(folder)
    from .checkpoint.verify import verify as check

    found = check(folder)
    if not found["bit_equal"]:
        raise ValueError(f"{folder}: logits differ by {found['max_difference']:g} between two processes")
    hashes = "hashes match" if found["hashes_match"] else "no hashes are recorded, so whose files these are is unknown"
    typer.echo(f"{folder}: {hashes}; logits are bit-equal in a fresh process")


@_command
def report(folder: Annotated[Path, typer.Argument(help="the folder of a finished run")]) -> None:
    """Write report.html of a run again, from the files in its folder."""
    from .run.report import report as write

    typer.echo(write(folder))


@_command
def push(
    folder: Annotated[Path, typer.Argument(help="a run directory or a checkpoint folder")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the hub")],
    private: Annotated[bool, typer.Option("--private/--public", help="who may see the repository")] = True,
    base: Annotated[str | None, typer.Option(help="hub id of the base model, if the recipe does not name it")] = None,
    license: Annotated[str | None, typer.Option(help="of the base model, if its card cannot be read")] = None,
    replace_card: Annotated[bool, typer.Option("--replace-card", help="also a card written by hand")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print files and card, contact nobody")] = False,
    family: Annotated[
        bool, typer.Option("--family", help="every size of a run as USER/NAME-SIZE, an overview as USER/NAME")
    ] = False,
) -> None:
    """Publish a checkpoint on the hub with a model card; the same command continues after a lost connection."""
    from .publish import push as hub

    if not dry_run:
        options = {"private": private, "base": base, "license": license, "replace_card": replace_card}
        done = hub.push_family(folder, repo_id, **options) if family else [hub.push(folder, repo_id, **options)]
        typer.echo("\n".join(done))
        return
    metadata = {"license": license} if license else None
    if family:
        made = hub.overview(folder, repo_id, base=base, metadata=metadata)
    else:
        made = hub.contents(folder, repo_id, base=base, metadata=metadata, replace_card=replace_card)
    for name, what in made.items():
        size = what.stat().st_size if isinstance(what, Path) else len(what.encode())
        typer.echo(f"{size:>14,}  {name}", err=True)
    typer.echo(made["README.md"])


@_command
def eval_(
    model: Annotated[str, typer.Argument(help="hub id, folder, adapter, GGUF file or wheel", show_default=False)],
    tasks: Annotated[str, typer.Option(help="names joined by commas; `suite`: the twelve of the capability suite")],
    against: Annotated[str | None, typer.Option(help="the parent to pair with, or its result file")] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=MANY, help="first items of each task only")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=1000, help="examples in the prompt, where a task has any")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="completions of each code problem, for pass@k")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file with every item")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as saved")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=MANY, help="default from free memory")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="run programs the model writes, in the sandbox")
    ] = False,
) -> None:
    """Measure a model on standard benchmarks or on the data of a task, and pair it with its parent item by item."""
    from .evaluation.record import lines, measure

    report = measure(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        against=against,
        dtype=dtype,
        out=out,
        limit=limit,
        shots=shots,
        samples=samples,
        batch_size=batch_size,
        allow_code_execution=allow_code_execution,
    )
    for line in lines(report):
        typer.echo(line)


Device = Annotated[str, typer.Option(help="cpu or cuda")]


@_command
def bench(
    models: Annotated[list[str], typer.Argument(help="checkpoint folders or other models, compared with the first")],
    prompts: Annotated[str, typer.Option(help="lengths of the prompts")] = "32,128,512",
    tokens: Annotated[int, typer.Option(min=1, max=MANY, help="tokens decoded after the shortest")] = 16,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="measurements of each")] = 5,
    eager: Annotated[bool, typer.Option("--eager", help="leave out what load(fast=True) makes of them")] = False,
    pause: Annotated[
        float, typer.Option(min=0, max=3600, help="seconds of rest before each, against throttling")
    ] = 0.0,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="a JSON file for the result")] = None,
) -> None:
    """Time to the first token, time per token, memory and where the time goes, of models that take turns."""
    lengths = _counts("--prompts", prompts, "32,128,512")
    _require_device(device)
    if out:
        _require_file(out)
    from .evaluation.bench import bench as measure
    from .evaluation.bench import table
    from .evaluation.speed import load_fastest

    loaded = {_name(m, models): load_fastest(m, device)[0] for m in dict.fromkeys(models)}
    facts = measure(loaded, prompts=lengths, tokens=tokens, rounds=rounds, fast=not eager, pause=pause)
    _write(out, facts)
    typer.echo(table(facts))


@_command
def profile(
    model: Annotated[str, typer.Argument(help="a dense model")],
    tokens: Annotated[str, typer.Option(help="tokens computed at once, 1 is decoding")] = "1,128",
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="the table of costs")] = Path("costs.json"),
) -> None:
    """Measure what each rank of each layer shape costs on this device, for prune.costs."""
    counts = _counts("--tokens", tokens, "1,128")
    _require_device(device)
    _require_file(out)
    from .evaluation.profile import profile as measure
    from .evaluation.speed import load_fastest

    facts = measure(load_fastest(model, device)[0], tokens=counts)
    _write(out, facts)
    typer.echo(f"costs of {len(facts['layers'])} layer shapes on {facts['device']}: {out}")


@_command
def try_(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, or any model that a recipe takes")],
    against: Annotated[str | None, typer.Option(help="another model, its parent say, that answers too")] = None,
    template: Annotated[
        str, typer.Option(help=r"what a prompt is, with {} for the line that is typed and \n for a new line")
    ] = "{}",
    chat: Annotated[bool, typer.Option("--chat", help="put it into the tokenizer's chat template")] = False,
    tokens: Annotated[int, typer.Option(min=1, max=MANY, help="of an answer, at most")] = 256,
    device: Device = "cpu",
) -> None:
    """Answer what is typed, line by line, until an end of file (Ctrl-D)."""
    if "{}" not in template:
        raise ValueError(f"--template {template[:80]!r} should have {{}} where the line goes")
    _require_device(device)
    from .evaluation.speed import load_fastest
    from .evaluation.trying import converse

    sources = list(dict.fromkeys([model, against] if against else [model]))
    models = {_name(source, sources): load_fastest(source, device) for source in sources}
    converse(models, _typed(), _say, template.replace(r"\n", "\n"), tokens, chat)


@_command
def export(
    source: Annotated[str, typer.Argument(help="a checkpoint folder, or any model that a recipe takes")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    to: Annotated[str, typer.Option(help="dense, onnx, openvino or int8")],
) -> None:
    """Write a model in a form that other runtimes read."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose another folder or remove it first")
    from .export import export as write

    write(source, to, out)
    typer.echo(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


def _recipe(path: Path, changes: Sequence[str] | None):
    from .system.reading import read_yaml

    read_yaml(path)  # what is wrong with the file itself is said at once
    from .run import recipe

    return recipe.read(path, changes or ())


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder at {folder}")


def _typed() -> Iterator[str]:
    """Lines of the standard input, asked for where somebody sits there."""
    while True:
        if sys.stdin.isatty():
            _say("> ")
        if not (line := sys.stdin.readline()):
            return
        yield line


def _say(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()


def _counts(option: str, text: str, example: str) -> list[int]:
    """The numbers of a text like 1,128, each at least 1 and named once."""
    found = [int(n) for n in text.split(",")] if re.fullmatch(r"\d{1,7}(,\d{1,7})*", text) else [0]
    if min(found) < 1 or len(set(found)) < len(found):
        raise ValueError(f"{option} {text[:80]} should read like {example}, different numbers from 1 on")
    return found


def _require_file(out: Path) -> None:
    """Raise ValueError, before anything is measured, for a file that cannot be written."""
    from .system.writing import require_file

    require_file(out)


def _require_device(device: str) -> None:
    """Raise ValueError, before a model is loaded, for a device that is not there."""
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device)
    if not match:
        raise ValueError(f"--device {device[:80]!r} should be cpu, cuda or cuda:NUMBER")
    if device == "cpu":
        return
    import torch

    if int(match[1] or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {device}: torch sees {f'{count} GPUs' if count else 'no GPU'} here")


def _name(source: str, among: Sequence[str]) -> str:
    """The last part of a path, unless another's is the same."""
    return Path(source).name if [Path(m).name for m in among].count(Path(source).name) == 1 else source


def _write(path: Path | None, facts: dict) -> None:
    from .system.machine import command_line
    from .system.writing import replace_text

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"command": command_line(), **facts}, indent=1) + "\n")
