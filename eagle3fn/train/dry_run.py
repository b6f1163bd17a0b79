"""A run tried without a trace: its plan, its first batch, one update, and how long all would take.

Nothing is written.
"""

import time
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.config import Config
from eagle3fn.base.launch import World
from eagle3fn.base.progress import duration
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.train.bad_updates import check_first, check_update
from eagle3fn.train.begin import find_point
from eagle3fn.train.changes import changes_since, refuse_in_place
from eagle3fn.train.checkpoint_meta import read_meta
from eagle3fn.train.horizon import (
    Horizon,
    chosen_by,
    seconds_per_step,
    times_left,
    with_horizon,
)
from eagle3fn.train.memory import MemoryPlan, describe, peak_bytes, plan_memory, readable_bytes
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.run import prepare, training_batches
from eagle3fn.train.track import readable

_TIMED_STEPS = 2


class DryRun(NamedTuple):
    """What was found, of the global batch and of all ranks."""

    plan: MemoryPlan
    horizon: Horizon  # the updates of the whole run, and what chose them
    made: int  # of these, by the run that the folder has
    evaluations: int  # left; one of them before the first update
    checkpoints: int  # left
    samples: int  # of the first batch
    tokens: int
    rows: int  # supervised, at the first unroll step
    counted: float  # share of the rows that the loss counts
    loss: float  # of the first update
    grad_norm: float  # before the clip
    first_seconds: float  # of that update, what a first one prepares included
    device: str
    peak: int  # bytes, from the first state to the end of that update, as `peak_bytes` counts
    seconds: float  # estimated, of the updates that are left


def dry_run(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    minutes: float | None = None,
    world: World = World(),  # noqa: B008
    recipe: Recipe = OURS,
) -> DryRun:
    """Prepare a run as `train.loop.train` does, from its first state on, and make one update.

    All ranks call. The state after it is dropped. A few more updates and an evaluation are timed
    for the estimate.

    Raises:
        UserError: as `train` before its first update, a run in `out` that cannot go on so among it,
            and for that update.
    """
    run = prepare(config, features, vocab_map, target, out, world, recipe)
    before = peak_bytes(run.device)
    state = run.fns.init_state(run.fns.init(run.config.train.seed))
    check_first(run, state)

    # How many updates there are, and how many the folder's run has made.
    found = find_point(run, None, lambda line: None) if world.main else None
    point = world.shared(found)
    run = run._replace(shift=point.shift)
    run, horizon = with_horizon(run, lambda: state, minutes, point)
    if point.path is not None:
        refuse_in_place(point.path, changes_since(read_meta(point.path), run.config, run.data))

    # One update; reading its numbers waits for the device.
    (micro,) = training_batches(run, 0, 1)
    begin = time.perf_counter()
    _, metrics = run.fns.step(state, micro)
    loss = float(metrics["loss"])
    grad_norm = float(metrics["grad_norm"])
    first_seconds = time.perf_counter() - begin
    peak = peak_bytes(run.device)
    if run.device == "cpu":
        peak -= before
    check_update(run, 1, metrics)

    rates = readable(metrics["aux"])
    settings = run.config.train
    total = settings.steps
    tokens = sum(sample.get("length", 0) for sample in features.samples)
    tied = target.head is target.embed_tokens
    return DryRun(
        plan=plan_memory(run.config, world.size, tokens, tied, recipe),
        horizon=horizon,
        made=point.step,
        evaluations=times_left(settings.eval_every, point.step, total) + (point.step == 0),
        checkpoints=times_left(settings.checkpoint_every, point.step, total),
        samples=run.config.data.global_batch,
        tokens=int(metrics["tokens"]),
        rows=rates["rows"],
        counted=rates["counted"],
        loss=loss,
        grad_norm=grad_norm,
        first_seconds=first_seconds,
        device=run.device,
        peak=peak,
        seconds=(total - point.step) * seconds_per_step(run, state, _TIMED_STEPS),
    )


def describe_dry_run(found: DryRun) -> str:
    """The lines to print."""
    return "\n".join(
        [
            describe(found.plan),
            "the run",
            f"  {_updates(found)}, {found.evaluations} evaluations, "
            f"{found.checkpoints} checkpoints; {chosen_by(found.horizon)} chose the number of "
            "updates",
            "the first batch",
            f"  {found.samples} samples, {found.tokens} tokens, {found.rows} supervised rows, of "
            f"which the loss counts {found.counted:.1%}",
            "one update",
            f"  loss {found.loss:.4f}, gradient norm {found.grad_norm:.4f}, "
            f"{found.first_seconds:.2f} s with what a first one prepares",
            f"  {_memory(found)}",
            "what is left" if found.made else "all of it",
            f"  about {duration(found.seconds)}, checkpoints not counted",
            "nothing was written",
        ]
    )


def _updates(found: DryRun) -> str:
    total = found.horizon.steps
    if not found.made:
        return f"{total} updates"
    return f"{total - found.made} of {total} updates left"


def _memory(found: DryRun) -> str:
    """The memory that was measured, and the plan's of the same."""
    needed = found.plan.needed
    if found.device != "cpu":
        measured = f"allocated on {found.device} at its peak"
        return (
            f"{readable_bytes(found.peak)} {measured}; the plan's sum is {readable_bytes(needed)}"
        )

    # The frozen tensors were there before.
    needed -= found.plan.held["frozen tensors"]
    planned = f"the plan's sum without frozen tensors is {readable_bytes(needed)}"
    if found.peak <= 0:
        return f"memory at its peak not above that of reading the data before; {planned}"
    return f"memory rose by {readable_bytes(found.peak)} at its peak, state and update; {planned}"
