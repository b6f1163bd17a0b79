"""A run tried without a trace: its plan, its next batch, one update, and how long all would take.

It goes the run's own way (`train.ready`) up to the first thing that would be written.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.config import Config
from eagle3fn.base.errors import number_of
from eagle3fn.base.files import locked_as_is
from eagle3fn.base.launch import World
from eagle3fn.base.progress import duration
from eagle3fn.base.types import TrainState, VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.train.bad_updates import check_update
from eagle3fn.train.events import End, Events
from eagle3fn.train.horizon import Horizon, chosen_by, seconds_per_step, times_left
from eagle3fn.train.memory import MemoryPlan, describe, peak_bytes, plan_memory, readable_bytes
from eagle3fn.train.ready import ready
from eagle3fn.train.recipe import OURS, Recipe, schedule_of
from eagle3fn.train.run import Run, prepare, training_batches
from eagle3fn.train.track import readable

_TIMED_STEPS = 2


class TriedUpdate(NamedTuple):
    """The update that comes next, of the global batch and of all ranks."""

    samples: int
    tokens: int
    rows: int  # supervised, at the first unroll step
    counted: float  # share of the rows that the loss counts
    loss: float
    grad_norm: float  # before the clip
    seconds: float  # what a first one prepares included
    peak: int  # bytes, from before the state to the update's end, as `peak_bytes` counts


class DryRun(NamedTuple):
    """What was found."""

    plan: MemoryPlan
    device: str
    horizon: Horizon  # the updates of the whole run, and what chose them
    end: End  # how the run in the folder stands
    evaluations: int  # left; one of them before the first update
    checkpoints: int  # left
    update: TriedUpdate | None  # None: nothing is left to train
    seconds: float  # estimated, of the updates that are left


def dry_run(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    minutes: float | None = None,
    events: Events = Events(),  # noqa: B008
    world: World = World(),  # noqa: B008
    recipe: Recipe = OURS,
) -> DryRun:
    """Prepare a run as `train.loop.train` does, and make the update that comes next, if one does.

    All ranks call. The state after it is dropped. A few more updates and an evaluation are timed
    for the estimate. Of `events` those before the first update are called.

    Raises:
        UserError: as `train` before it writes, and for that update.
    """
    run = prepare(config, features, vocab_map, target, out, world, recipe)
    with locked_as_is(run.out) if world.main else nullcontext():
        before = peak_bytes(run.device)
        run, _, horizon, state, _, end, _ = ready(run, None, minutes, events)

        update = None
        seconds = 0.0
        if not end.finished and end.step < end.total:
            update = _tried(run, state, before)
            seconds = (end.total - end.step) * seconds_per_step(run, state, _TIMED_STEPS)

    # A run that its patience has ended stops before its last update.
    settings = run.config.train
    last = end.step if end.early else end.total
    tokens = 0 if features.lengths is None else int(features.lengths.sum())
    tied = target.head is target.embed_tokens
    return DryRun(
        plan=plan_memory(run.config, world.size, tokens, tied, recipe),
        device=run.device,
        horizon=horizon,
        end=end,
        evaluations=times_left(settings.eval_every, end.step, last) + (end.step == 0 or end.owes),
        checkpoints=times_left(settings.checkpoint_every, end.step, last),
        update=update,
        seconds=seconds,
    )


def _tried(run: Run, state: TrainState, before: int) -> TriedUpdate:
    """Make the update that comes after `state`; `before`: `peak_bytes` before that was made."""
    step = int(state.step)
    (micro,) = training_batches(run, step + run.shift, step + run.shift + 1)
    rate = schedule_of(run.config, run.recipe)(step)

    # Reading its numbers waits for the device.
    begin = time.perf_counter()
    _, metrics = run.fns.step(state, micro, rate=rate)
    loss = float(metrics["loss"])
    grad_norm = float(metrics["grad_norm"])
    seconds = time.perf_counter() - begin
    peak = peak_bytes(run.device)
    if run.device == "cpu":
        peak -= before
    check_update(run, step + 1, metrics)

    rates = readable(metrics["aux"])
    return TriedUpdate(
        samples=run.config.data.global_batch,
        tokens=int(metrics["tokens"]),
        rows=rates["rows"],
        counted=rates["counted"],
        loss=loss,
        grad_norm=grad_norm,
        seconds=seconds,
        peak=peak,
    )


def describe_dry_run(found: DryRun) -> str:
    """The lines to print."""
    lines = [describe(found.plan), "the run", f"  {_left(found)}"]
    if found.update is not None:
        lines += _update_lines(found, found.update)
    return "\n".join([*lines, "nothing was written"])


def _left(found: DryRun) -> str:
    """What of the run is left, and what chose its number of updates."""
    if found.end.finished:
        return ended_line(found.end, found.horizon)
    step, total, *_ = found.end
    chosen = f"{chosen_by(found.horizon)} chose the number of updates"
    updates = f"{total - step} of {total} updates left" if step else number_of(total, "update")
    evaluations = number_of(found.evaluations, "evaluation")
    checkpoints = number_of(found.checkpoints, "checkpoint")
    return f"{updates}, {evaluations}, {checkpoints}; {chosen}"


def ended_line(end: End, horizon: Horizon) -> str:
    """That nothing of a run is left, and what chose its number of updates."""
    by_patience = ", by train.patience" if end.early else ""
    return (
        f"ended at step {end.step} of {end.total}{by_patience}, nothing is left to train; "
        f"{chosen_by(horizon)} chose the number of updates"
    )


def _update_lines(found: DryRun, update: TriedUpdate) -> list[str]:
    begun = found.end.step > 0
    return [
        "the next batch" if begun else "the first batch",
        f"  {update.samples} samples, {update.tokens} tokens, {update.rows} supervised rows, of "
        f"which the loss counts {update.counted:.1%}",
        "one update",
        f"  loss {update.loss:.4f}, gradient norm {update.grad_norm:.4f}, "
        f"{update.seconds:.2f} s with what a first one prepares",
        f"  {_memory(found, update.peak)}",
        "what is left" if begun else "all of it",
        f"  about {duration(found.seconds)} for updates and evaluations, by {_TIMED_STEPS} timed "
        "updates; checkpoints not counted",
    ]


def _memory(found: DryRun, peak: int) -> str:
    """The memory that was measured, and the plan's of the same."""
    needed = found.plan.needed
    if found.device != "cpu":
        measured = f"allocated on {found.device} at its peak"
        return f"{readable_bytes(peak)} {measured}; the plan's sum is {readable_bytes(needed)}"

    # The frozen tensors were there before.
    needed -= found.plan.held["frozen tensors"]
    planned = f"the plan's sum without frozen tensors is {readable_bytes(needed)}"
    if peak <= 0:
        return f"memory at its peak not above that of reading the data before; {planned}"
    return f"memory rose by {readable_bytes(peak)} at its peak, state and update; {planned}"
