"""Progress in words that a person reads."""

import pytest

from basis_select.system.progress import duration, progress


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (40, "40 s"), (89, "89 s"), (190, "3 min"), (7100, "118 min"), (7500, "2 h 5 min")],
)
def test_durations_are_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_step_and_the_time_left_are_said(capsys):
    assert list(progress(range(3, 6), "heal", "step", total=6, done=3)) == [3, 4, 5]
    lines = capsys.readouterr().err.split("\r")
    assert lines[1] == "heal: step 3 of 6"
    assert lines[-1].strip() == "heal: step 6 of 6, took 0 s"
    list(progress(range(3), "heal", "step", quiet=True))
    assert not capsys.readouterr().err
