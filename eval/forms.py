"""What each part of `bits=auto` is worth before healing: validation NLL at a size on disk, choices left out one by one.

python eval/forms.py DECOMPOSED TASK OUT.json SIZE ...     DECOMPOSED: a checkpoint of weighted bases, such as a run's
                                                           `decompose` stage; TASK: what `load_task` reads

Besides: what if losses by rounding, or by 2 bits among them, counted more or less than losses by dropped bases. About a
minute a row on one core.
"""

import argparse
import contextlib
import copy
import json
from pathlib import Path
from unittest import mock

from basis_select import bits, load, load_task, prune
from basis_select.selection import weighted_groups
from basis_select.training.loss import response_nll

KEPT = {
    "all": lambda form: True,
    "factors alone": lambda form: form.rank is not None,
    "dense alone": lambda form: form.rank is None,
    "8 bits alone": lambda form: form.bits == 8 and not form.head,
    "4 bits alone": lambda form: form.bits == 4 and not form.head,
    "no 3 bits": lambda form: form.bits != 3,
    "no 2 bits": lambda form: form.bits != 2,
    "no heads": lambda form: not form.head,
}
WEIGHTS = (0.1, 0.25, 0.5, 2, 4)  # times what rounding costs
OF_2_BITS = (1, 2, 3)  # times that again where weights have 2 bits, beside what `all` counts


@contextlib.contextmanager
def only(kept):
    """Within it, `bits=auto` chooses from what a key of `KEPT` leaves."""
    every = bits.forms
    with mock.patch.object(bits, "forms", lambda *options: [x for x in every(*options) if KEPT[kept](x[0])]):
        yield


def measured(model, task, size, offers):
    """Validation NLL of a copy of `model` where groups may become what `offers`, `{name: forms}`, says."""
    made = copy.deepcopy(model)
    try:
        with mock.patch.object(bits, "forms", lambda group, *_: offers[group.name]):
            prune(made, task, size=size, bits="auto")
    except ValueError as error:
        return str(error)
    return round(response_nll(made, task.validation, task.pad_id), 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decomposed")
    parser.add_argument("task")
    parser.add_argument("out", type=Path)
    parser.add_argument("sizes", nargs="+")
    a = parser.parse_args()
    model, tokenizer = load(a.decomposed)
    task = load_task(a.task, tokenizer, validation=64)
    groups = weighted_groups(model)
    forms = {g.name: bits.forms(g) for g in groups}
    offers = {
        name: {n: [x for x in found if keeps(x[0])] for n, found in forms.items()} for name, keeps in KEPT.items()
    }
    for times in WEIGHTS:
        offers[f"rounding counts {times:g} times"] = {g.name: bits.forms(g, rounding=times) for g in groups}
    for times in OF_2_BITS:
        with mock.patch.dict(bits.COUNTS, {2: times}):
            offers[f"2 bits count {times:g} times"] = {g.name: bits.forms(g) for g in groups}
    rows = []
    for size in a.sizes:
        for name, offered in offers.items():
            rows.append({"size": size, "forms": name, "validation_nll": measured(model, task, size, offered)})
        a.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
