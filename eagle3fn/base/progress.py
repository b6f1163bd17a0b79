"""Progress bars of the command line: made at the first update, so that bad input prints its one line alone."""

from collections.abc import Callable
from typing import Any

_open: list[Any] = []


def bar(unit: str) -> Callable[[int, int], None]:
    """A function `(done, total)` that draws a bar on stderr."""
    made: list[Any] = []

    def update(done: int, total: int) -> None:
        if not made:
            from tqdm import tqdm

            made.append(tqdm(unit=unit, dynamic_ncols=True, total=total))
            _open.append(made[0])
        made[0].update(done - made[0].n)
        if done >= total:
            made[0].close()

    return update


def bars(unit: str) -> Callable[[str, int, int], None]:
    """A function `(stage, done, total)` that draws a bar for every stage, one after another."""
    made: dict[str, Callable[[int, int], None]] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in made:
            made[stage] = bar(f"{unit} ({stage})")
        made[stage](done, total)

    return update


def close() -> None:
    """Close the bars that are still open."""
    while _open:
        _open.pop().close()
