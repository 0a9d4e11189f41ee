"""What a run tells the person at its terminal: stages in words, their results, and how much time is left."""

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from ..evaluation.report import HEAD, cells
from ..system import processes
from ..system.progress import duration
from .estimates import Machine
from .measuring import Estimate, machine_rates
from .plan import Forecast, Step
from .recipe import PARENT, Recipe
from .stages import Stage, walk
from .view import View

log = logging.getLogger(__name__)
LONG = 60  # seconds of a run from which on it is worth the seconds it takes to say how many are left
SHOWN = ("model", "accuracy", "response NLL", "gained / lost (p)", "all parameters", "weight bytes", "decode tokens/s")
UNSEEN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


def show(results: dict) -> None:
    """Print the results of a run as a table that fits the terminal."""
    table = Table(show_lines=True)
    for column in SHOWN:
        table.add_column(column.replace(" (", "\n("), justify="left" if column == "model" else "right")
    for name, row in results.items():
        texts = dict(zip(HEAD, cells(name, row), strict=True))
        table.add_row(*(texts[column].replace(" (", "\n(") for column in SHOWN))  # intervals below values
    Console().print(table)


def what_next(recipe: Recipe, folder: Path) -> str:
    """The commands that go on from a finished run."""
    final = folder / "final"
    lines = [
        ("all figures", f"open {folder / 'report.html'}"),
        ("load it", f"import basis_select as bs; model, tokenizer = bs.load({str(final)!r})"),
        ("measure its speed", f"basis-select bench {recipe.model} {final}"),
        ("publish it", f"basis-select push {folder} USER/NAME"),
    ]
    if recipe.sizes:
        lines.insert(1, ("other sizes", ", ".join(str(folder / f"final-{size}") for size in recipe.sizes)))
    return "\n".join(["What next:", *(f"  {what:18} {how}" for what, how in lines)])


class Silent:
    """Progress that nobody is told of."""

    def reuse(self, stage: Stage, name: str) -> None: ...

    def begin(self, stage: Stage, name: str, view: View) -> None: ...

    def end(self, stage: Stage, facts: dict) -> None: ...


class Progress:
    """Tells of the stages of several rows (`{name: recipe}`, the parent's first); `row` names the one being made."""

    def __init__(self, rows: dict[str, Recipe]):
        self.rows, self.row, self.began = rows, next(iter(rows)), time.monotonic()
        self.start, self.costs, self.met, self.total = None, None, [], 0
        self.said = self.took = 0.0  # seconds of the stages so far: as estimated, as they were

    def loaded(self, view: View) -> None:
        """From now on it is known how many stages there are: those of `view`, the model's, and of all rows."""
        self.start = view.parent, view.tokenizer, view.task
        self.total = len(self._foreseen(None)) + 1

    def reuse(self, stage: Stage, name: str) -> None:
        """A stage that is there already; it is said once, of stages that rows share too."""
        if name not in self.met:
            self.met.append(name)
            log.info("%s: done before", self._heading(stage))

    def begin(self, stage: Stage, name: str, view: View) -> None:
        self.met.append(name)
        log.info("%s: %s%s", self._heading(stage), stage.says(view), self._left())

    def end(self, stage: Stage, facts: dict) -> None:
        nll = f", NLL {facts['validation_nll']:.3f} on the validation split" if "validation_nll" in facts else ""
        log.info("%sdone in %s%s", " " * len(self._number()), duration(facts["seconds"]), nll)
        if self.costs and len(self.met) <= len(self.costs):
            self.said += self.costs[len(self.met) - 1].seconds
            self.took += facts["seconds"]

    def _number(self) -> str:
        width = len(str(self.total))
        return f"[{len(self.met):{width}}/{self.total}] " if self.total else ""

    def _heading(self, stage: Stage) -> str:
        row = f" ({self.row})" if len(self.rows) > 2 and self.row and not (stage.dense and self.row == PARENT) else ""
        return f"{self._number()}{stage.name.replace('_', ' ')}{row}"

    def _left(self) -> str:
        """How much time is left, as `plan` says, at the speed of the stages so far."""
        passed = time.monotonic() - self.began
        if self.costs is None and passed > LONG and self.start:
            self.costs = self._estimated()
        if not self.costs:
            return ""
        left = sum(cost.seconds for cost in self.costs[len(self.met) - 1 :])
        if self.said:
            left *= self.took / self.said
        return f" ({duration(passed)} so far, about {duration(left)} left)"

    def _estimated(self) -> list[Estimate]:
        """What every stage will cost, in order; nothing of a model whose steps cannot be computed without data."""
        try:
            return [step.cost for step in self._foreseen(Machine(machine_rates(), processes.count()))]
        except UNSEEN as error:
            log.info("the time left is unknown, because the work of this model depends on its data: %s", error)
            return []

    def _foreseen(self, machine: Machine | None) -> list[Step]:
        parent, tokenizer, task = self.start
        forecast = Forecast(parent, tokenizer, task, machine)
        for i, row in enumerate(self.rows.values()):
            walk(row, forecast, dense=i == 0)
        return list(forecast.steps.values())
