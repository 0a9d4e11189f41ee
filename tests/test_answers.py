"""Which generated responses are right."""

import pytest

from basis_select.data.answers import number

# response, answer, whether it is right
NUMBERS = [
    # units and words around
    ("so 7 apples", "7 apples", True), ("7apples", "7", True), ("7 km/h", "7", True), ("12 m2", "12", True),
    ("7 \u00b0C", "7", True), ("7th", "7", True), ("is 7.", "7", True), ("is 7!", "7", True), ("**7**", "7", True),
    ("7...", "7", True), ("(7)", "7", True), ("'7'", "7", True), ("=7", "7", True), ("x=-7", "-7", True),
    ("none", "7", False), ("", "7", False), ("seven", "7", False), ("nan", "nan", False), ("...", "7", False),
    # currency before and after, percent
    ("$7", "7", True), ("$ 7", "7", True), ("7$", "7", True), ("7 \u20ac", "7", True), ("\u20ac7.50", "7.5", True),
    ("-$7", "-7", True), ("- $7", "-7", True), ("$-7", "-7", True), ("-$ 7", "-7", True), ("-$7", "7", False),
    ("US$7", "7", True), ("USD7", "7", True), ("7 EUR", "7", True), ("Rs.500", "500", True), ("Rs. 500", "500", True),
    ("\u20b91,00,000", "100000", True), ("7\u00a2", "7", True), ("CHF 1'200.-", "1200", True), ("\\$7", "7", True),
    ("7%", "7", True), ("7 %", "7%", True), ("7\\%", "7", True), ("7 percent", "7%", True), ("17%", "7%", False),
    # fractions
    ("3/7", "3/7", True), ("6/14", "3/7", True), ("-3/7", "-3/7", True), ("3/7", "-3/7", False), ("4/7", "3/7", False),
    ("1 1/2", "1.5", True), ("-1 1/2", "-1.5", True), ("1\u00bd", "1.5", True), ("\u00bd", "0.5", True),
    ("1\u20442", "0.5", True), ("\u2153", "1/3", True), ("0.3333333", "1/3", True), ("0.33", "1/3", False),
    ("7/0", "7", False),
    ("\\frac{3}{7}", "3/7", True), ("\\frac{1}{7}", "3/7", False), ("\\dfrac{3}{7}", "3/7", True),
    ("-\\frac{3}{7}", "-3/7", True), ("\\frac{-3}{7}", "-3/7", True), ("1\\frac{1}{2}", "1.5", True),
    ("\\frac12", "1/2", True), ("\\tfrac{1}{2}", "0.5", True), ("\\frac{1,000}{3}", "1000/3", True),
    # LaTeX
    ("\\boxed{7}", "7", True), ("\\boxed{7} by step 2", "7", True), ("\\boxed{\\frac{3}{7}} by 2", "3/7", True),
    ("$\\boxed{7}$", "7", True), ("\\boxed{1{,}234}", "1234", True), ("1\\,234", "1234", True), ("$7$", "7", True),
    ("\\boxed{2} or \\boxed{3}", "3", True), ("7^\\circ", "7", True), ("7\\text{ cm}", "7", True),
    ("\\boxed{7", "7", True), ("#### \\boxed{7}", "7", True),
    # thousands and decimals
    ("1,234", "1234", True), ("1,234,567.5", "1234567.5", True), ("1 234", "1234", True), ("1 234", "234", False),
    ("1\u00a0234", "1234", True), ("1\u202f234\u202f567", "1234567", True), ("1\u2009234", "1234", True),
    ("1'234'567", "1234567", True), ("1\u2019234", "1234", True), ("1_000", "1000", True), ("12 34", "34", True),
    ("in 2020 500 came", "500", True), ("1.234.567", "1234567", True), ("1.234,56", "1234.56", True),
    ("9.999,56", "1.234,56", False), ("3,5", "3.5", True), ("2,5", "1,5", False), ("0,25", "0.25", True),
    ("1, 2, 3", "3", True), ("1,2,3", "3", True), ("1.234", "1.234", True), ("1,234", "1.234", False),
    (".5", "0.5", True), ("-.5", "-0.5", True), ("5.", "5", True), ("5.0", "5", True), ("05", "5", True),
    ("5.50", "5.5", True), ("$.50", "0.5", True),
    # scientific notation
    ("5e3", "5000", True), ("5E+3", "5000", True), ("5e-3", "0.005", True), ("1.5e3", "1500", True),
    ("5 \u00d7 10^3", "5000", True), ("5\u00d710\u00b3", "5000", True), ("5\u00d710\u207b\u00b3", "0.005", True),
    ("5 \\times 10^{3}", "5000", True), ("5 \\cdot 10^{-3}", "0.005", True), ("5*10^3", "5000", True),
    ("5x10^3", "5000", True), ("4 \u00d7 10^3", "5 \u00d7 10^3", False), ("5 * 10", "10", True),
    ("1e999", "1e999", True), ("1e999", "1e998", False), ("1e-999", "1e-999", True),
    # signs
    ("\u22127", "-7", True), ("\u20137", "-7", True), ("so \u2013 7", "7", True), ("\uff0d7", "-7", True),
    ("\u22127", "7", False), ("+7", "7", True), ("- 7", "-7", True), ("5-7", "7", True), ("5\u20137", "7", True),
    ("5 - 7", "7", True),
    # several numbers
    ("2 + 3 = 5", "5", True), ("2 + 3 = #### 5", "5", True), ("#### 5 of 9", "9", True), ("7 or 8", "7", False),
    ("#### 5\n#### 6", "6", True), ("<<3+4=7>>7", "7", True), ("3 and 4", "4", True),
    # tolerance and size
    ("0.00001", "0.00009", False), ("1234567", "1234568", False), ("0.1000000001", "0.1", True), ("0", "1e-9", False),
    ("0", "0.0", True), ("-0", "0", True), ("9" * 5000, "9" * 5000, True), ("9" * 5000, "9" * 5001, False),
    ("\uff17", "7", True), ("\u0667", "7", True),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer", "right"), NUMBERS)
def test_the_number_that_a_response_ends_in(response, answer, right):
    assert number(response, answer) is right


@pytest.mark.parametrize(
    "piece", ["1", "1,", "1 ", "1/", "1 1/", "1.", "-", "1e", "\\frac{", "\\boxed{", "1'234", "$ "]
)
def test_long_responses_are_scored_at_once(piece):
    number(piece * (20_000 // len(piece)), "7")
