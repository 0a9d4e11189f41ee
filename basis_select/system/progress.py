"""What a person sees of work in progress: "heal: step 12 of 100, 3 min left"."""

from collections.abc import Collection

from tqdm.auto import tqdm


def progress(
    items: Collection, name: str, unit: str, total: int | None = None, done: int = 0, quiet: bool = False
) -> tqdm:
    """`items` one by one, with a line in words on stderr; the first `done` of all `total` are behind us already."""
    text = "{desc}: {unit} {n_fmt} of {total_fmt}{time}"
    return _Bar(items, desc=name, unit=unit, total=total, initial=done, disable=quiet, bar_format=text)


def duration(seconds: float) -> str:
    """In words, to what matters: 40 s, 3 min, 2 h 10 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class _Bar(tqdm):
    @property
    def format_dict(self) -> dict:
        found = super().format_dict
        done, seconds = found["n"] - found["initial"], found["elapsed"]
        time = ""
        if done and found["n"] == found["total"]:
            time = f", took {duration(seconds)}"
        elif done:
            time = f", {duration((found['total'] - found['n']) * seconds / done)} left"
        return found | {"time": time}
