"""What runs inside the sandbox, standard library only: `python sandbox_child.py examine|answer memory seconds`.

`answer` holds the program and nothing else: it answers requests (look up a name, call it, ...) with plain values.
`examine` holds the tests, in another sandbox: it asks, compares, and alone reports the verdict. No code of the program
ever runs in the examiner, so there is no assert to patch, no marker to print and no secret to read.
Both speak JSON, one message a line; stdin is the link to the other one, stdout of the examiner leads to the parent.
"""

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence

MESSAGE = 2**24  # bytes of one answer of the program
GONE = "failed: the program ended before its tests did"


def main(role: str, memory: str, seconds: str) -> None:
    import resource  # a POSIX module: what the sandbox runs is imported on Windows too, though never run there

    for limit, most in {
        "AS": int(memory),
        "CPU": int(seconds),
        "FSIZE": 2**24,
        "NOFILE": 64,
        "CORE": 1,  # no file and, unlike 0, no run of the machine's crash handler
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))
    other, parent = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    if role == "examine":
        examine(Link(other), Link(parent))
    else:
        answer(Link(other))


class Link:
    """One end of a socket that carries JSON lines."""

    def __init__(self, fd: int):
        self.reader, self.writer = os.fdopen(fd, "rb"), os.fdopen(os.dup(fd), "wb")

    def read(self, most: int = -1) -> object:
        line = self.reader.readline(most)
        if not line.endswith(b"\n"):
            raise EOFError("output limit" if len(line) == most else GONE)
        return json.loads(line)

    def write(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()


def pack(x: object, refer: Callable[[object], dict]) -> object:
    """`x` as JSON; what is not a plain value goes through `refer`, which names it or raises."""
    if x is None or isinstance(x, bool | float | str):
        return x
    if isinstance(x, int):
        return x if -(2**63) <= x < 2**63 else {"int": hex(x)}  # decimal digits of an int are limited, hex digits not
    if isinstance(x, complex):
        return {"complex": [x.real, x.imag]}
    if isinstance(x, bytes | bytearray):
        return {"bytes": bytes(x).hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind):
            return {kind.__name__: [pack(item, refer) for item in x]}
    if isinstance(x, dict):
        return {"dict": [[pack(key, refer), pack(value, refer)] for key, value in x.items()]}
    return refer(x)


def unpack(x: object, resolve: Callable[[str, object], object]) -> object:
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(unpack(item, resolve) for item in content)
    if kind == "dict":
        return {unpack(key, resolve): unpack(value, resolve) for key, value in content}
    return resolve(kind, content)


def answer(link: Link) -> None:
    """Run the program, then do what the examiner asks, until it hangs up."""
    module = types.ModuleType("program")  # not __main__: a script's main block is no part of what is tested
    sys.modules["program"] = module
    objects = []

    def refer(x: object) -> dict:
        objects.append(x)
        return {"object": len(objects) - 1}

    link.write("ready")
    does = {
        "run": lambda text: exec(compile(text, "<program>", "exec"), module.__dict__),
        "has": lambda name: name in module.__dict__,
        "name": lambda name: module.__dict__[name],
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
        "iter": iter,
        "next": next,
    }
    while True:
        action, args = link.read()
        try:
            result = does[action](*(unpack(x, lambda kind, i: objects[i]) for x in args))
            reply = {"value": pack(result, refer)}
        except BaseException as error:
            reply = {"raised": [c.__name__ for c in type(error).__mro__], "text": str(error)[:500]}
        link.write(reply)


class Remote:
    """Something of the program's that has no plain value: it can be used, but equals nothing but itself."""

    def __init__(self, ask: Callable, index: int):
        vars(self).update(_ask=ask, _index=index)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> object:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("setattr", self, name, value)

    def __iter__(self) -> object:
        return self._ask("iter", self)

    def __next__(self) -> object:
        return self._ask("next", self)


def examine(program: Link, parent: Link) -> None:
    """Have the program run, run the tests against it, report `{"passed", "reason"}` or `{"unusable": why}`."""

    def end(**verdict: object) -> None:
        parent.write(verdict)
        os._exit(0)  # also from inside a test that would catch an exception

    def ask(action: str, *args: object) -> object:
        request = [action, [pack(x, refer) for x in args]]
        try:
            program.write(request)
            reply = program.read(MESSAGE)
        except (EOFError, OSError, ValueError) as error:
            end(passed=False, reason=str(error) if isinstance(error, EOFError) else GONE)
        if "raised" in reply:
            error = raised(reply["raised"], reply["text"])
            if action != "next" and isinstance(error, StopIteration):  # would end a loop of the tests early
                error = RuntimeError(f"StopIteration: {error}")
            raise error
        return unpack(reply["value"], resolve)

    def refer(x: object) -> dict:
        if not isinstance(x, Remote):
            kind = type(x).__name__
            end(unusable=f"the tests hand the program a {kind}: only plain values and its own objects can reach it")
        return {"object": x._index}

    remotes = {}

    def resolve(kind: str, content: int) -> Remote:
        return remotes.setdefault(content, Remote(ask, content))

    parent.write(program.read())
    job = parent.read()
    try:
        tree = ast.parse(job["tests"], "<tests>")
    except SyntaxError as error:
        end(unusable=f"the tests are not Python: {error}")
    try:
        ask("run", job["program"])
        names = {"__name__": "tests"}
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            # a builtin or a standard module is the examiner's own, whatever the program says it is
            if (name == job["entry"] or not hasattr(builtins, name)) and ask("has", name):
                own = name != job["entry"] and name in sys.stdlib_module_names
                names[name] = importlib.import_module(name) if own else ask("name", name)
        exec(compile(tree, "<tests>", "exec"), names)
    except BaseException as error:
        end(passed=False, reason=explain(error, job["tests"]))
    end(passed=True, reason="passed")


def raised(names: Sequence[str], text: str) -> Exception:
    """The nearest builtin exception to one whose classes have these names."""
    if not hasattr(builtins, names[0]):
        text = f"{names[0]}: {text}"
    for kind in (getattr(builtins, name, None) for name in names):
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):  # UnicodeDecodeError takes more than a text, ValueError does not
                return kind(text)
    return RuntimeError(f"{names[0]}: {text}")


def explain(error: BaseException, tests: str) -> str:
    if isinstance(error, MemoryError):
        return "memory limit"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
    where = f" in {tests.splitlines()[lines[-1] - 1].strip()[:200]}" if lines else ""
    said = "".join(c if c.isprintable() else " " for c in str(error)[:300])  # the program's words may reach a terminal
    return f"failed: {type(error).__name__}{where}{f': {said}' if said else ''}"


if __name__ == "__main__":
    main(*sys.argv[1:])
