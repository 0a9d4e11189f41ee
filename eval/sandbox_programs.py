"""The programs of `sandbox_attacks.py`, each with how it must end."""

import dataclasses
import platform

import pyseccomp

from basis_select.evaluation import sandbox
from basis_select.evaluation.tasks import utils

DECOY = "/decoys"  # in the sandbox: a folder of the host's that programs may write to, with a device node in it
TESTS = "assert f(2) == 3"  # no attack defines an f that does this
ENDED = "failed: the program ended before its tests did"
DENIED = r"failed: (OSError|PermissionError)[^:]*: \[Errno (1|38)\]"


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    program: str  # {secret}, {folder}, {port}, {pid}: where the machine could be hurt
    reason: str  # regular expression
    tests: str = TESTS
    seconds: float = 20
    tries: int = 1  # attacks that the program holds


FDS = "import os\nfor fd in range(100):\n  try: os.write(fd, {bytes})\n  except OSError: pass\n"
SYSCALLS = (
    "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nbuf = ctypes.create_string_buffer(4096)\n"
    f"file, node = b'{DECOY}/file', b'{DECOY}/node'\nfd = os.open(file, os.O_RDONLY)\nleft = []\n"
    "def attempt(name, *args):\n"
    "  if libc.syscall(*args) >= 0 or ctypes.get_errno() not in (1, 38): left.append(name)\n"
)
ATTACKS = [
    # more than its share
    Attack("fork bomb", "import os\nwhile True: os.fork()", DENIED),
    Attack("fork bomb through subprocess", "import subprocess, sys\nsubprocess.Popen([sys.executable])", DENIED),
    Attack("thread bomb", "import threading\nwhile True: threading.Thread(target=input).start()", "start new thread"),
    Attack("memory bomb", "x = []\nwhile True: x.append(bytearray(2**24))", "memory limit"),
    Attack("memory bomb in a file without a name", "import os\nfd = os.memfd_create('x')", DENIED),
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
    Attack("connecting to a server here", "import socket\nsocket.create_connection(('127.0.0.1', {port}))", DENIED),
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
        DENIED,
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


# By number, as the C library need not know them: `name: arguments`. `file`, `node` and `fd`, the file opened, are the
# machine's; `buf` is 4 KiB of memory.
CALLS = {
    "on a file or node of the machine": """
        chmod: node, 0o777
        fchmod: fd, 0o777
        fchmodat: -100, node, 0o777
        fchmodat2: -100, node, 0o777, 0
        chown: node, 65534, 65534
        fchown: fd, 65534, 65534
        lchown: node, 65534, 65534
        fchownat: -100, node, 65534, 65534, 0
        utime: node, None
        utimes: node, None
        futimesat: -100, node, None
        utimensat: -100, node, None, 0
        setxattr: file, b'user.new', b'x', 1, 0
        lsetxattr: file, b'user.new', b'x', 1, 0
        fsetxattr: fd, b'user.new', b'x', 1, 0
        setxattrat: -100, file, 0, b'user.new', buf, 16
        removexattr: file, b'user.kept'
        lremovexattr: file, b'user.kept'
        fremovexattr: fd, b'user.kept'
        removexattrat: -100, file, 0, b'user.kept'
        file_setattr: -100, file, buf, 24, 0
        flock: fd, 2
        mknod: b'/tmp/null', 0o20666, 0x103
        mknodat: -100, b'/tmp/null', 0o20666, 0x103
    """,
    "for memory that no limit counts": """
        memfd_create: b'x', 0
        memfd_secret: 0
        shmget: 0, 2**20, 0o1600
        msgget: 0, 0o1600
        semget: 0, 100, 0o1600
        mq_open: b'x', 0o102, 0o600, None
        add_key: b'user', b'name', b'x', 1, -2
        request_key: b'user', b'name', None, -2
        keyctl: 1, None
        io_setup: 64, buf
        io_uring_setup: 8, buf
        userfaultfd: 1
        timer_create: 0, None, buf
        timerfd_create: 0, 0
        eventfd2: 0, 0
        signalfd4: -1, buf, 8, 0
        inotify_init1: 0
        fanotify_init: 0x200, 0
        vmsplice: 1, buf, 1, 0
        tee: 0, 1, 1, 0
        mlock: buf, 4096
        mlockall: 1
        pkey_alloc: 0, 0
        mmap: None, 2**21, 3, 0x40022, -1, 0
        fallocate: fd, 0, 0, 2**20
    """,
    "that reach the machine": """
        sync:
        syncfs: fd
        fsync: fd
        fdatasync: fd
        sync_file_range: fd, 0, 0, 2
        msync: buf, 0, 4
        readahead: fd, 0, 2**20
        swapon: file, 0
        swapoff: file
        quotactl: 0, None, 0, None
        quotactl_fd: fd, 0, 0, None
        acct: None
        reboot: 0, 0, 0, None
        kexec_load: 0, 0, None, 0
        kexec_file_load: -1, -1, 0, None, 0
        init_module: buf, 0, b''
        finit_module: fd, b'', 0
        delete_module: b'x', 0
        clock_settime: 0, buf
        clock_adjtime: 0, buf
        settimeofday: None, None
        sethostname: b'x', 1
        setdomainname: b'x', 1
        syslog: 10, None, 0
        vhangup:
        iopl: 3
        ioperm: 0x80, 1, 1
        bpf: 0, buf, 64
        perf_event_open: buf, 0, -1, -1, 0
        setpriority: 0, 0, 0
        ioprio_set: 1, 0, 0x6000
        sched_setaffinity: 0, 8, buf
        sched_setscheduler: 0, 3, buf
        sched_setattr: 0, buf, 0
        mbind: None, 0, 0, None, 0, 0
        migrate_pages: 0, 0, None, None
        membarrier: 0, 0, 0
    """,
    "for another process or for other rights": """
        fork:
        clone: 17, None, None, None, None
        clone: 0x10f00, None, None, None, None
        clone3: buf, 64
        unshare: 0x10000000
        unshare: 0x20000
        unshare: 0x40000000
        setns: fd, 0
        ptrace: 0, 0, None, None
        process_vm_readv: 1, None, 0, None, 0, 0
        process_vm_writev: 1, None, 0, None, 0, 0
        process_madvise: fd, None, 0, 4, 0
        kcmp: 1, 2, 0, 0, 0
        pidfd_open: 1, 0
        pidfd_getfd: fd, 0, 0
        pidfd_send_signal: fd, 0, None, 0
        rt_sigqueueinfo: 1, 0, buf
        tkill: 1, 0
        prlimit64: 1, 7, None, buf
        execveat: fd, b'', None, None, 0x1000
        prctl: 23, 0
        personality: 0x400000
        modify_ldt: 0, buf, 16
        seccomp: 2, 0, buf
        landlock_create_ruleset: None, 0, 1
        capget: buf, None
        capset: buf, buf
        setuid: 65534
        setgroups: 0, None
        setsid:
    """,
    "that mount": """
        mount: b'/tmp', b'/tmp', None, 4096, None
        umount2: b'/tmp', 0
        pivot_root: b'/tmp', b'/tmp'
        chroot: b'/tmp'
        fsopen: b'tmpfs', 0
        fsconfig: fd, 0, None, None, 0
        fsmount: fd, 0, 0
        fspick: -100, b'/tmp', 0
        open_tree: -100, b'/tmp', 1
        move_mount: -100, b'/tmp', -100, b'/tmp', 0
        mount_setattr: -100, b'/tmp', 0, buf, 32
        open_tree_attr: -100, b'/tmp', 1, buf, 32
        listmount: buf, buf, 1, 0
        name_to_handle_at: -100, file, buf, buf, 0
        open_by_handle_at: fd, buf, 0
    """,
    "to the network or with what is open": """
        socket: 1, 1, 0
        socket: 2, 1, 0
        socket: 10, 2, 0
        socket: 16, 3, 0
        socket: 17, 3, 0
        socket: 38, 5, 0
        socket: 40, 1, 0
        socketpair: 2, 1, 0, buf
        bind: fd, buf, 16
        connect: fd, buf, 16
        listen: fd, 1
        sendmsg: fd, buf, 0
        sendmmsg: fd, buf, 1, 0
        recvmsg: fd, buf, 0
        setsockopt: fd, 1, 7, buf, 4
        shutdown: fd, 2
        fcntl: fd, 6, buf
        fcntl: fd, 1024, 0
        fcntl: fd, 1026, 1
        fcntl: fd, 1031, 2**20
        ioctl: fd, 0x40086602, buf
        ioctl: fd, 0x5412, b'x'
        madvise: buf, 4096, 12
    """,
}
RECENT = {  # numbers that libseccomp has no name for yet; from 424 on they are the same on every processor
    **{"memfd_secret": 447, "quotactl_fd": 443, "process_madvise": 440, "landlock_create_ruleset": 444},
    **{"mount_setattr": 442, "fchmodat2": 452, "listmount": 458, "setxattrat": 463, "removexattrat": 466},
    **{"open_tree_attr": 467, "file_setattr": 469},
}


def number(name):
    """The machine's number of a system call, None where its processor has none of that name."""
    if name in RECENT:
        return RECENT[name]
    found = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    return found if found >= 0 else None


def system_calls(family, lines):
    calls = [line.strip().partition(":") for line in lines.splitlines() if line.strip()]
    calls = [(name, arguments) for name, _, arguments in calls if number(name) is not None]
    attempts = "".join(f"attempt('{name}',{number(name)},{arguments})\n" for name, arguments in calls)
    names = ", ".join(dict.fromkeys(name for name, _ in calls))
    end = "raise OSError(f'carried out: {{left}}')"
    return Attack(f"system calls {family}: {names}", SYSCALLS + attempts + end, r"carried out: \[\]", tries=len(calls))


def every_other_call():
    """Whatever number has no name yet, or no row here.

    But for uprobe and uretprobe, which no filter sees: the kernel ends a program whose call it did not plant itself.
    """
    allowed = {335, 336} | {number(name) for name in [*sandbox.ALLOWED.split(), *sandbox.ALLOWED_WITH]}
    attempts = f"for n in {sorted({*range(1024)} - allowed)}: attempt(n, n, -1, -1, -1, -1, -1, -1)\n"
    end = "raise OSError(f'carried out: {{left}}')"
    return Attack("every other system call below 1024", SYSCALLS + attempts + end, r"carried out: \[\]")


def kept_from(name, program, reason, tests=TESTS):
    """An attack that would otherwise take longer than it is worth to wait for."""
    return Attack(name, program, rf"{reason}|time limit of 0.5 s", tests, 0.5)


LIMITS = [
    Attack(
        "memory in extended attributes",
        "import os\nopen('a', 'w')\nfor i in range(2000): os.setxattr('a', f'user.{{i}}', bytes(60000))",
        DENIED,
    ),
    Attack("locks without end", "import fcntl\nf = open('a', 'w')\nfcntl.lockf(f, fcntl.LOCK_EX, 1, 0)", DENIED),
    Attack("pipes without end", "import os\np = [os.pipe() for _ in range(10**4)]", "Too many open files"),
    Attack("sockets without end", "import socket\np = [socket.socketpair() for _ in range(10**4)]", "Too many open"),
    Attack("epolls without end", "import select\np = [select.epoll() for _ in range(10**4)]", "Too many open files"),
    Attack("a terabyte of nothing", "open('a', 'wb').truncate(2**40)", "File too large"),
    Attack("a map larger than memory", "import mmap\nmmap.mmap(-1, 2**32)", "memory limit|Cannot allocate"),
    Attack(
        "maps without end", "import mmap\nm = []\nwhile True: m.append(mmap.mmap(-1, 2**22))", "allocate|memory limit"
    ),
    Attack("a bomb of zeros", "import zlib\nzlib.decompress(zlib.compress(bytes(2**28)) , 15, 2**31)", "memory limit"),
    Attack("a number of 10 billion bits", "x = 1 << 10**10", "memory limit"),
    Attack("a long text", "x = 'x' * 2**31", "memory limit"),
    Attack("a wide format", "x = '%2147483647d' % 1", "memory limit"),
    Attack(
        "an answer of 10 million entries", "def f(x): return dict.fromkeys(range(10**7))", "output limit|memory limit"
    ),
    Attack("an answer that holds itself", "def f(x):\n  x = []\n  x.append(x)\n  return x", "RecursionError"),
    Attack("a long error", "def f(x): raise ValueError('x' * 2**26)", "failed: ValueError"),
    kept_from("a tower of powers", "x = 9**9**9", "memory limit"),
    kept_from("a pattern that backtracks", "import re\nre.match('(a+)+b', 'a' * 99)", "never"),
    kept_from("an iterator without end", "def f(x):\n  while True: yield x", "never", "assert list(f(2)) == [3]"),
    kept_from(
        "folders in folders", "import os\nwhile True:\n  os.mkdir('a')\n  os.chdir('a')", "File name too long|OSError"
    ),
    kept_from(
        "very many folders", "import os, itertools\nfor i in itertools.count(): os.mkdir(str(i))", "No space left"
    ),
    kept_from(
        "very many links", "import os\nopen('a', 'w')\nfor i in range(10**7): os.link('a', str(i))", "Too many links"
    ),
    kept_from("stopping itself", "import os\nos.kill(os.getpid(), 19)", "never"),
    kept_from(
        "reading what its tests ask",
        "import os\nfor fd in range(3, 64):\n  try: os.read(fd, 9)\n  except OSError: pass",
        ENDED,
    ),
    kept_from("waiting without end", "import signal\nsignal.pause()", "never"),
]
ENDINGS = [
    Attack("a crash", "import ctypes\nctypes.string_at(0)", ENDED),
    Attack(
        "a crash that the machine's handler is told of",
        "import os, resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (1, 1)\nos.abort()",
        ENDED,
    ),
    Attack("killing itself", "import os\nos.kill(os.getpid(), 9)", ENDED),
    Attack("an alarm", "import signal, time\nsignal.alarm(1)\ntime.sleep(9)", ENDED),
    Attack("closing what is open", "import os\nos.closerange(0, 64)", ENDED),
    Attack(
        "links that do not wait",
        "import os\nfor fd in range(64):\n  try: os.set_blocking(fd, False)\n  except OSError: pass",
        "failed",
    ),
    Attack("collecting what the checker needs", "import gc, sys\nsys.modules.clear()\ngc.collect()", "failed"),
    Attack(
        "errors while it ends",
        "class A:\n  def __del__(s): raise SystemExit\na = A()\ndef f(x): return 0",
        "AssertionError",
    ),
    Attack(
        "what the machine left open",
        "import os, stat\nkinds = set()\nfor fd in range(64):\n  try: kinds.add(stat.S_IFMT(os.fstat(fd).st_mode))\n"
        "  except OSError: pass\nassert kinds == {{stat.S_IFSOCK, stat.S_IFCHR}}\nraise OSError('links and null')",
        "failed: OSError: links and null",
    ),
]
LINK = "import gc, os, time\nlink = next(o for o in gc.get_objects() if type(o).__name__ == 'Link')\n"
ANSWERS = {
    "that is no JSON": ("b'yes'", "failed"),
    "that is empty": ("b''", "failed"),
    "of another kind": (rb"""b'{{"value": {{"eval": ["3"]}}}}'""".decode(), "failed"),
    "that names an object never seen": (rb"""b'{{"value": {{"object": 99}}}}'""".decode(), "failed"),
    "of two kinds": (rb"""b'{{"value": {{"int": "3", "list": []}}}}'""".decode(), "failed"),
    "that is deep": ("b'[' * 10**5 + b']' * 10**5", "failed"),
    "that is a number too long to read": ("b'1' * 10**6", "failed"),
    "that is not a number": (rb"""b'{{"value": NaN}}'""".decode(), "AssertionError"),
    "with an error of no name": (rb"""b'{{"raised": [], "text": ""}}'""".decode(), "failed"),
    "with an error that is no error": (rb"""b'{{"raised": ["int"], "text": "3"}}'""".decode(), "failed"),
    "with an error that ends the checker": (rb"""b'{{"raised": ["SystemExit"], "text": 0}}'""".decode(), "failed"),
    "that is a verdict": (rb"""b'{{"passed": true, "reason": "passed"}}'""".decode(), "failed"),
    "that says the tests are unusable": (rb"""b'{{"unusable": "no"}}'""".decode(), "failed"),
    "of many small lists": ("b'[' + b'[],' * 10**6 + b'[]]'", "failed|memory limit|output limit"),
}
VALUES = {
    "that is of every class": "class A:\n  __class__ = int\ndef f(x): return A()",
    "that prints as another": "class A(float):\n  __repr__ = lambda s: '3'\ndef f(x): return A(0)",
    "that is larger than its size": "class A(int):\n  __lt__ = __le__ = lambda s, o: True\ndef f(x): return A(0)",
    "that hashes as another": "class A(str):\n  def __hash__(s): return 3\n  __eq__ = id\ndef f(x): return A('')",
    "with a comparison of its own": "class A(list):\n  __eq__ = lambda s, o: True\ndef f(x): return A([0])",
    "that turns into any other": "class A:\n  __getattr__ = lambda s, n: lambda *a: 3\ndef f(x): return A()",
}
ASKED = {
    "prompt": "def double(x):\n  return 2 * x\n\ndef half(x):\n",
    "canonical_solution": "  return x / 2\n",
    "entry_point": "half",
}
REDEFINED = {
    "after the function": "  return x\ndef double(x): return x",
    "before the function returns": "  global double\n  double = lambda x: x\n  return x",
    "through the names of the module": "  return x\nglobals()['double'] = lambda x: x",
    "through the module": "  return x\nimport sys\nsys.modules['program'].double = lambda x: x",
    "in its code": "  return x\ndouble.__code__ = (lambda x: x).__code__",
    "by a class": "  return x\nclass double(float): pass",
    "by an import": "  return x\nfrom operator import pos as double",
    "by a wrapper": "  return x\ndef wrap(f): return lambda x: x\ndouble = wrap(double)",
    "by its absence": "  return x\ndel double",
    "by a builtin": "  return x\nimport builtins\nbuiltins.double = double = abs",
}


def other_processors():
    """System calls in the numbers of a 32-bit processor, which the filter's table does not hold."""
    if platform.machine() == "x86_64":
        yield Attack("a system call with the numbers of x32", SYSCALLS + "libc.syscall(0x40000000 + 39)", ENDED)
        code = "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        run = "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
        yield Attack("a system call with the numbers of i386", code + run, ENDED)


def answer(name, raw, reason):
    program = LINK + f"def f(x):\n  link.writer.write({raw} + b'\\n')\n  link.writer.flush()\n  return 0"
    return Attack(f"an answer {name}", program, reason)


ATTACKS += [
    *LIMITS,
    *ENDINGS,
    *other_processors(),
    *(system_calls(family, lines) for family, lines in CALLS.items()),
    every_other_call(),
    *(answer(name, *what) for name, what in ANSWERS.items()),
    *(Attack(f"a value {name}", program, f"failed|{ENDED}") for name, program in VALUES.items()),
    *(
        Attack(
            f"a helper of the tests redefined {how}",
            ASKED["prompt"] + completion,
            "failed: AssertionError",
            f"{utils.helpers(ASKED)}\nassert double(half(3)) == 3",
        )
        for how, completion in REDEFINED.items()
    ),
]
