"""How a generated response is compared with the answer."""

import re
import unicodedata
from fractions import Fraction


def exact(generated, answer):
    """The response is the answer, up to surrounding white space."""
    return generated.strip() == answer.strip()


def number(generated, answer):
    """The number that `generated` ends in, after the last '####' if it has one, is that of `answer`.

    Whole numbers must be equal, others to one part in a million. Units, currencies and percent signs do not count.
    """
    found, right = _last_number(generated), _last_number(answer)
    if found is None or right is None:
        return False
    whole = found.denominator == right.denominator == 1
    return found == right if whole else abs(found - right) <= max(abs(found), abs(right)) / 1_000_000


_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # fractions that are one character
_SPACE_IN_NUMBERS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3})")
_NUMBER = re.compile(
    r"""(?:(?<![\w.)\]])(?P<sign>[-+])\s?)?   # after a number or a bracket it is an operator
        (?<![A-Za-z_\d.])                     # the 2 of m2 is none
        (?:(?P<units>\d+)\s+(?=\d+/\d))?     # 1 1/2
        (?P<digits>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)
        (?:[eE](?P<power>[-+]?\d{1,3})(?!\d)|\s?/\s?(?P<below>[1-9]\d*)(?![\d/.]))?""",
    re.VERBOSE,
)


def _last_number(text):
    """The last number of a text, after '####' if that is in it, as a Fraction; None if there is none."""
    text = text.rpartition("####")[2].replace("\u2212", "-").replace("\u2044", "/")
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), text)
    text = "".join(c for c in _SPACE_IN_NUMBERS.sub("", text) if unicodedata.category(c) != "Sc")
    for m in reversed(list(_NUMBER.finditer(text))):
        value = Fraction(m["digits"].replace(",", "")) * Fraction(10) ** int(m["power"] or 0) / int(m["below"] or 1)
        value += int(m["units"] or 0)
        return -value if m["sign"] == "-" else value
    return None


SCORES = {"exact": exact, "number": number}
