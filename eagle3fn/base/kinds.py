"""Kinds of values that files of a run hold."""

from collections.abc import Callable
from typing import Any

_LARGEST = 1e15  # what a run counts or measures is less
_LONGEST = 1000  # draft positions

Check = Callable[[Any], bool]
"""Whether a value is of a kind."""


def is_number(value: Any) -> bool:
    """A number, neither NaN nor beyond what a run counts or measures."""
    return type(value) in (int, float) and abs(value) <= _LARGEST


def is_count(value: Any) -> bool:
    """A whole number from 0 on."""
    return type(value) is int and 0 <= value <= _LARGEST


def is_amount(value: Any) -> bool:
    """A number from 0 on."""
    return is_number(value) and value >= 0


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """True or False."""
    return isinstance(value, bool)


def is_rates(value: Any) -> bool:
    """Numbers from 0 on, one for each of a thousand draft positions at most."""
    return isinstance(value, list) and len(value) <= _LONGEST and all(map(is_amount, value))


def or_none(check: Check) -> Check:
    """None, or what the check takes."""
    return lambda value: value is None or check(value)
