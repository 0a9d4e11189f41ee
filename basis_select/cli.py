"""basis-select: run | plan | inspect | verify | eval | report | push."""

import functools
import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Changes = Annotated[list[str] | None, typer.Argument(help="section.key=value, changes the recipe")]
RecipeFile = Annotated[Path, typer.Argument(help="a YAML recipe", show_default=False)]


def main():
    app()


def _command(function):
    """Register a command whose foreseeable failures are one sentence, not a traceback."""

    @app.command(name=function.__name__.rstrip("_"))
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        from safetensors import SafetensorError
        from transformers.utils.logging import disable_progress_bar

        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)
        disable_progress_bar()  # of loading and saving; stages keep theirs
        try:
            function(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None
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
):
    """Compress a model for a task as the recipe says; the same command continues a killed run.

    Under torchrun all processes train together.
    """
    from . import ranks

    def work():
        read = _recipe(recipe, changes)
        from . import pipeline
        from .evaluation.report import table

        folder = out or Path("runs") / recipe.stem
        results = pipeline.run(read, folder, shard)
        typer.echo(table(results))
        typer.echo(f"checkpoint: {folder / 'final'}   report: {folder / 'report.html'}")

    ranks.lead(work)


@_command
def plan(
    recipe: RecipeFile,
    changes: Changes = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes that share the work, a machine each")] = 1,
):
    """Say what a recipe will do and cost, without doing it."""
    from .plan import plan as make

    typer.echo(make(_recipe(recipe, changes), ranks))


@_command
def inspect(folder: Annotated[Path, typer.Argument(help="a checkpoint folder")]):
    """Ranks per layer and the four sizes of a checkpoint."""
    from .models import load
    from .sizes import layer_table, sizes

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder at {folder}")
    model, _ = load(folder)
    for row in layer_table(model):
        rank = "dense" if row["rank"] is None else f"rank {row['rank']}"
        note = f"  shares v of {row['shares']}" if row["shares"] else ""
        typer.echo(f"{row['name']:48} {row['in']:>6} -> {row['out']:<6} {rank}{note}")
    s = sizes(model, folder)
    typer.echo(f"bases                {s['bases']:,}")
    for name, key in (("targeted parameters", "targeted"), ("all parameters", "parameters")):
        typer.echo(f"{name:20} {s[key]:,} of {s[key + '_dense']:,} ({s[key + '_dense'] / s[key]:.2f}x fewer)")
    typer.echo(f"weight bytes         {s['bytes']:,} ({model.dtype})")


@_command
def verify(folder: Annotated[Path, typer.Argument(help="a checkpoint folder")]):
    """Check a checkpoint's hashes, load it in a fresh process and compare logits with a load in this one."""
    from .checkpoint.files import verify as check

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder at {folder}")
    found = check(folder)
    if not found["bit_equal"]:
        raise ValueError(f"{folder}: logits differ by {found['max_difference']:g} between two processes")
    typer.echo(f"{folder}: hashes match, logits are bit-equal in a fresh process")


@_command
def report(folder: Annotated[Path, typer.Argument(help="the folder of a finished run")]):
    """Write report.html of a run again, from the files in its folder."""
    from .evaluation.run_report import report as write

    typer.echo(write(folder))


@_command
def push(
    folder: Annotated[Path, typer.Argument(help="a run directory or a checkpoint folder")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the hub")],
    private: Annotated[bool, typer.Option("--private/--public", help="who may see the repository")] = True,
    base: Annotated[str | None, typer.Option(help="hub id of the base model, if the recipe does not name it")] = None,
    license: Annotated[str | None, typer.Option(help="of the base model, if its card cannot be read")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print files and card, contact nobody")] = False,
):
    """Publish a checkpoint on the hub with a model card; the same command continues after a lost connection."""
    from .checkpoint import hub

    if not dry_run:
        typer.echo(hub.push(folder, repo_id, private=private, base=base, license=license))
        return
    made = hub.contents(folder, repo_id, base=base, metadata={"license": license} if license else None)
    for name, what in made.items():
        size = what.stat().st_size if isinstance(what, Path) else len(what.encode())
        typer.echo(f"{size:>14,}  {name}", err=True)
    typer.echo(made["README.md"])


@_command
def eval_(
    model: Annotated[str, typer.Argument(help="hub id, folder, adapter, GGUF file or wheel", show_default=False)],
    tasks: Annotated[str, typer.Option(help="names joined by commas; `suite`: the twelve of the capability suite")],
    against: Annotated[str | None, typer.Option(help="the parent to pair with, or its result file")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first items of each task only")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="examples in the prompt, where a task has any")] = None,
    samples: Annotated[int, typer.Option(min=1, help="completions of each code problem, for pass@k")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file with every item")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as saved")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="default from free memory")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="run programs the model writes, in the sandbox")
    ] = False,
):
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


def _recipe(path, changes):
    from . import recipe

    return recipe.read(path, changes or ())
