"""Programs that attack the machine or their own verdict, run in the sandbox: what comes of each.

python eval/sandbox_attacks.py OUT.md

Also measures what a program costs that does nothing. Exits with 1 if an attack passes its tests, ends otherwise than
expected, or leaves a trace on the machine.
"""

import contextlib
import os
import re
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
from sandbox_programs import ATTACKS, DECOY, TESTS

from basis_select.evaluation import sandbox


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
        self.decoys = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        (self.decoys / "file").write_text("a file")
        with contextlib.suppress(OSError, AttributeError):  # not every file system keeps them
            os.setxattr(self.decoys / "file", "user.kept", b"kept")
        with contextlib.suppress(PermissionError):  # only root makes nodes, and only root's could be changed
            os.mknod(self.decoys / "node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        self.marks = self.metadata()
        bind = ["--dev-bind", str(self.decoys), DECOY]
        bubblewrap = sandbox._bubblewrap()
        change = mock.patch.object(sandbox, "_bubblewrap", return_value=[bubblewrap[0], *bind, *bubblewrap[1:]])
        self.stack.enter_context(change)
        self.before = set()
        self.before = self.processes()
        return self

    def __exit__(self, *error):
        self.stack.close()

    def fill(self, text):
        places = {
            "secret": str(self.secret),
            "folder": str(self.folder),
            "decoys": str(self.decoys),
            "port": self.server.getsockname()[1],
        }
        return text.format(**places, pid=self.victim.pid, bytes="bytes(2**16)")

    def metadata(self):
        """When modes, owners, times or attributes of the decoys were last changed."""
        return {path.name: path.stat().st_ctime_ns for path in self.decoys.iterdir()}

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
        if (marks := self.metadata()) != self.marks:
            self.marks = marks
            found.append("files outside got other modes, owners, times or attributes")
        if not self.unharmed():
            found.append("a process outside got a signal")
        if self.processes():
            found.append("processes are still there")
        return found


def check(attack, host):
    return sandbox.check(host.fill(attack.program), attack.tests, seconds=attack.seconds, memory=host.memory)


def run(attack, host):
    """`(outcome, seconds, traces)` of one attack."""
    began = time.monotonic()
    outcome = check(attack, host)
    return outcome, time.monotonic() - began, host.traces()


def held(attack, outcome, traces):
    return not outcome.passed and not traces and bool(re.search(attack.reason, outcome.reason))


def main(out):
    lines = ["| attack | outcome | seconds | left on the machine |", "|---|---|---:|---|"]
    holding = 0
    with Host() as host:
        for attack in ATTACKS:
            outcome, seconds, traces = run(attack, host)
            ok = held(attack, outcome, traces)
            holding += ok * attack.tries
            reason = outcome.reason.replace(str(host.folder), "FOLDER").replace(sys.base_prefix, "PYTHON")
            cells = (
                attack.name,
                reason if ok else f"**NOT HELD** {reason}",
                f"{seconds:.1f}",
                "; ".join(traces) or "nothing",
            )
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
            print(lines[-1], flush=True)
    tried = sum(attack.tries for attack in ATTACKS)
    lines += ["", f"{tried} attacks in {len(ATTACKS)} programs, {holding} held."]
    took = []
    for _ in range(50):
        began = time.perf_counter()
        sandbox.check("def f(x): return x + 1", TESTS)
        took.append(1000 * (time.perf_counter() - began))
    start = (
        f"A program that does nothing takes {statistics.median(took):.0f} ms (median of 50; {min(took):.0f} at best)."
    )
    Path(out).write_text("\n".join([*lines, "", start, ""]), encoding="utf-8")
    return 0 if holding == tried else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
