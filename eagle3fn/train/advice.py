"""Advice on a run whose numbers look wrong: what is seen, its likely cause, and the remedy.

`advise` is a function of rows of `metrics.jsonl` and `eval.jsonl` alone. To add advice is to add a
row to `SYMPTOMS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

WINDOW = 50  # updates whose losses are averaged
_LONG = 500  # updates after which a draft has learned something
_COUNTED = 0.8
_FALL = 0.9  # of the gain over 1 that a best accepted length had
_FALLEN = 3  # evaluations in a row


class History(NamedTuple):
    """What is kept of a run's rows: it does not grow with the number of updates."""

    first: Sequence[Row] = ()  # the first `WINDOW` of `metrics.jsonl`
    latest: Sequence[Row] = ()  # the last `WINDOW`
    held_out: Sequence[Row] = ()  # all of `eval.jsonl`
    warm: bool = False  # the run began from a trained draft


def with_step(history: History, row: Row) -> History:
    """The history after one more row of `metrics.jsonl`."""
    first = history.first
    if len(first) < WINDOW:
        first = (*first, row)
    return history._replace(first=first, latest=(*history.latest[1 - WINDOW :], row))


def with_held_out(history: History, row: Row) -> History:
    """The history after one more row of `eval.jsonl`."""
    return history._replace(held_out=(*history.held_out, row))


def history_of(steps: Sequence[Row], held_out: Sequence[Row], warm: bool = False) -> History:
    """The history of whole files."""
    return History(tuple(steps[:WINDOW]), tuple(steps[-WINDOW:]), tuple(held_out), warm)


def advise(history: History) -> dict[str, str]:
    """Lines by the name of their symptom; none where nothing looks wrong."""
    lines = {}
    for name, symptom in SYMPTOMS.items():
        seen = symptom.seen(history)
        if seen is not None:
            lines[name] = "advice: " + symptom.sentence.format(**seen)
    return lines


class Symptom(NamedTuple):
    """Numbers that look wrong."""

    seen: Callable[[History], dict[str, Any] | None]  # the sentence's values, or None
    sentence: str


# What is seen


def _few_counted(history: History) -> dict[str, Any] | None:
    """Where rows are held out, of those; else of the last updates."""
    rows = [row for row in history.held_out[-1:] if {"counted", "rows"} <= row.keys()]
    rows = rows or [row for row in history.latest if {"counted", "rows"} <= row.keys()]
    trained = sum(row["rows"] for row in rows)
    if not trained:
        return None
    share = sum(row["counted"] * row["rows"] for row in rows) / trained
    return {"share": share} if share < _COUNTED else None


def _no_gradient(history: History) -> dict[str, Any] | None:
    """Of the last updates, those that count a row: none of them moves a parameter by its loss."""
    norms = [row.get("grad_norm") for row in history.latest if row.get("counted")]
    if not norms or any(norm != 0 for norm in norms):
        return None
    return {"count": len(norms)}


def _untrained_length(history: History) -> dict[str, Any] | None:
    seen = _against_start(history)
    if history.warm or seen is None or seen["step"] < _LONG:
        return None
    return seen if seen["best"] <= seen["before"] else None


def _worse_than_start(history: History) -> dict[str, Any] | None:
    seen = _against_start(history)
    if not history.warm or seen is None:
        return None
    return seen if seen["best"] < seen["before"] else None


def _against_start(history: History) -> dict[str, Any] | None:
    """The held-out accepted length at step 0, the best one after it, and the last one's step."""
    lengths = _lengths(history)
    if len(lengths) < 2 or lengths[0][0] != 0:
        return None
    (_, before), *after = lengths
    best = max(length for _, length in after)
    return {"best": best, "before": before, "step": lengths[-1][0]}


def _level_loss(history: History) -> dict[str, Any] | None:
    if _updates(history) < _LONG or history.latest[0]["step"] <= history.first[-1]["step"]:
        return None
    first = _mean_loss(history.first)
    latest = _mean_loss(history.latest)
    if first is None or latest is None or latest < first:
        return None
    return {"first": first, "latest": latest, "count": _updates(history), "window": WINDOW}


def _falling_length(history: History) -> dict[str, Any] | None:
    lengths = [length for step, length in _lengths(history) if step > 0]
    if len(lengths) <= _FALLEN:
        return None
    best = max(lengths)
    fallen = all(length - 1 < _FALL * (best - 1) for length in lengths[-_FALLEN:])
    return {"best": best, "now": lengths[-1], "count": _FALLEN} if fallen else None


def _rare_chains(history: History) -> dict[str, Any] | None:
    row = history.held_out[-1] if history.held_out else {}
    accuracy = row.get("accuracy", ())
    conditional = row.get("conditional_accuracy", ())
    if row.get("step", 0) < _LONG or len(accuracy) < 2 or len(conditional) < 2:
        return None
    if conditional[1] < 0.5 or accuracy[1] >= 0.05:
        return None
    return {"conditional": conditional[1], "accuracy": accuracy[1], "first": accuracy[0]}


SYMPTOMS = {
    "few rows counted": Symptom(
        _few_counted,
        "{share:.0%} of the trained rows count (counted): of the others the target's most likely "
        "token is not in the draft vocabulary, and a draft cannot propose it; make the map anew by "
        "eagle3fn vocab with a greater --size, from features of answers that this target wrote",
    ),
    "no gradient": Symptom(
        _no_gradient,
        "the gradient norm of the last {count} updates that count rows is exactly 0, so that the "
        "draft learns nothing: the loss is constant in its logits; mend the function that "
        "objective.loss names, or name another loss",
    ),
    "length of an untrained draft": Symptom(
        _untrained_length,
        "after {step} updates the held-out accepted length is at most {best:.3f}, and it was "
        "{before:.3f} before the first: the draft has learned nothing that a server would accept; "
        "see by eagle3fn inspect that the target's answers are trained on, and try another "
        "optimizer.learning_rate",
    ),
    "worse than its start": Symptom(
        _worse_than_start,
        "after {step} updates the held-out accepted length is at most {best:.3f}, and it was "
        "{before:.3f} before the first, of the draft that train.init names: that one is the better "
        "draft so far; if no later evaluation is above it, keep it, or begin anew with a lower "
        "optimizer.learning_rate",
    ),
    "level loss": Symptom(
        _level_loss,
        "after {count} updates the loss does not fall: its mean was {first:.3f} over the first "
        "{window} and is {latest:.3f} over the last {window}; lower optimizer.learning_rate if it "
        "rises, raise it if it stays, and see by eagle3fn inspect what is trained on",
    ),
    "falling length": Symptom(
        _falling_length,
        "the held-out accepted length has fallen from {best:.3f} to {now:.3f} and was below for "
        "{count} evaluations: the draft learns its samples by heart; the best one is kept; train "
        "on more conversations, or end such runs by train.patience",
    ),
    "rare chains": Symptom(
        _rare_chains,
        "the second drafted token is right in {conditional:.0%} of the held-out rows whose first "
        "is right, and in {accuracy:.1%} of all, as the first is right in {first:.1%}: the high "
        "number is of few rows, often of repeated text; judge by the accepted length, and train on "
        "more varied answers of the target",
    ),
}
"""By name: when it is seen, and what is said."""


# Rows to numbers


def _updates(history: History) -> int:
    """How many were made, of a run that goes on from another one of its own."""
    return history.latest[-1]["step"] - history.first[0]["step"] + 1 if history.latest else 0


def _lengths(history: History) -> list[tuple[int, float]]:
    """Steps and held-out accepted lengths, where they were measured."""
    rows = [row for row in history.held_out if row.get("accepted_length") is not None]
    return [(row["step"], row["accepted_length"]) for row in rows]


def _mean_loss(rows: Sequence[Row]) -> float | None:
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    return sum(losses) / len(losses) if losses else None
