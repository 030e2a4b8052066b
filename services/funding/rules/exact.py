"""Exact numbers: decimal text to ``Fraction`` and back, shares of money rounded down, amounts for people to read."""

import re
from fractions import Fraction
from math import ceil, floor

_DECIMAL = re.compile(r"\d{1,30}(\.\d{1,30})?", re.ASCII)


class InvalidFact(ValueError):
    """A fact given to a rule is missing, of the wrong kind or outside its range."""

    REASON = "INVALID_FACT"


def decimal(text: str) -> Fraction:
    """The exact value of plain decimal text such as ``"0.70"``; no sign, no exponent, never a float.

    Raises:
        InvalidFact: the text is not of that form.
    """
    if not isinstance(text, str) or not _DECIMAL.fullmatch(text):
        raise InvalidFact(f"not a plain decimal number: {text!r}")
    return Fraction(text)


def share(amount: int, rate: Fraction) -> int:
    """``rate`` of an amount in minor units, rounded down, so that a cap is never passed by rounding (R-ROUND)."""
    return amount * rate.numerator // rate.denominator


def fixed_down(value: Fraction, places: int = 2) -> str:
    """Decimal text with exactly ``places`` digits, rounded down: ``249.999`` shows as ``249.99``."""
    return _fixed(floor(value * 10**places), places)


def fixed_up(value: Fraction, places: int = 2) -> str:
    """Decimal text with exactly ``places`` digits, rounded up: the smallest excess shows."""
    return _fixed(ceil(value * 10**places), places)


def _fixed(scaled: int, places: int) -> str:
    whole, rest = divmod(scaled, 10**places)
    return f"{whole}.{rest:0{places}d}" if places else str(whole)


def rate_text(rate: Fraction) -> str:
    """A rate as decimal text with two digits, or more if it needs them: ``0.60``, ``0.455``."""
    for places in range(2, 12):
        if (rate * 10**places).denominator == 1:
            return _fixed(int(rate * 10**places), places)
    return fixed_down(rate, 12)


def percent(rate: Fraction) -> str:
    """A rate for people: ``60 %``, ``45.5 %``."""
    text = rate_text(rate * 100).rstrip("0").rstrip(".")
    return f"{text} %"


def gbp(amount_p: int) -> str:
    """Pence for people: ``GBP 52,592.59``."""
    return _money("GBP", amount_p)


def eur(amount_c: int | Fraction) -> str:
    """Euro cents for people, parts of a cent rounded down: ``EUR 50,000,000.00``."""
    return _money("EUR", floor(amount_c))


def _money(currency: str, minor: int) -> str:
    sign = "-" if minor < 0 else ""
    whole, rest = divmod(abs(minor), 100)
    return f"{currency} {sign}{whole:,}.{rest:02d}"
