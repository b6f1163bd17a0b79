"""Progress of the command line: a bar in a terminal, else a line now and then.

A bar is drawn after a second, so that bad input prints its one line alone. It is one line, and
is erased when all is done.
"""

import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

_drawn: list[Any] = []  # what `close` closes when a command ends early
_LINE_SECONDS = 30.0  # between two lines where stderr is no terminal


class Update(Protocol):
    """What is called with a count: `(done, total)`, and a note on the state."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Show that so many of all are done."""


def counter(unit: str) -> Callable[[int], None]:
    """A function `(done)` that counts on stderr, where it isn't known how many there are."""
    update = bar(unit)
    return lambda done: update(done, None)


def bar(unit: str, name: str | None = None, log: bool = False, rate: bool = False) -> Update:
    """A function `(done, total, note="")` that draws a bar on stderr, which begins with `name`.

    `total` is None where it isn't known; `note` is said after the count. Where stderr is no
    terminal, a line is printed every half minute: on stderr, or with `log`, for a command whose
    output is read as a log, on stdout. With `rate` both have the units a second since the first
    count; what was done at the first count took no time.
    """
    if sys.stderr.isatty():
        return _drawn_bar(unit, name, rate)
    return _lines(unit, name, log, rate)


_COUNT = "{desc}{n_fmt} {unit} [{elapsed}{postfix}]"  # where it isn't known how many there are
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
_BAR_WITH_RATE = _BAR.replace("{postfix}", ", {rate_fmt}{postfix}")


def _drawn_bar(unit: str, name: str | None, rate: bool) -> Update:
    drawn: Any = None

    def update(done: int, total: int | None, note: str = "") -> None:
        nonlocal drawn
        if drawn is None:
            from tqdm import tqdm

            drawn = tqdm(
                desc=name,
                unit=f"{unit}s",
                bar_format=_COUNT if total is None else _BAR_WITH_RATE if rate else _BAR,
                smoothing=0.0,  # the rate since the first count
                dynamic_ncols=True,
                total=total,
                initial=done,
                leave=False,
                delay=1.0,  # so that a short stage, and bad input, draw nothing
            )
            _drawn.append(drawn)
        if note:
            drawn.set_postfix_str(note, refresh=False)
        drawn.update(done - drawn.n)
        if total is not None and done >= total:
            drawn.close()

    return update


def _lines(unit: str, name: str | None, log: bool, rate: bool) -> Update:
    printed = monotonic()
    begun = first = None  # when the first count came, and which it was

    def update(done: int, total: int | None, note: str = "") -> None:
        nonlocal printed, begun, first
        now = monotonic()
        if begun is None or first is None:
            begun, first = now, done
        if now - printed < _LINE_SECONDS or done == total:
            return
        printed = now

        line = f"{name}: {unit} {done}" if name else f"{unit} {done}"
        if total is not None:
            line += f" of {total}"
        if note:
            line += f": {note}"
        if rate and done > first:
            line += f", {(done - first) / (now - begun):,.0f} {unit}s/s"
        if total is not None and first < done < total:
            line += f", {duration((total - done) * (now - begun) / (done - first))} left"
        print(line, file=sys.stdout if log else sys.stderr, flush=True)

    return update


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(0.4), duration(75), duration(3 * 3600 + 120), duration(200_000)
    ('0.4 s', '1 min 15 s', '3 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def bars(unit: str) -> Callable[[str, int, int], None]:
    """A function `(stage, done, total)` that draws a bar for every stage, one after another."""
    updates: dict[str, Update] = {}

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
