"""How a generated response is compared with the answer."""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Literal


def exact(generated: str, answer: str) -> bool:
    """The response is the answer, up to surrounding white space."""
    return generated.strip() == answer.strip()


def number(generated: str, answer: str) -> bool:
    """The number that `generated` ends in, after the last '####' or in the last \\boxed{} if any, is that of `answer`.

    Whole numbers must be equal, others to one part in a million. Units, currencies and percent signs do not count.
    A comma is the decimal point where it cannot separate thousands: in 0,5 but not in 1,500.
    """
    found, right = _last_number(generated), _last_number(answer)
    if found is None or right is None:
        return False
    whole = found.denominator == right.denominator == 1
    return found == right if whole else abs(found - right) <= max(abs(found), abs(right)) / 1_000_000


_TYPED = str.maketrans({**dict.fromkeys("\u2212\ufe63\uff0d", "-"), "\u2044": "/", "\u2019": "'"})
_DASH = re.compile(r"\u2013(?=\S)")  # with a space after it a dash of the text
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # fractions that are one character
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)\s*(\d))")
# A space that anybody types separates thousands only where no other number stands before.
_THOUSANDS = re.compile(
    r"""(?<=\d)(?:\{,\}|\\[,!;\ ]|['_\u00a0\u2009\u202f])(?=\d{3}(?!\d))
        | (?<![\w.,/])(?<!\d\ )[1-9]\d{0,2}(?:\ \d{3})+(?!\d|\s?/)""",
    re.VERBOSE,
)
_COMMA = re.compile(  # for the decimal point: no thousands can be read there
    r"""(?<![\w.,])(?:\d{1,3}(?:\.\d{3})+,\d+ | (?:0|\d{4,}),\d+ | \d{1,3},(?:\d{1,2}|\d{4,}) | \d{1,3}(?:\.\d{3}){2,})
        (?!\d|[.,]\d)""",
    re.VERBOSE,
)
_POWER = re.compile(
    r"""(?<=\d)\s?(?:[x*\u00d7\u00b7\u22c5]|\\times|\\cdot)\s?10
        (?:\^\{?([-+]?\d{1,3})\}? | ([\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,3}))(?!\d)""",
    re.VERBOSE,
)
_NUMBER = re.compile(
    r"""(?:(?<![\w.)\]])(?P<sign>[-+])(?:(?!\s)|(?<![\d)\]]\s[-+])\s))?   # after a number or bracket an operator
        (?<![A-Za-z_\d])(?<!\d\.)            # the 2 of m2 is none
        (?:(?P<units>\d+)\s+(?=\d+/\d))?     # 1 1/2
        (?P<digits>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)
        (?:[eE](?P<power>[-+]?\d{1,3})(?!\d)|\s?/\s?(?P<below>[1-9]\d*)(?![\d/.]))?""",
    re.VERBOSE,
)


def _last_number(text: str) -> Fraction | None:
    """The last number of a text, after '####' or in the last \\boxed{} if it has one, as a Fraction; None without."""
    for m in reversed(list(_NUMBER.finditer(_plain(_boxed(text.rpartition("####")[2]))))):
        value = _value(m["digits"].replace(",", "")) * Fraction(10) ** int(m["power"] or 0) / _value(m["below"] or "1")
        value += _value(m["units"] or "0")
        return -value if m["sign"] == "-" else value
    return None


def _value(digits: str) -> Fraction:
    return Fraction(Decimal(digits))  # int takes no more than some thousand digits


def _boxed(text: str) -> str:
    text = text[text.rfind(r"\boxed{") :] if r"\boxed{" in text else text
    depth = 0
    for i, character in enumerate(text if text.startswith(r"\boxed{") else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "}" and not depth:
            return text[: i + 1]
    return text


def _plain(text: str) -> str:
    """A text with numbers as `_NUMBER` reads them: without typography, LaTeX, currencies."""
    text = _DASH.sub("-", text.translate(_TYPED))
    text = _THOUSANDS.sub(lambda m: m[0].replace(" ", "") if m[0][0].isdigit() else "", text)
    text = _COMMA.sub(lambda m: m[0].replace(".", "").replace(",", "."), text)
    text = _POWER.sub(lambda m: "e" + (m[1] or m[2]).translate(_RAISED), text)
    text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{(m[2] or m[4]).replace(',', '')}", text)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), text)
    text = "".join(" " if unicodedata.category(c) == "Sc" else c for c in text)
    text = re.sub(r"\b([A-Z]{3})(?=\d)", r"\1 ", text)  # a currency's code
    return re.sub(r"[^\S\n]+", " ", text)


ScoreName = Literal["exact", "number"]
SCORES: dict[ScoreName, Callable] = {"exact": exact, "number": number}
