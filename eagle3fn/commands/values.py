"""Types for argparse: what the values of options may be."""

import argparse
from collections.abc import Callable
from typing import Any

from eagle3fn.use.trackers import TRACKERS


def trackers(text: str) -> list[str]:
    """A type for argparse: names of trackers with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in TRACKERS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(TRACKERS)}")
    return names


def layers(text: str) -> tuple[int, ...]:
    """A type for argparse: numbers of layers with commas between them."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers of layers, such as 1,14,26")
    return tuple(map(int, numbers))


def number_in(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: a number in a range."""

    def parsed(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {what}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high:g}")
        return value

    return parsed


positive = number_in(int, 1, 2**40)
count = number_in(int, 0, 2**40)
above_zero = number_in(float, 0.01, 1e6)
share = number_in(float, 0, 1)
at_least_zero = number_in(float, 0, 100)
