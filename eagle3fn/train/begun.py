"""What a run's folder says of it before its data are there.

Where features come from sources that take minutes to start, a call that cannot go on, or has
nothing to do, ends before them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.config import Config, with_steps
from eagle3fn.train.begin import finished_line, loop_state_of
from eagle3fn.train.branch import check_branch
from eagle3fn.train.changes import (
    RECIPE,
    THREADS,
    changes_since,
    made_otherwise,
    made_with,
    refuse_features,
    refuse_in_place,
)
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.checkpoint_meta import read_meta
from eagle3fn.train.events import End
from eagle3fn.train.horizon import Horizon, begun_horizon
from eagle3fn.train.ready import end_lines, end_of


class Ended(NamedTuple):
    """A run that has nothing left to do."""

    end: End
    horizon: Horizon
    lines: list[str]  # for a user


def check_made_with(out: str | Path, settings: Mapping[str, str]) -> None:
    """Refuse features that are made otherwise than those which the run in `out` is trained on.

    Args:
        out: the run's folder; without a checkpoint nothing is refused.
        settings: what they are made with, by option, as far as it is known
            (`FeatureSet.made_with`).

    Raises:
        UserError: names the first setting that differs, and both values; a damaged checkpoint.
    """
    newest = _newest(out)
    if newest is not None:
        refuse_features(newest, made_otherwise(read_meta(newest)["data"], made_with(settings)))


def ended(
    config: Config, out: str | Path, recipe: str, source: str | None, minutes: float | None
) -> Ended | None:
    """How the run in `out` has ended, as a call under these settings would find it.

    None: it has not, it has never begun, or its data are needed to say so.

    Args:
        config: of a run that goes on, without its number of steps where nobody names it.
        out: the run's folder.
        recipe: its name.
        source: what `--from` names, if anything.
        minutes: to train for, if named.

    Raises:
        UserError: as `changes.refuse_in_place` and `branch.check_branch`; a damaged checkpoint.
    """
    newest = _newest(out)
    begun = begun_horizon(out)
    if newest is None or begun is None:
        return None
    check_branch(Path(out), source, has_checkpoint=True)

    # What is not known yet is taken to be as it was.
    meta = read_meta(newest)
    data: dict[str, Any] = {name: value for name, value in meta["data"].items() if name != RECIPE}
    if recipe:
        data[RECIPE] = recipe
    changes = changes_since(meta, config, data)
    changes = [change for change in changes if change.name != THREADS]
    refuse_in_place(newest, changes)

    # Other minutes or epochs choose another number of steps.
    settings = config.train
    horizon = begun
    if settings.steps:
        horizon = Horizon(settings.steps, "steps", settings.epochs)
    elif minutes not in (None, begun.minutes) or begun.epochs not in (None, settings.epochs):
        return None
    if settings.steps and minutes is not None:
        return None

    step = meta["cursor"]["step"]
    loop_state = loop_state_of(meta["extra"], newest)
    config = with_steps(config, horizon.steps)
    end = end_of(config, step, loop_state)
    if not end.finished or step > end.total:
        return None
    said = [change.line() for change in changes if change.name != "train.steps"]
    first = [] if end.early else [finished_line(out, step, end.total)]
    return Ended(end, horizon, [*first, *said, *end_lines(config, end, loop_state)])


def _newest(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run's folder, which is left as it is."""
    return max(checkpoints(Path(out) / "checkpoints"), default=None)
