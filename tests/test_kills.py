"""SIGKILL at random moments of a run, which is then taken up until it is done, ends with the same weights."""

import random
import time

import pytest
from conftest import addition_recipe, fresh, make_tokenizer, start_no_process, tiny
from kill_resume import hashes

import basis_select as bs
from basis_select.checkpoint.checks import check

KILLS, SEED = 4, 0


def run(recipe, folder):
    """A whole run that saves after every step, but for the fresh process of `verify` and the report's figures."""
    import torch

    from basis_select.run import pipeline
    from basis_select.run import recipe as recipes
    from basis_select.training import engine

    torch.set_num_threads(1)
    engine.SAVE_EVERY = 0.0
    pipeline.report = lambda folder: None
    with pytest.MonkeyPatch.context() as patch:
        start_no_process(patch)
        pipeline.run(recipes.read(recipe), folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp("kills")
    content = {
        "data": {"test": 2, "validation": 2},
        "tune": {"steps": 3, "batch_size": 4},
        "decompose": {"examples": 4},
        "learn": {"steps": 3, "batch_size": 4, "rounds": 1},
        "prune": {"keep": 0.5, "multiple_of": 2},
        "heal": {"steps": 4, "batch_size": 4, "lr": 1e-3},
    }
    return addition_recipe(home, tiny(num_hidden_layers=1), 6, **content)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(recipe, tmp_path):
    def start(folder):
        process = fresh.Process(target=run, args=(recipe, folder))
        process.start()
        return process

    waits_for_the_imports = fresh.Process()
    waits_for_the_imports.start()
    waits_for_the_imports.join()
    began = time.monotonic()
    process = start(tmp_path / "calm")
    process.join()
    assert process.exitcode == 0
    length = time.monotonic() - began
    rng, killed = random.Random(SEED), tmp_path / "killed"
    bs.save(tiny(seed=9), make_tokenizer(), killed / "final")  # of an earlier recipe
    (killed / "stages").mkdir()
    moments, attempts = [], 0
    while True:
        process, attempts = start(killed), attempts + 1
        process.join(rng.uniform(0, 0.6) * length if len(moments) < KILLS else None)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        moments.append(sorted(p.name for p in (killed / "stages").iterdir())[:1])
        check(killed / "final")
    print(f"seed {SEED}, killed at {moments}")
    assert process.exitcode == 0
    assert moments
    assert hashes(killed) == hashes(tmp_path / "calm")
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in (tmp_path / "calm").iterdir())
    assert not [p for p in (killed / "stages").iterdir() if p.name.startswith(".")]
