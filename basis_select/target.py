"""What is asked of a model's size: one of five ways to say it, its range, and the room that it leaves."""

import math
import re
from dataclasses import dataclass
from typing import Literal

TARGETS = ("keep", "size", "max_drop", "mass", "latency")
Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}


@dataclass(frozen=True)
class Target:
    """How much of a model stays, as `target` reads it.

    name: one of TARGETS. amount: in `unit`, which is "share" of the targeted layers' parameters (keep) or of their
    scores (mass), "x" times smaller or faster, "parameters", "bytes", "nats" or "seconds". said: in the user's words.
    tokens: of a latency, how many are computed at once.
    """

    name: str
    amount: float
    unit: str
    said: str
    tokens: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.said}"

    def share(self, parameters: int, targeted: int, dtype: Dtype, saved: int = 0) -> float:
        """The fraction of the `targeted` parameters that may stay for a model of so many `parameters` to meet this.

        saved: parameters by which the rest of the model shrinks. dtype: in which all are stored. Raises ValueError,
        with the smallest size there is, for one that cannot be met.

            >>> target(size="4x").share(parameters=100, targeted=90, dtype="bfloat16")
            0.16666666666666666
        """
        if self.name == "keep":
            return self.amount
        rest = parameters - targeted - saved
        fraction = (self.allowed(parameters, dtype) - rest) / targeted
        if fraction <= 0:
            raise ValueError(
                f"{self} leaves nothing for the targeted layers: the rest of the model alone is {_whole(rest, dtype)}"
            )
        return min(fraction, 1.0)

    def allowed(self, parameters: int, dtype: Dtype) -> float:
        """How many parameters, all stored in `dtype`, a size allows a model of so many. ValueError if it is more."""
        amounts = {"x": parameters / self.amount, "bytes": self.amount / BYTES[dtype], "parameters": self.amount}
        allowed = amounts[self.unit]
        if allowed > parameters:
            raise ValueError(f"{self} is more than the model has: {_whole(parameters, dtype)}")
        return allowed


def target(
    keep: float | None = None,
    size: str | None = None,
    max_drop: float | None = None,
    mass: float | None = None,
    latency: str | None = None,
) -> Target:
    """The one target that is given. Raises ValueError for none, for several, and for one out of its range.

    >>> target(size="120MB")
    Target(name='size', amount=120000000.0, unit='bytes', said='120MB', tokens='')
    """
    given = {"keep": keep, "size": size, "max_drop": max_drop, "mass": mass, "latency": latency}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        named = f"{' and '.join(given)} are given" if given else "nothing says how much stays"
        raise ValueError(f"{named}: give exactly one of {', '.join(TARGETS)}")
    ((name, value),) = given.items()
    if name == "size":
        return _size(value)
    if name == "latency":
        return _latency(value)
    value = float(value)
    if name == "max_drop":
        if not (0 <= value < math.inf):
            raise ValueError(f"max_drop={value} should be a number of nats, 0 or more")
        return Target(name, value, "nats", f"{value}")
    if not 0 < value <= 1:
        of = "targeted parameters" if name == "keep" else "each layer's scores"
        raise ValueError(f"{name}={value} is not a fraction above 0 and up to 1 of the {of}")
    return Target(name, value, "share", f"{value}")


def _size(text: str) -> Target:
    """ "4x" fewer parameters in all, "90M" (K, M, B) parameters, or "120MB" (KB, MB, GB; 10^3 steps) of weights."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(x|[KMB]|[KMG]B)", str(text))
    if not match or float(match[1]) == 0:
        raise ValueError(f"size={str(text)[:40]!r} should read like 4x, 90M or 120MB")
    number, unit = float(match[1]), match[2]
    if unit == "x":
        if number < 1:
            raise ValueError(f"size={text} asks for more than the whole model: it should be 1x or more")
        return Target("size", number, "x", text)
    return Target("size", number * _UNITS[unit[0]], "bytes" if len(unit) == 2 else "parameters", text)


def _latency(text: str) -> Target:
    """ "2x decode", "20ms decode", "1.5x prefill 128": of the whole model, decoding being one token at once."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)(x|ms) (?:decode|prefill (\d{1,9}))", text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"latency={text[:40]!r} should read like 2x decode, 20ms decode or 1.5x prefill 128")
    number, unit = float(match[1]), match[2]
    if unit == "x" and number < 1:
        raise ValueError(f"latency={text!r} asks for a slower model: it should be 1x or more")
    if unit == "ms":
        number, unit = number / 1e3, "seconds"
    return Target("latency", number, unit, text, match[3] or "1")


def _whole(parameters: int, dtype: Dtype) -> str:
    return f"{parameters / 1e6:.1f} M parameters, {parameters * BYTES[dtype] / 1e6:.0f} MB in {dtype}"
