"""What a run does before it writes anything; all that `--dry-run` does of it too.

Where it goes on, how many steps it makes, its state, and the places of what it will write.
"""

import os
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.places import check_own_file
from eagle3fn.base.types import TrainState
from eagle3fn.train.bad_updates import dropped_line
from eagle3fn.train.begin import LoopState, Point, begin, described, find_point
from eagle3fn.train.branch import unless_gone
from eagle3fn.train.events import End, Events
from eagle3fn.train.horizon import FILE, Horizon, with_horizon
from eagle3fn.train.run import Run
from eagle3fn.train.track import HELD_OUT, STEPS

ROWS = {"metrics.jsonl": STEPS, "eval.jsonl": HELD_OUT}
"""The files of a run's rows, and what they hold."""


class Ready(NamedTuple):
    """A run of which nothing has been written yet."""

    run: Run  # with its number of steps filled in
    point: Point
    horizon: Horizon
    state: TrainState
    loop_state: LoopState
    end: End  # how the run stands
    lines: list[str]  # for a user: where it goes on, and what has changed; rank 0 alone has them


def ready(run: Run, source: str | Path | None, minutes: float | None, events: Events) -> Ready:
    """Find where a run goes on, read or make its state, and refuse what could not be written.

    All ranks call; the caller holds the run's folder, of which only what killed calls left is
    cleared away.

    Args:
        run: prepared.
        source: another run, or a checkpoint of it, that this one goes on from.
        minutes: to train for.
        events: `on_notice` and `on_ready` are called, by rank 0.

    Raises:
        UserError: as `find_point`, `with_horizon` and `begin`, and what `on_ready` raises; a place
            of one of the run's files is none, or holds somebody else's.
    """
    main = run.world.main

    # Where to go on.
    found = find_point(run, source, events.on_notice) if main else None
    point = run.world.shared(found)
    run = run._replace(shift=point.shift, earlier=point.earlier)
    if main:
        _check_files(run.out, begins=point.path is None or point.branches)

    # How many steps to make, and the state: read, or made. Another run's checkpoint may be removed
    # by it meanwhile.
    with unless_gone(point.path if point.branches else None):
        run, horizon = with_horizon(run, lambda: begin(run, point).state, minutes, point)
        state, loop_state, changes = begin(run, point)
        end = end_of(run.config, point.step, loop_state)
        lines = described(run, point, changes, end) if main else []

    if main:
        events.on_ready(end, loop_state.best)
    return Ready(run, point, horizon, state, loop_state, end, lines)


def end_of(config: Config, step: int, loop_state: LoopState) -> End:
    """How a run stands after so many updates, the same on all ranks."""
    settings = config.train
    early = step < settings.steps and 0 < settings.patience <= loop_state.waited
    compared = config.data.held_out > 0
    return End(step, settings.steps, early, compared, loop_state.owes_evaluation)


def end_lines(config: Config, end: End, loop_state: LoopState) -> list[str]:
    """Lines for a user on how a run stands at a call's end."""
    lines = []
    if loop_state.skipped:
        lines.append(dropped_line(loop_state.skipped))
    if end.early:
        lines.append(
            f"step {end.step} of {end.total}: the run has ended, as its held-out accepted length "
            f"has not risen above {loop_state.best:.3f} for {loop_state.waited} evaluations "
            f"(train.patience = {config.train.patience}); a greater train.patience goes on"
        )
    return lines


def _check_files(out: Path, begins: bool) -> None:
    """Refuse what is in the place of a file that the run writes; `begins`: it has no checkpoint."""
    for name in ("config.toml", FILE, "from.json", *ROWS):
        check_own_file(out / name)

    # A run writes it last: without the file before, it is a user's.
    path = out / "config.toml"
    if begins and path.exists() and not os.path.lexists(out / FILE):
        raise UserError(
            f"{path}: is there and no run's, and the run's own would replace it; name a new --out, "
            "or move it"
        )
