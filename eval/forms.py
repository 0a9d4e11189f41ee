"""What each part of `bits=auto` is worth before healing: validation NLL at a size on disk, choices left out one by one.

python eval/forms.py DECOMPOSED TASK OUT.json SIZE ...     DECOMPOSED: a checkpoint of weighted bases, such as a run's
                                                           `decompose` stage; TASK: what `load_task` reads

Besides: what if losses by rounding counted more or less than losses by dropped bases. About a minute a row on one core.
"""

import argparse
import copy
import json
from pathlib import Path

from basis_select import bits, load, load_task, prune
from basis_select.selection import weighted_groups
from basis_select.training.loss import response_nll

KEPT = {
    "all": lambda form: True,
    "factors alone": lambda form: form.rank is not None,
    "dense alone": lambda form: form.rank is None,
    "8 bits alone": lambda form: form.bits == 8 if form.rank is None else form.head == form.rank,
    "4 bits alone": lambda form: form.bits == 4 if form.rank is None else form.head == 0,
    "no heads": lambda form: form.rank is None or form.head in (0, form.rank),
}
WEIGHTS = (0.1, 0.25, 0.5, 2, 4)  # times what rounding costs


def weighed(found, energy, times):
    """`[(form, price, value), ...]` where the part of the loss that rounding makes counts so many `times`."""
    cumulative = energy.cumsum(0).tolist()
    whole = [cumulative[-1 if form.rank is None else form.rank - 1] for form, _, _ in found]
    return [(form, price, w - times * (w - value)) for (form, price, value), w in zip(found, whole, strict=True)]


def measured(model, task, size, offers):
    """Validation NLL of a copy of `model` where groups may become what `offers`, `{name: forms}`, says."""
    made, own = copy.deepcopy(model), bits.forms
    bits.forms = lambda group, multiple_of: offers[group.name]
    try:
        prune(made, task, size=size, bits="auto")
    except ValueError as error:
        return str(error)
    finally:
        bits.forms = own
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
    energies = {g.name: g.s.detach().double().square().sort(descending=True).values for g in groups}
    rows = []
    for size in a.sizes:
        for name, keeps in KEPT.items():
            offers = {n: [x for x in found if keeps(x[0])] for n, found in forms.items()}
            rows.append({"size": size, "forms": name, "validation_nll": measured(model, task, size, offers)})
        for times in WEIGHTS:
            offers = {n: weighed(found, energies[n], times) for n, found in forms.items()}
            name = f"rounding counts {times:g} times"
            rows.append({"size": size, "forms": name, "validation_nll": measured(model, task, size, offers)})
        a.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
