"""Training that was killed, and whose checkpoints were damaged since: it goes on from the last whole one."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_task, sampled, tiny
from damages import cut, flip, into_folder

from basis_select.checkpoint.verify import probe_logits
from basis_select.training import engine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """`(folder of a training killed at its sixth step, with two checkpoints; weights of the undisturbed one)`."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SAVE_EVERY", 0.0)
        calm = trained(folder / "calm")
        loss, calls = engine.task_loss, []

        def dies(*args):
            calls.append(1)
            if len(calls) == 6:
                raise Killed
            return loss(*args)

        patch.setattr(engine, "task_loss", dies)
        with pytest.raises(Killed):
            trained(folder / "killed")
    return folder / "killed", calm


def trained(folder):
    model = tiny(num_hidden_layers=1)
    engine.train(model, make_task(), name="tune", steps=7, batch_size=4, lr=1e-3, seed=0, folder=folder)
    return probe_logits(model)


NEWEST = "training/checkpoint-5"
STATE = f"{NEWEST}/{engine.STATE}"
CHECKPOINTS = {
    "the state is cut": lambda f: cut(f / STATE),
    "the state is empty": lambda f: cut(f / STATE, 0),
    "the state is gone": lambda f: (f / STATE).unlink(),
    "the state is text": lambda f: (f / STATE).write_text("text"),
    "a bit is flipped": lambda f: flip(f / STATE),
    "the mark is of another file": lambda f: (f / NEWEST / engine.COMPLETE).write_text('{"optimizer.pt": "0"}'),
    "the mark is empty": lambda f: cut(f / NEWEST / engine.COMPLETE, 0),
    "the mark is gone": lambda f: (f / NEWEST / engine.COMPLETE).unlink(),
    "a file is a folder": lambda f: into_folder(f / STATE),
    "the metrics end before": lambda f: cut(f / "metrics.jsonl", 0.85),
}


@pytest.mark.parametrize("name", sampled(CHECKPOINTS, 3))
def test_a_damaged_training_checkpoint_does_not_block(name, killed, tmp_path, caplog):
    shutil.copytree(killed[0], tmp_path / "stage")
    CHECKPOINTS[name](tmp_path / "stage")
    assert engine._last_checkpoint(tmp_path / "stage").name == "checkpoint-4"
    assert not (tmp_path / "stage" / NEWEST).exists()
    if "mark is gone" not in name:  # that one was not written to the end
        assert "is damaged" in caplog.text
        assert "training goes on from an earlier state" in caplog.text


def test_training_goes_on_from_the_checkpoint_before_bit_for_bit(killed, tmp_path):
    shutil.copytree(killed[0], tmp_path / "one")
    shutil.copytree(killed[0], tmp_path / "both")
    flip(tmp_path / "one" / STATE)
    for path in (tmp_path / "both" / "training").iterdir():
        cut(path / engine.STATE)
    for folder in ("one", "both"):
        assert torch.equal(trained(tmp_path / folder), killed[1])


@pytest.mark.parametrize("fails", ["inline_container.cc:672] . unexpected pos", "No space left on device"])
def test_a_full_disk_in_the_middle_of_training_is_one_sentence(fails, tmp_path, monkeypatch):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-3" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, fails) if "space" in fails else RuntimeError(fails)
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="training checkpoint of step 3 could not be written, the one before it is kept"):
        trained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "training").iterdir()) == ["checkpoint-1", "checkpoint-2"]
