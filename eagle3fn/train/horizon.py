"""How many steps a run takes: as configured, as the minutes allow, or as epochs need.

A run that goes on keeps its number, unless more or fewer are asked for:

| began with | asked for now | steps in all |
|---|---|---|
| anything | nothing else | as it began |
| anything | `train.steps = N` | `N` |
| anything | other `train.epochs` | as these epochs need |
| minutes `A` | other minutes `B` | those of `A`, times `B / A` |

Fewer than have been made are refused.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.config import to_dict, with_steps
from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import write_json, write_text
from eagle3fn.base.read import read_object
from eagle3fn.base.sections import MOST_STEPS
from eagle3fn.base.threads import Kept, read_kept
from eagle3fn.base.toml import to_toml
from eagle3fn.base.types import TrainState
from eagle3fn.train.begin import Point
from eagle3fn.train.bind import bind
from eagle3fn.train.checkpoint import META, checkpoints
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.run import Run, training_batches
from eagle3fn.train.shard import gather

_TIMED_STEPS = 24
FILE = "horizon.json"


class Horizon(NamedTuple):
    """How many steps a run takes, and what chose them; as `horizon.json` has it."""

    steps: int
    chosen_by: str  # "steps", "minutes" or "epochs"; "" in files of the first version
    epochs: int | None = None  # `train.epochs`; None in files of earlier versions
    minutes: float | None = None  # those that chose; None: none did, or an earlier version
    first: int = 0  # the step from which the minutes count


def with_horizon(
    run: Run,
    first_state: Callable[[], TrainState],
    minutes: float | None,
    point: Point = Point(),  # noqa: B008
) -> tuple[Run, Horizon]:
    """The run with `train.steps` filled in, and how they were chosen. Writes nothing.

    Args:
        run: prepared, with its shift.
        first_state: makes the state whose steps are timed; called only where minutes choose, and no
            run has begun.
        minutes: to train for.
        point: where the run goes on.

    Raises:
        UserError: steps and minutes together, minutes for a run that began with another choice, or
            fewer steps than the run has made; for one that goes on from another, no more.
    """
    settings = run.config.train
    if settings.steps and minutes is not None:
        raise UserError(
            f"--minutes and train.steps = {settings.steps} both choose the number of steps; "
            "leave one out"
        )
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes}: must be above 0 and finite")

    begun = run.world.shared(begun_horizon(run.out) if run.world.main else None)
    if point.branches:
        begun = None  # what a killed call had left
    if begun is not None:
        horizon = _next_horizon(run, begun, minutes)
    elif settings.steps:
        horizon = Horizon(settings.steps, "steps", settings.epochs)
    elif minutes is not None:
        seconds = seconds_per_step(run, first_state())
        steps = run.world.shared(max(1, int(min(minutes * 60 / seconds, MOST_STEPS))))
        steps = min(point.step + steps, MOST_STEPS)
        horizon = Horizon(steps, "minutes", settings.epochs, minutes, point.step)
    else:
        horizon = _of_epochs(run)

    _check_steps(run, horizon, point)
    return _with_steps(run, horizon.steps), horizon


def chosen_by(horizon: Horizon) -> str:
    """What chose the number of steps, as a user names it."""
    if horizon.chosen_by == "steps":
        return f"train.steps = {horizon.steps}"
    if horizon.chosen_by == "epochs":
        return f"train.epochs = {horizon.epochs}"
    if horizon.chosen_by == "minutes" and horizon.minutes is not None:
        return f"--minutes {horizon.minutes:g}"
    return "an earlier call"


def times_left(every: int, step: int, total: int) -> int:
    """How often something is done after `step`: at each multiple of `every`, and at the last step.

    >>> times_left(100, 0, 250), times_left(100, 200, 250), times_left(100, 250, 250)
    (3, 1, 0)
    """
    return -(-total // every) - step // every if step < total else 0


def patience_line(run: Run, step: int, waited: int) -> str:
    """A line for a user whose `train.patience` cannot end the run any more; "" else.

    Args:
        run: with its number of steps filled in.
        step: updates made.
        waited: evaluations in a row so far that were not above the best.
    """
    settings = run.config.train
    left = times_left(settings.eval_every, step, settings.steps)
    if not 0 < left < settings.patience - waited:
        return ""
    return (
        f"train.patience = {settings.patience} cannot end this run early: to step "
        f"{settings.steps} only {left} evaluations are left (train.eval_every = "
        f"{settings.eval_every}); lower one of the two"
    )


def _of_epochs(run: Run) -> Horizon:
    """As many steps as the epochs need, of the data that the run trains on now."""
    epochs = run.config.train.epochs
    batches = epochs * len(run.train) // run.config.data.global_batch
    return Horizon(max(1, batches - run.shift), "epochs", epochs)


def _next_horizon(run: Run, begun: Horizon, minutes: float | None) -> Horizon:
    """The horizon of a run that has one: the same, unless another is asked for.

    Raises:
        UserError: minutes, where something else chose the steps.
    """
    settings = run.config.train
    if settings.steps:
        return Horizon(settings.steps, "steps", settings.epochs)
    if minutes is None:
        if begun.epochs in (None, settings.epochs):
            return begun._replace(epochs=settings.epochs)
        return _of_epochs(run)

    if begun.chosen_by not in ("minutes", ""):
        raise UserError(
            f"{run.out / FILE}: the run began with its steps chosen by {begun.chosen_by}, "
            f"{begun.steps} of them; leave --minutes out, or raise train.steps"
        )
    if begun.minutes in (None, minutes):
        return begun._replace(epochs=settings.epochs)
    steps = min((begun.steps - begun.first) * minutes / begun.minutes, MOST_STEPS)
    steps = min(begun.first + max(1, round(steps)), MOST_STEPS)
    return begun._replace(steps=steps, minutes=minutes, epochs=settings.epochs)


def _check_steps(run: Run, horizon: Horizon, point: Point) -> None:
    """Refuse fewer steps than were made."""
    asked = chosen_by(horizon)
    if horizon.chosen_by != "steps":
        asked = f"{asked}, {horizon.steps} steps"
    if horizon.steps < point.step:
        raise UserError(
            f"{asked}: {point.path} has made {point.step}; ask for as many at least, or go on from "
            "an older checkpoint with --from"
        )
    if point.branches and horizon.steps == point.step:
        raise UserError(
            f"{asked}: {point.path} has made them, so nothing is left to train; set train.steps "
            f"above {point.step}, which counts those made, or --minutes for more"
        )


def _with_steps(run: Run, steps: int) -> Run:
    config = with_steps(run.config, steps)
    return run._replace(config=config, fns=bind(config, run.frozen, run.mesh, run.recipe))


def write_horizon(run: Run, horizon: Horizon) -> None:
    """Keep the choice, the number of threads and the resolved configuration in the run's folder."""
    write_json(run.out / FILE, horizon._asdict() | {"threads": torch.get_num_threads()})
    write_text(run.out / "config.toml", to_toml(to_dict(run.config)))


def begun_threads(out: str | Path) -> Kept | None:
    """The number of threads that a run's folder was trained with, if one began there.

    Runs of earlier versions keep it with their checkpoints alone.
    """
    out = Path(out)
    kept = read_kept(out / FILE)
    newest = max(checkpoints(out / "checkpoints"), default=None)
    if kept is None and newest is not None:
        kept = read_kept(newest / META)
    return kept


def begun_horizon(out: str | Path) -> Horizon | None:
    """What a run's folder keeps; None if no run began there.

    Raises:
        UserError: it is damaged.
    """
    path = Path(out) / FILE
    if not os.path.lexists(path):
        return None
    found = read_object(path)
    kept: dict[str, Any] = {"chosen_by": ""}
    kept |= {name: found[name] for name in Horizon._fields if name in found}
    for name, (good, words) in _KINDS.items():
        value = kept.get(name, Horizon._field_defaults.get(name, ""))
        if not good(value):
            raise UserError(
                f"{path}: {name} = {printable(repr(value))}: must be {words}; delete it, or train "
                "into another folder"
            )
    return Horizon(**kept)


def _is_steps(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_STEPS


def _is_minutes(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_is_steps, "a number of steps"),
    "chosen_by": (("", "steps", "minutes", "epochs").__contains__, "steps, minutes or epochs"),
    "epochs": (lambda value: value is None or _is_steps(value), "a number of epochs"),
    "minutes": (_is_minutes, "a number of minutes"),
    "first": (lambda value: type(value) is int and 0 <= value <= MOST_STEPS, "a number of steps"),
}
"""What each value of `horizon.json` must be."""


def seconds_per_step(run: Run, state: TrainState, timed: int = _TIMED_STEPS) -> float:
    """Measured seconds of a step of average length and its share of an evaluation.

    The `timed` steps are dropped; their rate is the highest, for which no schedule is asked.
    """
    data = run.config.data

    # Time the steps; the first one, which warms up, is left out. A schedule is not asked: it is of
    # the run's number of steps, which these may choose.
    rate = run.config.optimizer.learning_rate
    tokens = 0
    begin = time.perf_counter()
    for number, micro in enumerate(training_batches(run, 0, timed + 1)):
        _, metrics = run.fns.step(state, micro, rate=rate)
        if number == 0:
            _wait(run.device)
            begin = time.perf_counter()
        else:
            tokens += int(metrics["tokens"])
    _wait(run.device)
    seconds_per_token = (time.perf_counter() - begin) / tokens

    # A step of average length: the index has the lengths, files without an index don't.
    tokens_per_step = tokens / timed
    lengths = run.features.lengths
    if lengths is not None:
        tokens_per_step = float(lengths[run.train].clip(max=data.max_length).mean())
        tokens_per_step *= data.global_batch

    # An evaluation comes every `eval_every` steps.
    begin = time.perf_counter()
    evaluate_held_out(run, gather(state.params))
    evaluation = (time.perf_counter() - begin) / run.config.train.eval_every
    return seconds_per_token * tokens_per_step + evaluation


def _wait(device: str) -> None:
    """A device is still at work when a step returns."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
