"""A tuning that ends by itself: what it keeps, when it stops, and that a kill changes neither."""

import copy
import importlib
import json

import pytest
import torch
from conftest import make_task, sampled, tiny

from basis_select import tune
from basis_select.system import processes
from basis_select.training.loss import response_nll

OPTIONS = {"steps": 400, "batch_size": 8, "lr": 3e-2, "patience": 2}


@pytest.fixture(scope="module")
def task():
    return make_task()


def looked_at(monkeypatch, dies_at=None):
    """The validation NLL of every look from now on; the process dies at look number `dies_at`."""
    seen = []

    def nll(model, examples, pad_id):
        if len(seen) == dies_at:
            raise KeyboardInterrupt
        seen.append(response_nll(model, examples, pad_id))
        return seen[-1]

    monkeypatch.setattr(importlib.import_module("basis_select.tune"), "response_nll", nll)
    return seen


@pytest.mark.parametrize("precision", sampled(["fp32", "plus"], 2))
def test_it_stops_when_the_validation_split_says_so_and_keeps_the_best(precision, task, tmp_path, monkeypatch):
    seen = looked_at(monkeypatch)
    model = tune(tiny(), task, tmp_path, precision=precision, **OPTIONS)
    steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    epoch = -(-len(task.train) // 8)
    assert steps == epoch * (len(seen) - 1) < OPTIONS["steps"]
    best = seen.index(min(seen))
    assert best == len(seen) - 3  # two looks after it were not better
    tolerance = {"abs": 1e-6} if precision == "fp32" else {"rel": 0.02}  # looks see weights without what is carried
    assert response_nll(model, task.validation, task.pad_id) == pytest.approx(seen[best], **tolerance)


def test_the_last_step_is_looked_at_too_and_nothing_changes_what_is_best_already(task, monkeypatch):
    parent = tiny()  # of which no training on answers drawn at random makes a better one
    seen, before = looked_at(monkeypatch), copy.deepcopy(parent)
    model = tune(parent, task, steps=3, batch_size=8, lr=1.0, patience=5)
    assert len(seen) == 2
    assert seen[0] < seen[1]
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.slow
def test_a_killed_one_continues_bit_for_bit(task, tmp_path, monkeypatch):
    monkeypatch.setattr("basis_select.training.engine.SAVE_EVERY", 0.0)
    seen = looked_at(monkeypatch)
    calm = tune(tiny(), task, tmp_path / "calm", **OPTIONS)
    for dies_at in {1, len(seen) - 1}:
        looked_at(monkeypatch, dies_at)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny(), task, tmp_path / f"{dies_at}", **OPTIONS)
        again = looked_at(monkeypatch)
        model = tune(tiny(), task, tmp_path / f"{dies_at}", **OPTIONS)
        assert again == seen[dies_at:]
        assert all(torch.equal(p, calm.get_parameter(name)) for name, p in model.named_parameters())
        lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("calm", f"{dies_at}")]
        assert len({tuple(json.loads(line)["loss"] for line in part) for part in lines}) == 1


def test_it_is_refused_for_a_model_that_is_spread(task, monkeypatch):
    monkeypatch.setattr(processes, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="patience keeps whole weights"):
        tune(tiny(), task, steps=1, patience=1)
