"""The sandbox against programs that attack it, and against the right answers of HumanEval and MBPP."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_attacks import ATTACKS, Host, held, run

from basis_select.evaluation import sandbox

DATA = Path(__file__).parents[2] / "shared/data/code"
isolated = pytest.mark.skipif(
    bool(sandbox.missing()), reason=f"no sandbox here: it lacks {'; '.join(sandbox.missing())}"
)


@pytest.fixture(scope="module")
def host():
    with Host() as host:
        yield host


@isolated
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_attack_fails_and_leaves_nothing(attack, host):
    outcome, _, traces = run(attack, host)
    assert traces == []
    assert held(attack, outcome, traces), outcome.reason


@pytest.mark.parametrize(
    ("program", "trace"),
    [
        ("open({folder!r} + '/planted', 'w')", "files outside were changed"),
        ("open({secret!r}, 'w')", "files outside were changed"),
        ("import socket\nsocket.create_connection(('127.0.0.1', {port}))", "the server saw a connection"),
        ("import os\nos.kill({pid}, 10)", "a process outside got a signal"),
        ("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(100)", "processes are still there"),
    ],
)
def test_the_host_notices_what_is_not_isolated(program, trace):
    with Host() as host:
        command = [sys.executable, "-I", "-c", host.fill(program), str(host.memory)]
        assert host.traces() == []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert host.traces() == [trace]
        for process in host.processes():
            process.kill()
            process.wait()


@isolated
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return x + 1", "assert f(2) == 3"),
        ("def f(x): return x", "assert f(float('inf')) == float('inf') and f(float('nan')) != f(0.0)"),
        ("def f(x): return x", "assert f(10**5000) == 10**5000 and f(-(2**64)) == -(2**64)"),
        ("def f(x): return x", "assert f({(1, 'a'): {2, 3}, None: b'x'}) == {(1, 'a'): {2, 3}, None: b'x'}"),
        ("def f(x): return x", "x = [1j, True, (), frozenset([1]), '\\ud800\\n']\nassert f(x) == x and f(x) is not x"),
        ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(): return P(1, 2)",
            "assert f() == (1, 2)",
        ),
        ("def f(n):\n  while True: yield n", "assert next(f(4)) == 4 and [x for x, _ in zip(f(1), 'ab')] == [1, 1]"),
        ("class N:\n  left = None\ndef f(n): return n.left.x", "n = N()\nn.left = N()\nn.left.x = 5\nassert f(n) == 5"),
        (
            "class E(ValueError): pass\ndef f(): raise E('no')",
            "try: f()\nexcept ValueError as e: assert 'no' in str(e)",
        ),
        ("def f(): return b'\\xff'.decode()", "try: f()\nexcept UnicodeError: pass\nelse: assert False"),
        ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(2) ** 2, 2)"),
        ("import math as m\nlimit = [1]\ndef f(x): return x", "assert m.floor(f(2.5)) == 2 and limit == [1]"),
        ("import dataclasses\n@dataclasses.dataclass\nclass P:\n  x: 'int'\ndef f(): return P(1)", "assert f().x == 1"),
        ("import tempfile\nwith tempfile.TemporaryFile() as t: t.write(b'x')", ""),
        ("print('hello')\nif __name__ == '__main__': input()", ""),
    ],
)
def test_right_values_pass(program, tests):
    assert sandbox.check(program, tests) == sandbox.Outcome(True, "passed")


@isolated
def test_a_function_named_like_a_builtin_is_tested_when_named():
    program, tests = "def sum(a, b): return a * b", "assert sum(2, 3) == 6"
    assert sandbox.check(program, tests, entry="sum").passed
    assert sandbox.check(program, tests).reason.startswith("failed: TypeError")


@isolated
def test_threads_get_their_own_verdicts():
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(
            pool.map(lambda i: sandbox.check(f"def f(x): return x + {i % 2}", "assert f(2) == 3"), range(16))
        )
    assert [o.passed for o in outcomes] == [False, True] * 8


@isolated
def test_a_time_limit_ends_programs_and_tests():
    for program, tests in (("def f(): pass", "while True: f()"), ("while True: pass", "")):
        began = time.monotonic()
        assert sandbox.check(program, tests, seconds=0.5) == sandbox.Outcome(False, "time limit of 0.5 s")
        assert time.monotonic() - began < 5


@isolated
@pytest.mark.parametrize(
    ("tests", "wrong"),
    [("assert f(", "the tests are not Python"), ("f(lambda x: x)", "the tests hand the program a function")],
)
def test_tests_that_cannot_run_are_an_error(tests, wrong):
    with pytest.raises(ValueError, match=wrong):
        sandbox.check("def f(x): return x", tests)


@isolated
def test_too_little_memory_for_python_is_an_error():
    with pytest.raises(RuntimeError, match="did not start"):
        sandbox.check("", memory=2**20)


def test_nothing_runs_without_isolation(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox, "missing", sandbox.missing.__wrapped__)
    with pytest.raises(ValueError, match=r"cannot run here.*bubblewrap is not installed"):
        sandbox.check(f"open({str(tmp_path / 'ran')!r}, 'w')")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho no user namespaces >&2; exit 1\n")
    broken.chmod(0o755)
    sandbox._bubblewrap.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"cannot run here.*no user namespaces"):
            sandbox.check(f"open({str(tmp_path / 'ran')!r}, 'w')")
    finally:
        sandbox._bubblewrap.cache_clear()
    assert [p.name for p in tmp_path.iterdir()] == ["bwrap"]


def references():
    """`(name, program, tests, entry)` of every HumanEval problem and every MBPP test problem, solved."""
    for line in (DATA / "humaneval/test.jsonl").read_text().splitlines():
        row = json.loads(line)
        program = row["prompt"] + row["canonical_solution"]
        yield row["task_id"], program, f"{row['test']}\ncheck({row['entry_point']})", row["entry_point"]
    for line in (DATA / "mbpp/test.jsonl").read_text().splitlines():
        row = json.loads(line)
        entry = re.match(r"assert\W+(\w+)", row["test_list"][0])[1]
        yield row["task_id"], row["code"], "\n".join([row["test_setup_code"], *row["test_list"]]), entry


@isolated
@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs HumanEval and MBPP in ../shared/data/code")
def test_reference_solutions_pass_and_their_absence_fails():
    problems = list(references())
    assert len(problems) == 164 + 500
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda p: sandbox.check(p[1], p[2], entry=p[3], seconds=30), problems))
        empty = list(pool.map(lambda p: sandbox.check("", p[2], entry=p[3]), problems[::20]))
    assert {p[0]: o.reason for p, o in zip(problems, right, strict=True) if not o.passed} == {}
    assert not any(o.passed for o in empty)
