"""What ranks cost by the times that `basis-select profile` measured on a device."""

from collections.abc import Sequence
from pathlib import Path

from .layers.shape import Shape
from .system.reading import read_json
from .target import Target

TABLE = {  # what the file that `profile` fills holds
    "layers": [{"in": int, "out": [int], "dense": {str: float}, "ranks": {str: {str: float}}}],
    "model": {str: float},
}


def prices(
    path: str | Path, asked: Target, shapes: Sequence[Shape], reserve: int = 0, more: Sequence[tuple[Shape, int]] = ()
) -> tuple[list[list[tuple[int | None, float]]], float]:
    """What `linalg.budget.allocate` needs to choose ranks by time: `([(rank, seconds), ..., (None, seconds)] per shape,
    seconds that all of them may take)`.

    path: a table that `profile` wrote; shapes: a Shape for every group of layers; asked: a latency of the whole model;
    reserve: bases that each layer gets later; more: `[(shape, rank), ...]` of layers whose ranks are settled. Raises
    ValueError if the table does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no table of costs at {path}: basis-select profile makes one")
    costs = read_json(path, TABLE)
    tokens = asked.tokens
    if tokens not in costs["model"]:
        raise ValueError(f"{path} has no times of {tokens} tokens at once, only of {', '.join(costs['model'])}")
    measured = {Shape(layer["in"], tuple(layer["out"])): layer for layer in costs["layers"]}
    for shape, layer in measured.items():
        if any(tokens not in times for times in (layer["dense"], *layer["ranks"].values())):
            raise ValueError(f"{path} has no times of {tokens} tokens at once for {shape}")
    for shape in (*shapes, *(shape for shape, _ in more)):
        if shape not in measured:
            raise ValueError(f"{path} has no layer {shape}: profile this model's parent")
    choices = []
    for shape in shapes:
        ranks = [(int(r) - reserve, t[tokens]) for r, t in measured[shape]["ranks"].items() if int(r) > reserve]
        choices.append([*ranks, (None, measured[shape]["dense"][tokens])])
    now = costs["model"][tokens]
    allowed = now / asked.amount if asked.unit == "x" else asked.amount
    free = allowed - now + sum(c[-1][1] for c in choices)
    for shape, rank in more:
        layer = measured[shape]
        settled = [t[tokens] for r, t in layer["ranks"].items() if int(r) >= rank] or [layer["dense"][tokens]]
        free += layer["dense"][tokens] - settled[0]
    least = sum(min(seconds for _, seconds in c) for c in choices)
    if least > free:
        fastest = allowed - free + least
        raise ValueError(
            f"{asked} asks for {allowed * 1e3:.3g} ms, but by the times in {path} the fastest choice of ranks takes "
            f"{fastest * 1e3:.3g} ms, {now / fastest:.2f}x"
        )
    return choices, free
