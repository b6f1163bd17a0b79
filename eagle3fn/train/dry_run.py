"""A run tried without a trace: its plan, its first batch, one update, and how long all would take.

Nothing is written.
"""

import time
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.config import Config
from eagle3fn.base.launch import World
from eagle3fn.base.types import VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.train.bad_updates import check_first, check_update
from eagle3fn.train.horizon import seconds_per_step, with_horizon
from eagle3fn.train.memory import MemoryPlan, describe, plan_memory
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.run import prepare, training_batches
from eagle3fn.train.track import readable

_TIMED_STEPS = 2


class DryRun(NamedTuple):
    """What was found, of the global batch and of all ranks."""

    plan: MemoryPlan
    updates: int  # of the whole run
    evaluations: int  # of these, one before the first update
    checkpoints: int
    samples: int  # of the first batch
    tokens: int
    rows: int  # supervised, at the first unroll step
    counted: float  # share of the rows that the loss counts
    loss: float  # of the first update
    grad_norm: float  # before the clip
    first_seconds: float  # of that update, what a first one prepares included
    seconds: float  # estimated, of the whole run


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
        UserError: as `train` before its first update, and for that update.
    """
    run = prepare(config, features, vocab_map, target, out, world, recipe)
    state = run.fns.init_state(run.fns.init(run.config.train.seed))
    check_first(run, state)
    run, _ = with_horizon(run, lambda: state, minutes)

    # One update; reading its numbers waits for the device.
    (micro,) = training_batches(run, 0, 1)
    begin = time.perf_counter()
    _, metrics = run.fns.step(state, micro)
    loss = float(metrics["loss"])
    grad_norm = float(metrics["grad_norm"])
    first_seconds = time.perf_counter() - begin
    check_update(run, 1, metrics)

    rates = readable(metrics["aux"])
    settings = run.config.train
    tokens = sum(sample.get("length", 0) for sample in features.samples)
    tied = target.head is target.embed_tokens
    return DryRun(
        plan=plan_memory(run.config, world.size, tokens, tied, recipe),
        updates=settings.steps,
        evaluations=1 + -(-settings.steps // settings.eval_every),
        checkpoints=-(-settings.steps // settings.checkpoint_every),
        samples=run.config.data.global_batch,
        tokens=int(metrics["tokens"]),
        rows=rates["rows"],
        counted=rates["counted"],
        loss=loss,
        grad_norm=grad_norm,
        first_seconds=first_seconds,
        seconds=settings.steps * seconds_per_step(run, state, _TIMED_STEPS),
    )


def describe_dry_run(found: DryRun) -> str:
    """The lines to print."""
    return "\n".join(
        [
            describe(found.plan),
            "the run",
            f"  {found.updates} updates, {found.evaluations} evaluations, "
            f"{found.checkpoints} checkpoints",
            "the first batch",
            f"  {found.samples} samples, {found.tokens} tokens, {found.rows} supervised rows, of "
            f"which the loss counts {found.counted:.1%}",
            "one update",
            f"  loss {found.loss:.4f}, gradient norm {found.grad_norm:.4f}, "
            f"{found.first_seconds:.2f} s with what a first one prepares",
            "all of it",
            f"  about {duration(found.seconds)}, checkpoints not counted",
            "nothing was written",
        ]
    )


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(0.4), duration(75), duration(3 * 3600 + 120), duration(200_000)
    ('0.4 s', '1 min 15 s', '3 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
