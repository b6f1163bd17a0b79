"""Progress bars of the command line.

A bar is drawn after a second, so that bad input prints its one line alone. It is one line, and
is erased when all is done.
"""

import sys
from collections.abc import Callable
from typing import Any

_drawn: list[Any] = []  # what `close` closes when a command ends early
_FILE_SECONDS = 30.0  # between two states where stderr is a file, which keeps them all


def counter(unit: str) -> Callable[[int], None]:
    """A function `(done)` that counts on stderr, where it isn't known how many there are."""
    update = bar(unit)
    return lambda done: update(done, None)


def bar(unit: str, name: str | None = None) -> Callable[[int, int | None], None]:
    """A function `(done, total)` that draws a bar on stderr, which begins with `name`."""
    drawn: Any = None

    def update(done: int, total: int | None) -> None:
        nonlocal drawn
        if drawn is None:
            from tqdm import tqdm

            seconds = 0.1 if sys.stderr.isatty() else _FILE_SECONDS
            drawn = tqdm(
                desc=name,
                unit=unit,
                dynamic_ncols=True,
                total=total,
                leave=False,
                mininterval=seconds,
                delay=1.0,  # so that a short stage, and bad input, draw nothing
            )
            _drawn.append(drawn)
        drawn.update(done - drawn.n)
        if total is not None and done >= total:
            drawn.close()

    return update


def bars(unit: str) -> Callable[[str, int, int], None]:
    """A function `(stage, done, total)` that draws a bar for every stage, one after another."""
    updates: dict[str, Callable[[int, int], None]] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in updates:
            updates[stage] = bar(unit, stage)
        updates[stage](done, total)

    return update


def say(line: str) -> None:
    """Print a line on stdout, above the bar."""
    for drawn in _drawn:
        drawn.clear()
    print(line, flush=True)


def close() -> None:
    """Close the bars that are still open."""
    while _drawn:
        _drawn.pop().close()
