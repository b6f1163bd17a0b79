"""How many steps a run takes: as configured, as it began with, as the minutes allow, or as epochs
need.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from eagle3fn.base.config import MOST_STEPS, to_dict, with_steps
from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import write_json, write_text
from eagle3fn.base.read import read_object
from eagle3fn.base.threads import Kept, read_kept
from eagle3fn.base.toml import to_toml
from eagle3fn.base.types import TrainState
from eagle3fn.train.bind import bind
from eagle3fn.train.checkpoint import META, checkpoints
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.run import Run, training_batches
from eagle3fn.train.shard import gather

_TIMED_STEPS = 24
_FILE = "horizon.json"


def with_horizon(
    run: Run, first_state: Callable[[], TrainState], minutes: float | None
) -> tuple[Run, str]:
    """The run with `train.steps` filled in, and what chose them: "steps", "minutes" or "epochs".

    Writes nothing.

    `first_state` makes the state whose steps are timed; called only where minutes choose, and no
    run has begun.

    Raises:
        UserError: steps and minutes together, or a run that began with another choice.
    """
    settings = run.config.train
    if settings.steps and minutes is not None:
        raise UserError(
            f"--minutes and train.steps = {settings.steps} both choose the number of steps; "
            "leave one out"
        )
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes}: must be above 0 and finite")
    chosen = "epochs" if minutes is None else "minutes"
    if settings.steps:
        chosen = "steps"

    # A resumed run keeps the number that it began with.
    begun = run.world.shared(_begun(run.out / _FILE) if run.world.main else None)
    if begun and begun.chosen_by not in (chosen, "") and chosen != "steps":
        raise UserError(
            f"{run.out / _FILE}: the run began with its steps chosen by {begun.chosen_by}, "
            f"now it is {chosen}; call it as before, or train into another folder"
        )

    if settings.steps:
        steps = settings.steps
    elif begun:
        steps = begun.steps
    elif minutes is not None:
        seconds = seconds_per_step(run, first_state())
        steps = run.world.shared(min(max(1, int(minutes * 60 / seconds)), MOST_STEPS))
    else:
        steps = max(1, settings.epochs * len(run.train) // run.config.data.global_batch)
    return _with_steps(run, steps), chosen


def _with_steps(run: Run, steps: int) -> Run:
    config = with_steps(run.config, steps)
    return run._replace(config=config, fns=bind(config, run.frozen, run.mesh, run.recipe))


def write_horizon(run: Run, chosen: str) -> None:
    """Keep the choice, the number of threads and the resolved configuration in the run's folder."""
    kept = {
        "steps": run.config.train.steps,
        "chosen_by": chosen,
        "threads": torch.get_num_threads(),
    }
    write_json(run.out / _FILE, kept)
    write_text(run.out / "config.toml", to_toml(to_dict(run.config)))


def begun_threads(out: str | Path) -> Kept | None:
    """The number of threads that a run's folder was trained with, if one began there.

    Runs of earlier versions keep it with their checkpoints alone.
    """
    out = Path(out)
    kept = read_kept(out / _FILE)
    newest = max(checkpoints(out / "checkpoints"), default=None)
    if kept is None and newest is not None:
        kept = read_kept(newest / META)
    return kept


class _Begun(NamedTuple):
    """What a run began with, as `horizon.json` has it."""

    steps: int
    chosen_by: str  # "" in files of the first version


def _begun(path: Path) -> _Begun | None:
    if not os.path.lexists(path):
        return None
    found = read_object(path)
    steps = found.get("steps")
    chosen_by = found.get("chosen_by", "")
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        fault = f"steps = {printable(repr(steps))}: must be a number of steps"
    elif chosen_by not in ("", "steps", "minutes", "epochs"):
        fault = f"chosen_by = {printable(repr(chosen_by))}: must be steps, minutes or epochs"
    else:
        return _Begun(steps, chosen_by)
    raise UserError(f"{path}: {fault}; delete it, or train into another folder")


def seconds_per_step(run: Run, state: TrainState, timed: int = _TIMED_STEPS) -> float:
    """Measured seconds of a step of average length and its share of an evaluation.

    The `timed` steps are dropped.
    """
    run = _with_steps(run, timed + 1)
    data = run.config.data

    # Time the steps; the first one, which warms up, is left out.
    tokens = 0
    begin = time.perf_counter()
    for number, micro in enumerate(training_batches(run, 0, timed + 1)):
        _, metrics = run.fns.step(state, micro)
        if number == 0:
            _wait(run.device)
            begin = time.perf_counter()
        else:
            tokens += int(metrics["tokens"])
    _wait(run.device)
    seconds_per_token = (time.perf_counter() - begin) / tokens

    # A step of average length: the index has the lengths, files without an index don't.
    tokens_per_step = tokens / timed
    lengths = [run.features.samples[i].get("length") for i in run.train]
    known = [min(length, data.max_length) for length in lengths if length]
    if known:
        tokens_per_step = sum(known) / len(known) * data.global_batch

    # An evaluation comes every `eval_every` steps.
    begin = time.perf_counter()
    evaluate_held_out(run, gather(state.params))
    evaluation = (time.perf_counter() - begin) / run.config.train.eval_every
    return seconds_per_token * tokens_per_step + evaluation


def _wait(device: str) -> None:
    """A device is still at work when a step returns."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
