"""basis-select: run | plan | inspect | verify | export."""

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
        typer.echo(f"checkpoint: {folder / 'final'}   results: {folder / 'results.json'}")

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
def export(
    source: Annotated[str, typer.Argument(help="a checkpoint folder, or any model that a recipe takes")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    to: Annotated[str, typer.Option(help="dense, onnx, openvino or int8")],
):
    """Write a model in a form that other runtimes read."""
    from .export import export as write

    write(source, to, out)
    typer.echo(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


def _recipe(path, changes):
    from . import recipe

    return recipe.read(path, changes or ())
