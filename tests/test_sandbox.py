"""The sandbox against programs that attack it, and against the right answers of HumanEval and MBPP."""

import functools
import json
import os
import re
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_attacks import Host, check, held, run
from sandbox_programs import ASKED, ATTACKS

from basis_select.evaluation import sandbox
from basis_select.evaluation.tasks import utils

DATA = Path(__file__).parents[2] / "shared/data/code"
isolated = pytest.mark.skipif(
    bool(sandbox.missing()), reason=f"no sandbox here: it lacks {'; '.join(sandbox.missing())}"
)


@pytest.fixture
def host():
    with Host() as host:
        yield host


SOME = re.compile(
    "system calls|every other|fork bomb$|memory bomb$|memory in|what the machine|writing outside|success as|"
    r"os._exit\(0\) in|an answer of another|a helper of the tests redefined (after|in its)"
)


@isolated
@pytest.mark.parametrize("attack", [a for a in ATTACKS if SOME.match(a.name)], ids=lambda a: a.name[:60])
def test_an_attack_fails_and_leaves_nothing(attack, host):
    outcome, _, traces = run(attack, host)
    assert held(attack, outcome, traces), (outcome.reason, traces)


@isolated
@pytest.mark.slow
def test_every_attack_fails_and_leaves_nothing(host):
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda attack: check(attack, host), ATTACKS))
    assert sum(attack.tries for attack in ATTACKS) > 250
    assert {a.name: o.reason for a, o in zip(ATTACKS, outcomes, strict=True) if not held(a, o, [])} == {}
    assert host.traces() == []


@pytest.mark.parametrize(
    ("program", "trace"),
    [
        ("open({folder!r} + '/planted', 'w')", "files outside were changed"),
        ("open({secret!r}, 'w')", "files outside were changed"),
        ("import socket\nsocket.create_connection(('127.0.0.1', {port}))", "the server saw a connection"),
        ("import os\nos.kill({pid}, 10)", "a process outside got a signal"),
        ("import os\nos.chmod({decoys!r} + '/file', 0)", "files outside got other modes, owners, times or attributes"),
        ("import os\nos.utime({decoys!r} + '/file')", "files outside got other modes, owners, times or attributes"),
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
def test_once_it_has_answered_its_first_processes_are_gone(monkeypatch):
    opened, pidfd_open = [], os.pidfd_open

    def keep(pid):
        opened.append(os.dup(first := pidfd_open(pid)))
        return first

    monkeypatch.setattr(os, "pidfd_open", keep)
    alive = 0
    for _ in range(30):
        sandbox.check("def f(x):\n  import os\n  os._exit(0)", "assert f(2) == 3")
        while opened:
            ended = select.poll()
            ended.register(opened[-1], select.POLLIN)
            alive += not ended.poll(0)
            os.close(opened.pop())
    assert not alive


SERVICES = """
import asyncio, concurrent.futures, mmap, multiprocessing, os, pathlib, platform, secrets, shutil, sqlite3, subprocess
import threading, time, uuid

async def later(x):
    await asyncio.sleep(0.001)
    return x

def f(x):
    pathlib.Path("a").touch()
    os.mkdir("b")
    shutil.copyfile("a", "b/c")
    os.rename("b/c", "d")
    shutil.rmtree("b")
    assert sorted(os.listdir()) == ["a", "d"]
    with mmap.mmap(-1, 4096) as m, threading.Lock(), open(os.devnull, "w") as null:
        m[0] = sqlite3.connect(":memory:").execute("select 1").fetchone()[0]
        null.write(secrets.token_hex() + str(uuid.uuid4()) + platform.platform() + str(os.cpu_count()))
        time.sleep(0.001)
        return asyncio.run(later(x)) + m[0]
"""


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
        (SERVICES, "assert f(2) == 3"),
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
@pytest.mark.slow
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


def rows(name):
    return [json.loads(line) for line in (DATA / name / "test.jsonl").read_text().splitlines()]


@isolated
@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs HumanEval and MBPP in ../shared/data/code")
def test_reference_solutions_pass_and_their_absence_fails(monkeypatch):
    monkeypatch.setattr(sandbox, "check", functools.partial(sandbox.check, seconds=60))  # one computes for seconds
    problems = [(utils.humaneval, row, row["canonical_solution"]) for row in rows("humaneval")]
    problems += [(utils.mbpp, row, row["code"]) for row in rows("mbpp")[::4]]
    assert len(problems) == 164 + 125
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda p: p[0](p[1], [[p[2]]]), problems))
        empty = list(pool.map(lambda p: p[0](p[1], [["    pass"]]), problems[::20]))
    assert {p[1]["task_id"]: o["reasons"] for p, o in zip(problems, right, strict=True) if not o["passes"]} == {}
    assert not any(o["passes"] for o in empty)


@isolated
@pytest.mark.skipif(not DATA.is_dir(), reason="needs HumanEval in ../shared/data/code")
@pytest.mark.parametrize(
    ("task", "helper", "function"),
    [
        ("HumanEval/32", "def poly(xs, x):\n    return 0.0\n", "    return 0.0\n"),
        ("HumanEval/38", "def encode_cyclic(s):\n    return s\n", "    return s\n"),
        ("HumanEval/50", "def encode_shift(s):\n    return s\n", "    return s\n"),
    ],
)
def test_the_tests_use_the_helpers_of_the_prompt(task, helper, function):
    (row,) = [row for row in rows("humaneval") if row["task_id"] == task]
    found = utils.humaneval(row, [[function + "\n" + helper, row["canonical_solution"]]])
    assert [reason == "passed" for reason in found["reasons"]] == [False, True], found


@isolated
def test_a_right_function_passes_whatever_it_makes_of_a_helper():
    doc = {**ASKED, "test": "def check(candidate):\n    assert double(candidate(3)) == 3"}
    right = ["  return x / 2", "  return x / 2\ndef double(x): return x", "  return x / 2\ndel double"]
    assert utils.humaneval(doc, [right])["passes"] == len(right)


@isolated
def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: ["false"])
    with pytest.raises(RuntimeError, match="the sandbox did not start: false ended with status 1"):
        sandbox.check("def f(): return 1", "assert f() == 1")
