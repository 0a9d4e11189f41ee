"""Runs model-written Python without letting it touch the machine or its own verdict.

Program and tests run in two processes, each in its own bubblewrap sandbox: no network, no other process visible, no
file but the C library and Python read-only and an empty temporary folder of 64 MiB, one thread, no system calls but
those that Python needs, limits on memory, time and the size of files. The program only ever answers the tests with
values (numbers, strings, containers, its own objects): it cannot reach the tests, the verdict, or anything that
outlives it.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = 2**26  # bytes of the temporary folder
EXAMINER = 2**30  # bytes of memory for the tests' own process
START = 60  # seconds in which a sandbox must start, on a busy machine too; they do not count as the program's
# What Python needs to compute and to use its own folder. No other system call exists for the program, whatever its
# number: no second process or thread, no memory that no limit counts, no change of what files are but their content.
ALLOWED = """
    read readv write writev pread64 preadv pwrite64 pwritev lseek close dup dup2 dup3 umask
    open openat creat access faccessat stat fstat lstat newfstatat statx readlink readlinkat
    getdents getdents64 getcwd chdir fchdir truncate ftruncate
    mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat
    brk munmap mremap mprotect execve exit exit_group wait4 arch_prctl set_tid_address set_robust_list rseq futex
    getpid gettid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid
    getrlimit getrusage times sysinfo uname sched_getaffinity sched_yield getcpu getrandom
    kill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend sigaltstack pause restart_syscall
    alarm setitimer getitimer time gettimeofday clock_gettime clock_getres nanosleep clock_nanosleep
    pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    sendto recvfrom
"""
# These only with the values named, as `(argument, bits of it that count, values)`; Linux numbers, for any machine.
EVERY_BIT = 2**64 - 1
ALLOWED_WITH = {
    "fcntl": (1, EVERY_BIT, (0, 1, 2, 3, 4, 1030)),  # F_DUPFD, F_(GET|SET)(FD|FL), F_DUPFD_CLOEXEC: no locks or leases
    "ioctl": (1, EVERY_BIT, (0x5401, 0x5421, 0x5450, 0x5451)),  # TCGETS, FIONBIO, FIONCLEX, FIOCLEX
    "madvise": (2, EVERY_BIT, (4, 8)),  # MADV_DONTNEED, MADV_FREE
    "mmap": (3, 0x40000, (0,)),  # without MAP_HUGETLB: huge pages are the machine's
    "prlimit64": (0, EVERY_BIT, (0,)),  # of itself
    "socketpair": (0, EVERY_BIT, (1,)),  # AF_UNIX: what asyncio wakes itself with
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    passed: bool
    reason: str  # "passed", "failed: AssertionError in ...", "time limit of 10 s", "memory limit", "output limit"


def check(program: str, tests: str = "", *, entry: str = "", seconds: float = 10.0, memory: int = 2**30) -> Outcome:
    """Run `program`, then `tests` against the names it defines, within `seconds` of wall time and `memory` bytes.

    Safe to call from threads. `entry` is the function under test; it matters where it hides a builtin or a standard
    module: any other such name is the real one in the tests, and what they define is theirs. What the program prints
    is not kept; installed packages are not there; it cannot start threads or processes, lock files, or change their
    modes and times. Arguments reach it as copies; its own objects can be used by the tests, but equal only themselves;
    its own exceptions arrive as the nearest builtin ones.

    With the tests apart nothing but the right values passes them. Not stopped: guessing these values, tests that ask
    too little, a hole in the kernel; and the kernel's bookkeeping of very many empty files (about 0.5 GiB in 10 s,
    freed at the end) counts as nobody's memory. With `tests` empty, "passed" means that the program reached its end on
    its own word: this holds against `sys.exit` and `os._exit`, not against code that forges the reply.

    Raises ValueError when the machine lacks any of the protections (all are required, see `missing`) or the tests
    cannot run, RuntimeError when the sandbox does not start.
    """
    if lacks := missing():
        raise ValueError(f"model-written code cannot run here, the sandbox lacks {'; '.join(lacks)}")
    here, examiner = socket.socketpair()
    asks, answers = socket.socketpair()
    with contextlib.ExitStack() as stack:
        for end in (here, examiner, asks, answers):
            stack.enter_context(end)
        stack.enter_context(_inside("answer", memory, seconds, answers, answers))
        stack.enter_context(_inside("examine", EXAMINER, seconds, asks, examiner))
        for end in (examiner, asks, answers):
            end.close()
        if _line(here, START) != "ready":
            raise RuntimeError(f"the sandbox did not start within {START} s and {memory:,} bytes of memory")
        here.sendall(json.dumps({"program": program, "tests": tests, "entry": entry}).encode() + b"\n")
        verdict = _line(here, seconds)
    if verdict is None:
        return Outcome(False, f"time limit of {seconds:g} s")
    if "unusable" in verdict:
        raise ValueError(verdict["unusable"])
    return Outcome(**verdict)


def _line(link: socket.socket, seconds: float) -> Any:
    """The next JSON line, None if it does not come in time."""
    deadline, received = time.monotonic() + seconds, b""
    while not received.endswith(b"\n"):
        link.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            chunk = link.recv(2**16)
        except TimeoutError:
            return None
        if not chunk:
            return {"passed": False, "reason": "failed: the tests ended without a verdict"}
        received += chunk
    return json.loads(received)


@functools.cache
def missing() -> list[str]:
    """The protections that this machine cannot give, in words; empty if none. `check` needs all of them."""
    if sys.platform != "linux":
        return ["every protection: it is built on Linux namespaces"]
    lacks = []
    if not shutil.which("bwrap"):
        lacks.append("isolation of files, network, processes: bubblewrap is not installed (apt-get install bubblewrap)")
    try:
        _system_call_filter()
    except (ImportError, RuntimeError, OSError) as error:
        lacks.append(f"the filter of system calls: pip install pyseccomp, apt-get install libseccomp2 ({error})")
    if not lacks:
        filtered = _pipe_of(_system_call_filter())
        command = [*_bubblewrap(), "--seccomp", str(filtered), *_python(), "-c", ""]
        try:
            trial = subprocess.run(command, pass_fds=[filtered], env={}, capture_output=True, text=True)
        finally:
            os.close(filtered)
        if trial.returncode:
            lacks.append(f"isolation of files, network, processes: {trial.stderr.strip() or 'bwrap fails'}")
    return lacks


@contextlib.contextmanager
def _inside(role: str, memory: int, seconds: float, stdin: socket.socket, stdout: socket.socket) -> Iterator[None]:
    """One process of the sandbox; on leaving it and all it could have started are gone, not merely signalled."""
    filtered = _pipe_of(_system_call_filter())
    info, told = os.pipe()
    command = [*_bubblewrap(), "--seccomp", str(filtered), "--info-fd", str(told), *_python()]
    command += ["/sandbox_child.py", role, str(memory), str(math.ceil(seconds) + 1)]
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            pass_fds=[filtered, told],
        )
    except OSError:
        os.close(info)
        raise
    finally:
        os.close(filtered)
        os.close(told)
    first = None
    try:
        with open(info, "rb") as file:
            said = file.read()
        if not said:
            raise RuntimeError(f"the sandbox did not start: {command[0]} ended with status {process.wait()}")
        first = os.pidfd_open(json.loads(said)["child-pid"])
        yield
    finally:
        # The kernel ends all others of the namespace before its first process. bwrap is no measure: where the program
        # has ended, it returns while that one still runs.
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(first, signal.SIGKILL)
            ended = select.poll()
            ended.register(first, select.POLLIN)
            ended.poll()
            os.close(first)
        process.wait()


def _pipe_of(content: bytes) -> int:
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    return read


@functools.cache
def _system_call_filter() -> bytes:
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in ALLOWED.split():
        rules.add_rule(pyseccomp.ALLOW, name)
    for name, (argument, bits, values) in ALLOWED_WITH.items():
        for value in values:
            rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, bits, value))
    read, write = os.pipe()
    with open(read, "rb") as file:
        with open(write, "wb") as target:
            rules.export_bpf(target)
        return file.read()


@functools.cache
def _bubblewrap() -> list[str]:
    python = os.path.realpath(sys.executable)
    command = [shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    command += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]  # a root caller would leave it all of root's
    for path in dict.fromkeys(["/usr/lib", "/usr/lib64", "/lib", "/lib64", f"{sys.base_prefix}/lib", python]):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--ro-bind", str(Path(__file__).with_name("sandbox_child.py")), "/sandbox_child.py"]
    command += ["--dev-bind", "/dev/null", "/dev/null"]
    return [*command, "--size", str(FOLDER), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]


def _python() -> list[str]:
    # -P and -S: nothing but the standard library can be imported, no file of the program's shadows it
    return ["--", os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-X", "utf8"]
