"""Programs that attack the machine or their own verdict, run in the sandbox: what comes of each.

python eval/sandbox_attacks.py OUT.md

Also measures what a program costs that does nothing. Exits with 1 if an attack passes its tests, ends otherwise than
expected, or leaves a trace on the machine.
"""

import contextlib
import dataclasses
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from basis_select.evaluation import sandbox

TESTS = "assert f(2) == 3"  # no attack defines an f that does this
ENDED = "failed: the program ended before its tests did"


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    program: str  # {secret}, {folder}, {port}, {pid}: where the machine could be hurt
    reason: str  # regular expression
    tests: str = TESTS
    seconds: float = 20


FDS = "import os\nfor fd in range(100):\n  try: os.write(fd, {bytes})\n  except OSError: pass\n"
SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ATTACKS = [
    # more than its share
    Attack("fork bomb", "import os\nwhile True: os.fork()", "failed: PermissionError"),
    Attack("fork bomb through subprocess", "import subprocess, sys\nsubprocess.Popen([sys.executable])", "Permission"),
    Attack("thread bomb", "import threading\nwhile True: threading.Thread(target=input).start()", "start new thread"),
    Attack("memory bomb", "x = []\nwhile True: x.append(bytearray(2**24))", "memory limit"),
    Attack("memory bomb in a file without a name", "import os\nfd = os.memfd_create('x')", "failed: PermissionError"),
    Attack("raising its own limits", "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "raise maximum limit"),
    Attack("filling the disk", "for i in range(99): open(str(i), 'wb').write(bytes(2**23))", "No space left"),
    Attack("one huge file", "f = open('x', 'wb')\nwhile True: f.write(bytes(2**20))", "File too large"),
    Attack("endless output", "while True: print('x' * 2**16)", "time limit of 1 s", seconds=1),
    Attack("endless output to every descriptor", "while True:\n  " + FDS.replace("\n", "\n  "), "output limit"),
    Attack("huge answer", "def f(x): return 'x' * 2**25", "output limit"),
    Attack(
        "busy loop that ignores SIGTERM",
        "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass",
        "time limit of 1 s",
        seconds=1,
    ),
    Attack("sleeping", "import time\ntime.sleep(1000)", "time limit of 1 s", seconds=1),
    Attack("huge recursion", "def f(x): return f(x)", "failed: RecursionError"),
    Attack(
        "recursion without a limit",
        "import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(x): return max([x], key=f)",
        f"{ENDED}|memory limit",
    ),
    Attack(
        "deeply nested answer", "def f(x):\n  x = []\n  for _ in range(10**5): x = [x]\n  return x", "RecursionError"
    ),
    # outside
    Attack("reading a file outside", "def f(x): return open({secret!r}).read()", "failed: FileNotFoundError"),
    Attack("a link to a file outside", "import os\nos.symlink({secret!r}, 'a')\nopen('a').read()", "FileNotFoundError"),
    Attack("reading the accounts", "open('/etc/passwd')", "failed: FileNotFoundError"),
    Attack("the environment of another process", "open('/proc/1/environ')", "failed: FileNotFoundError"),
    Attack("writing outside", "open({folder!r} + '/planted', 'w').write('x')", "failed: FileNotFoundError"),
    Attack(
        "a link to a folder outside", "import os\nos.symlink({folder!r}, 'a')\nopen('a/x', 'w')", "FileNotFoundError"
    ),
    Attack("writing into the Python library", "import os\nopen(os.__file__, 'a')", "failed: (OSError|PermissionError)"),
    Attack("writing beside its folder", "open('/planted', 'w')", "failed: (OSError|PermissionError)"),
    Attack(
        "connecting to a server here", "import socket\nsocket.create_connection(('127.0.0.1', {port}))", "Permission"
    ),
    Attack("signal to a process outside", "import os\nos.kill({pid}, 10)", "failed: ProcessLookupError"),
    Attack("signal to everyone", "import os\nos.kill(-1, 9)", f"{ENDED}|ProcessLookupError"),
    Attack(
        "killing the first process of its namespace",
        "import os, time\nos.kill(1, 9)\ntime.sleep(.2)\nraise OSError('alive')",
        "alive",
    ),
    Attack(
        "a daemon left behind",
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\n  os._exit(0)",
        "failed: PermissionError",
    ),
    Attack(
        "new namespaces",
        SYSCALL + "if libc.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')",
        "failed: PermissionError",
    ),
    Attack(
        "capabilities",
        SYSCALL
        + "a, b = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        + "assert libc.capget(a, b) == 0 and not any(b), list(b)\nraise OSError('none')",
        "failed: OSError: none",
    ),
    # the verdict
    Attack("sys.exit(0) before the tests", "import sys\nsys.exit(0)", "SystemExit"),
    Attack("os._exit(0) before the tests", "import os\nos._exit(0)", ENDED),
    Attack("sys.exit(0) in the function", "import sys\ndef f(x): sys.exit(0)", "SystemExit"),
    Attack("os._exit(0) in the function", "import os\ndef f(x): os._exit(0)", ENDED),
    Attack("sys.exit(0), no tests given", "import sys\nsys.exit(0)", "SystemExit", tests=""),
    Attack("os._exit(0), no tests given", "import os\nos._exit(0)", ENDED, tests=""),
    Attack("exit handlers", "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", "SystemExit"),
    Attack(
        "an object equal to everything", "class A:\n  def __eq__(s, o): return True\ndef f(x): return A()", "Assertion"
    ),
    Attack(
        "an int equal to everything",
        "class A(int):\n  def __eq__(s, o): return True\n  __hash__ = None\ndef f(x): return A(1)",
        "AssertionError",
    ),
    Attack(
        "an object that is any number",
        "class A:\n  def __abs__(s): return 0\n  def __sub__(s, o): return s\ndef f(x): return A()",
        "TypeError",
        tests="assert abs(f(2) - 3) < 1e-6",
    ),
    Attack(
        "AssertionError replaced",
        "import builtins\nclass A(BaseException):\n  def __new__(c, *a): import os; os._exit(0)\n"
        "builtins.AssertionError = AssertionError = A\ndef f(x): return 0",
        "failed: AssertionError",
    ),
    Attack(
        "builtins replaced",
        "import builtins\nbuiltins.abs = abs = lambda x: 0\ndef f(x): return 0",
        "failed: AssertionError",
        tests="assert abs(f(2) - 3) < 1e-6",
    ),
    Attack(
        "a standard module replaced",
        "class math:\n  isclose = lambda *a, **k: True\ndef f(x): return 0",
        "failed: AssertionError",
        tests="assert math.isclose(f(2), 3)",
    ),
    Attack(
        "names of the tests replaced",
        "def check(candidate): pass\ndef f(x): return 0",
        "failed: AssertionError",
        tests="def check(candidate):\n    assert candidate(2) == 3\ncheck(f)",
    ),
    Attack(
        "a loop of the tests ended early",
        "def f(x): raise StopIteration",
        "failed: RuntimeError",
        tests="def one(x):\n    assert f(x) == x + 1\nlist(map(one, range(5)))",
    ),
    Attack(
        "modules of the checker shadowed",
        "import sys\nfor m in ('json', 'ast', 'traceback', 'sandbox_child'):\n  open(m + '.py', 'w').write('1/0')\n"
        "  sys.modules.pop(m, None)\nsys.path.insert(0, '.')\ndef f(x): return 0",
        "failed: AssertionError",
    ),
    Attack(
        "success printed", 'print(\'{{"passed": true, "reason": "passed"}}\')\ndef f(x): return 0', "AssertionError"
    ),
    Attack(
        "success written to every descriptor",
        FDS.format(bytes=rb"""b'{{"passed": true, "reason": "passed"}}\n'""") + "os._exit(0)",
        "failed",
    ),
    Attack(
        "success as an answer",
        'import os\ndef f(x):\n  for fd in range(100):\n    try: os.write(fd, b\'"passed"\\n{{"value": true}}\\n\')\n'
        "    except OSError: pass\n  os._exit(0)",
        "failed",
    ),
    Attack(
        "the checker's frames",
        "import sys\nframe = sys._getframe()\nwhile frame:\n  for x in list(frame.f_locals.values()):\n"
        "    if hasattr(x, 'writer'):\n      for _ in range(9): x.write({{'passed': True, 'reason': 'passed'}})\n"
        "  frame = frame.f_back\ndef f(x): return 0",
        "failed",
    ),
    Attack(
        "the tests in memory",
        "import gc, sys\ntexts = repr([o for o in gc.get_objects() if isinstance(o, dict)])\n"
        "def f(x): return 3 if 'f(2) ' + '== 3' in texts + str(sys.argv) else 0",
        "failed: AssertionError",
    ),
    Attack(
        "another program in its place",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(3)'])",
        ENDED,
    ),
]


class Host:
    """What attacks would change on this machine: a secret, a folder, a server, a process, what runs here."""

    memory = 2**28 + os.getpid()  # a number that only the processes started from here have in their command line

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.secret = self.folder / "secret"
        self.secret.write_text("a secret")
        self.server = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.server.setblocking(False)
        # Not this process: where OpenVINO has run a model and let go of it, a signal that is handled ends it (its CPU
        # plugin leaves a signal stack behind that is no longer mapped).
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.victim = self.stack.enter_context(subprocess.Popen(["cat"], **pipes))
        self.before = set()
        self.before = self.processes()
        return self

    def __exit__(self, *error):
        self.stack.close()

    def fill(self, text):
        places = {"secret": str(self.secret), "folder": str(self.folder), "port": self.server.getsockname()[1]}
        return text.format(**places, pid=self.victim.pid, bytes="bytes(2**16)")

    def processes(self):
        """Those that an attack left: descendants of this process that are new, or anyone's by now."""
        every = psutil.process_iter(["cmdline"])
        ours = {p for p in every if str(self.memory) in (p.info["cmdline"] or [])}
        return ({*psutil.Process().children(recursive=True)} | ours) - self.before

    def unharmed(self):
        """The victim answers; a signal would have ended it first."""
        try:
            self.victim.stdin.write(b"?\n")
        except BrokenPipeError:
            return False
        return self.victim.stdout.readline() == b"?\n"

    def traces(self):
        """What the attacks since the last call left, in words."""
        found = []
        if [p.name for p in self.folder.iterdir()] != ["secret"] or self.secret.read_text() != "a secret":
            found.append("files outside were changed")
        with contextlib.suppress(BlockingIOError):
            self.server.accept()[0].close()
            found.append("the server saw a connection")
        if not self.unharmed():
            found.append("a process outside got a signal")
        if self.processes():
            found.append("processes are still there")
        return found


def run(attack, host):
    """`(outcome, seconds, traces)` of one attack."""
    began = time.monotonic()
    outcome = sandbox.check(host.fill(attack.program), attack.tests, seconds=attack.seconds, memory=host.memory)
    return outcome, time.monotonic() - began, host.traces()


def held(attack, outcome, traces):
    return not outcome.passed and not traces and bool(re.search(attack.reason, outcome.reason))


def main(out):
    lines = ["| attack | outcome | seconds | left on the machine |", "|---|---|---:|---|"]
    held_all = True
    with Host() as host:
        for attack in ATTACKS:
            outcome, seconds, traces = run(attack, host)
            ok = held(attack, outcome, traces)
            held_all &= ok
            reason = outcome.reason.replace(str(host.folder), "FOLDER").replace(sys.base_prefix, "PYTHON")
            cells = (
                attack.name,
                reason if ok else f"**NOT HELD** {reason}",
                f"{seconds:.1f}",
                "; ".join(traces) or "nothing",
            )
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
            print(lines[-1], flush=True)
    took = []
    for _ in range(50):
        began = time.perf_counter()
        sandbox.check("def f(x): return x + 1", TESTS)
        took.append(1000 * (time.perf_counter() - began))
    start = (
        f"A program that does nothing takes {statistics.median(took):.0f} ms (median of 50; {min(took):.0f} at best)."
    )
    Path(out).write_text("\n".join([*lines, "", start, ""]), encoding="utf-8")
    return 0 if held_all else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
