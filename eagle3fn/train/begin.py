"""Where a run begins: at its start, at its newest checkpoint, or at one of another run's."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.config import from_dict
from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.base.types import TrainState
from eagle3fn.train.bad_updates import check_first
from eagle3fn.train.branch import check_branch, source_checkpoint, unless_gone
from eagle3fn.train.changes import (
    FEATURES,
    Change,
    refuse_elsewhere,
    refuse_held_out,
    refuse_in_place,
    trained_with,
    written_settings,
)
from eagle3fn.train.checkpoint import load_checkpoint, newest_checkpoint
from eagle3fn.train.checkpoint_meta import older, read_meta
from eagle3fn.train.events import End
from eagle3fn.train.run import Run
from eagle3fn.train.schedules import made_schedule, named_schedule
from eagle3fn.train.shard import empty_state


class LoopState(NamedTuple):
    """What a resumed run needs besides the `TrainState`."""

    best: float = 0.0  # the greatest held-out accepted length so far; 0: none was measured
    skipped: int = 0  # updates dropped so far
    in_a_row: int = 0  # of these, the last ones without a made one between them
    waited: int = 0  # the last evaluations that were not above `best`
    uncounted: int = 0  # the last updates whose loss counted none of their rows
    owes_evaluation: bool = False  # that of this step: its features did not come


_TYPES = {
    "best": (float, int),
    "skipped": (int,),
    "in_a_row": (int,),
    "waited": (int,),
    "uncounted": (int,),
    "owes_evaluation": (bool,),
}
"""Of the fields of `LoopState`, in a checkpoint's JSON."""


class Point(NamedTuple):
    """Where a run goes on, known before its state is read."""

    path: Path | None = None  # of a checkpoint; None: the run begins
    step: int = 0  # updates made
    shift: int = 0  # `Run.shift`
    branches: bool = False  # it is another run's checkpoint, and this run has none yet
    earlier: Mapping[str, int] = {}  # `Run.earlier`


class Beginning(NamedTuple):
    """What a run begins with."""

    state: TrainState
    loop_state: LoopState
    changes: list[Change]  # since the checkpoint


def find_point(run: Run, source: str | Path | None, notice: Callable[[str], None]) -> Point:
    """Where the run goes on; rank 0 alone calls. A newest checkpoint that is not complete is said.

    Args:
        run: its folder, data and configuration are read.
        source: another run, or a checkpoint of it, that this one goes on from.
        notice: called with what is found, as a line.

    Raises:
        UserError: there is no such checkpoint, or the folder holds a run that did not go on from
            there; see `newest_checkpoint`. Samples that were trained on would be held out.
    """
    newest, incomplete = newest_checkpoint(run.out / "checkpoints")
    if incomplete:
        names = ", ".join(path.name for path in incomplete)
        notice(f"{names}: not complete, so the run goes on from {newest}")
    check_branch(run.out, source, newest is not None)

    # Its own checkpoint: as many samples of its data's order have been trained on.
    batch = run.config.data.global_batch
    if newest is not None:
        meta = read_meta(newest)
        step = meta["cursor"]["step"]
        shift = meta["cursor"]["samples"] // batch - step
        return Point(newest, step, shift, earlier=meta.get("earlier", {}))
    if source is None:
        return Point()

    # Another run's: with the same features on from the next whole batch, else from the first.
    path = source_checkpoint(source)
    with unless_gone(path):
        meta = read_meta(path)
    earlier = trained_with(meta)
    refuse_held_out(path, earlier, run.config, run.data)
    step = meta["cursor"]["step"]
    same = meta["data"].get(FEATURES) == run.data[FEATURES]
    samples = meta["cursor"]["samples"] if same else 0
    return Point(path, step, -(-samples // batch) - step, branches=True, earlier=earlier)


def begin(run: Run, point: Point) -> Beginning:
    """The first state, or that of the checkpoint; all ranks call.

    Raises:
        UserError: the first state is not finite; the checkpoint is damaged, or something has
            changed since that may not (`train.changes`).
    """
    if point.path is None:
        state = run.fns.init_state(run.fns.init(run.config.train.seed))
        check_first(run, state)
        return Beginning(state, LoopState(), [])

    refuse = refuse_elsewhere if point.branches else refuse_in_place
    empty = empty_state(run.config, run.device, run.mesh, run.recipe)
    found = load_checkpoint(point.path, empty, run.config, run.data, run.world, refuse)
    torch.set_rng_state(found.rng)
    loop_state = loop_state_of(found.extra, point.path)
    if point.branches:
        # Its best draft is the best of its own: it is evaluated before its first step.
        loop_state = loop_state._replace(best=0.0, waited=0, uncounted=0)
    return Beginning(found.state, loop_state, found.changes)


def loop_state_of(extra: dict[str, Any], path: Path) -> LoopState:
    """What a checkpoint has of the loop, checked.

    Raises:
        UserError: it is damaged.
    """
    for name, value in extra.items():
        if type(value) not in _TYPES.get(name, ()) or not 0 <= value < 2**53:
            raise UserError(
                f"{path}: damaged (meta.json: extra.{printable(name)} is "
                f"{printable(repr(value))}); {older(path)}"
            )
    return LoopState(**extra)


# What is said


def described(run: Run, point: Point, changes: list[Change], end: End) -> list[str]:
    """Lines for a user on where a run goes on, what has changed, and its learning rate then.

    `run` has its number of steps filled in; `end` is how it stands: one that has ended before its
    last step says so then, and makes no update at another rate.
    """
    if point.path is None:
        return []
    total = run.config.train.steps
    if point.branches:
        first = f"goes on from step {point.step} of {point.path}, to step {total}"
    elif point.step < total or end.owes:
        first = f"resumed from step {point.step} of {total}, {point.path}"
    else:
        first = finished_line(run.out, point.step, total)

    said = [change.line() for change in changes]
    if end.owes:
        said.append(f"step {point.step} is evaluated first, as its held-out features did not come")
    if end.early:
        return said
    rate = _rate_line(run, point, changes) if point.step < total else ""
    return [first, *said, rate] if rate else [first, *said]


def finished_line(out: str | Path, step: int, total: int) -> str:
    """That a run has made all its steps, and how to go on."""
    return (
        f"{out}: finished, step {step} of {total} is its last one; to go on, raise train.steps, "
        "train.epochs or --minutes"
    )


def _rate_line(run: Run, point: Point, changes: list[Change]) -> str:
    """The learning rates before and after a change of what the schedule is made from; "" else."""
    names = {change.name for change in changes}
    if "train.steps" not in names and not any(name.startswith("optimizer.") for name in names):
        return ""
    assert point.path is not None
    total = run.config.train.steps
    make = run.recipe.schedule or named_schedule
    after = made_schedule(make, run.config.optimizer, total)(point.step)
    line = f"from step {point.step + 1} on {after:.3g}, the rate of a run of {total} steps"
    if "recipe" in names:
        return f"learning rate: {line}"

    settings = written_settings(read_meta(point.path))
    optimizer = {}
    for name, value in settings.items():
        if name.startswith("optimizer."):
            optimizer[name.removeprefix("optimizer.")] = value
    # A user's own schedule that is replaced may be gone by now: it is no reason to stop.
    try:
        old = from_dict(OptimizerConfig, optimizer, str(point.path), "optimizer.")
        before = made_schedule(make, old, settings["train.steps"])(point.step - 1)
    except UserError:
        return f"learning rate: {line}"
    return f"learning rate: {before:.3g} at step {point.step}, {line}"
