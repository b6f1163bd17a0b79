"""Progress bars of the command line.

A bar is drawn at its first update, so that bad input prints its one line alone.
"""

from collections.abc import Callable
from typing import Any

_drawn: list[Any] = []  # what `close` closes when a command ends early


def bar(unit: str) -> Callable[[int, int], None]:
    """A function `(done, total)` that draws a bar on stderr."""
    drawn: Any = None

    def update(done: int, total: int) -> None:
        nonlocal drawn
        if drawn is None:
            from tqdm import tqdm

            drawn = tqdm(unit=unit, dynamic_ncols=True, total=total)
            _drawn.append(drawn)
        drawn.update(done - drawn.n)
        if done >= total:
            drawn.close()

    return update


def bars(unit: str) -> Callable[[str, int, int], None]:
    """A function `(stage, done, total)` that draws a bar for every stage, one after another."""
    updates: dict[str, Callable[[int, int], None]] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in updates:
            updates[stage] = bar(f"{unit} ({stage})")
        updates[stage](done, total)

    return update


def close() -> None:
    """Close the bars that are still open."""
    while _drawn:
        _drawn.pop().close()
