"""Advice while a training runs: its events, and each line of advice once."""

from pathlib import Path
from typing import Any

from eagle3fn.base.read import read_rows
from eagle3fn.train.advice import (
    WINDOW,
    History,
    advise,
    history_of,
    with_held_out,
    with_step,
)
from eagle3fn.train.branch import Rows, own_rows, read_branch
from eagle3fn.train.events import Events
from eagle3fn.train.track import HELD_OUT, STEPS, RowKind


def with_advice(events: Events, out: str | Path, warm: bool = False) -> Events:
    """The events, which also say each line of `train.advice.advise` once.

    A run that goes on has the rows of its earlier calls in `out`, and says nothing again that these
    have shown already. Of one that goes on from another run its own rows alone are looked at.
    `warm`: the run began from a trained draft.
    """
    history: History | None = None
    said: set[str] = set()

    def before(step: int) -> History:
        """The rows so far; of a call's first event those that `out` has of earlier steps."""
        nonlocal history
        if history is None:
            steps = _rows(Path(out) / "metrics.jsonl", STEPS, step)
            held_out = _rows(Path(out) / "eval.jsonl", HELD_OUT, step)
            own = own_rows(Rows(steps, held_out), read_branch(out))
            history = history_of(own.steps, own.held_out, warm)
            said.update(advise(history))
        return history

    def say_new(history: History) -> None:
        for name, line in advise(history).items():
            if name not in said:
                said.add(name)
                events.on_notice(line)

    def on_step(row: dict[str, Any], total: int) -> None:
        nonlocal history
        history = with_step(before(row["step"]), row)
        events.on_step(row, total)
        if row["step"] % WINDOW == 0:
            say_new(history)

    def on_eval(row: dict[str, Any]) -> None:
        nonlocal history
        history = with_held_out(before(row["step"]), row)
        events.on_eval(row)
        say_new(history)

    return events._replace(on_step=on_step, on_eval=on_eval)


def _rows(path: Path, kind: RowKind, step: int) -> list[dict[str, Any]]:
    """The rows of earlier steps."""
    if not path.exists():
        return []
    return [row for row in read_rows(path, kind.fault).good if row["step"] < step]
