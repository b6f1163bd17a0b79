"""The training loop: batches in, steps, held-out evaluation, checkpoints.

A resumed run is bit-identical.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import fsync_path, locked
from eagle3fn.base.launch import World
from eagle3fn.base.signals import Stop, signals_noted
from eagle3fn.base.types import Frozen, Params, TrainState, VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.pipeline import prefetch
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.train.checkpoint import (
    checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.horizon import with_horizon, write_horizon
from eagle3fn.train.recipe import OURS, Recipe
from eagle3fn.train.run import Run, prepare, training_batches
from eagle3fn.train.shard import empty_state, gather
from eagle3fn.train.step import Metrics
from eagle3fn.train.track import append_row, cut_rows, metrics_row, nonfinite

ROWS = ("metrics.jsonl", "eval.jsonl")
T = TypeVar("T")


class Events(NamedTuple):
    """What the loop calls: with each metrics row, each held-out row, and each best draft."""

    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    on_eval: Callable[[dict[str, Any]], None] = lambda row: None
    on_best: Callable[[Params, Frozen, dict[str, Any]], None] = lambda params, frozen, row: None


class PendingStep(NamedTuple):
    """An update whose metrics were not read yet: reading them waits for the device."""

    number: int
    begin: float  # seconds; when it was called, or when the one before it was read
    metrics: Metrics


class LoopState(NamedTuple):
    """What a resumed run needs besides the `TrainState`."""

    best: float = 0.0  # the best held-out value so far
    skipped: int = 0  # updates dropped so far


def train(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    minutes: float | None = None,
    events: Events = Events(),  # noqa: B008
    world: World = World(),  # noqa: B008
    recipe: Recipe = OURS,
) -> TrainState:
    """Train, or go on from the newest checkpoint in `out`.

    Returns the last state, sharded if `world` has ranks.

    Writes `config.toml` (resolved), `horizon.json`, `metrics.jsonl`, `eval.jsonl` and
    `checkpoints/` into `out`. With `minutes`, the number of steps is chosen from a few timed steps,
    once: a resumed run keeps it. All ranks call; rank 0 alone writes and calls `events`. After
    Ctrl-C, SIGTERM or SIGHUP on any rank all finish the step, save it, and return its state.

    Raises:
        UserError: features, map, target and configuration don't fit together, a checkpoint of
            another run, another process training in `out`, or a loss that is not finite.
    """
    run = prepare(config, features, vocab_map, target, out, world, recipe)
    lock = locked(run.out) if world.main else nullcontext()
    with lock:
        # Where to go on; how many steps to make.
        newest = run.world.shared(_newest_checkpoint(run) if world.main else None)
        run, chosen = with_horizon(run, lambda: _first_state(run), minutes)

        # The state: read, or made.
        if newest is None:
            state, loop_state = _first_state(run), LoopState()
        else:
            state, loop_state = _resume(run, newest)

        if world.main:
            write_horizon(run, chosen)
            # Without a checkpoint step 0 is evaluated again, so its row goes too.
            last = int(state.step) or -1
            for name in ROWS:
                cut_rows(run.out / name, last)

        if int(state.step) < run.config.train.steps:
            # A signal before this ends the program: nothing is lost that is not on the disk.
            with signals_noted() as stop_requested:
                state = _steps(run, state, loop_state, events, stop_requested)
        return state


def _first_state(run: Run) -> TrainState:
    return run.fns.init_state(run.fns.init(run.config.train.seed))


def _newest_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint, if there is one; what killed saves left is removed."""
    folder = run.out / "checkpoints"
    remove_unfinished(folder)
    return max(checkpoints(folder), default=None)


def _resume(run: Run, path: Path) -> tuple[TrainState, LoopState]:
    empty = empty_state(run.config, run.device, run.mesh, run.recipe)
    state, extra, rng = load_checkpoint(path, empty, run.config, run.data, run.world)
    torch.set_rng_state(rng)
    return state, LoopState(**extra)


def _steps(
    run: Run, state: TrainState, loop_state: LoopState, events: Events, stop_requested: Stop
) -> TrainState:
    """Train until the last step, or until a stop is requested on any rank."""
    settings = run.config.train
    total = settings.steps
    start = int(state.step)
    if start == 0:
        loop_state = _evaluate(run, state, loop_state, events)

    pending = deque[PendingStep]()

    def report_all() -> LoopState:
        return _report(run, pending, loop_state, events, wait=True)

    source = prefetch(training_batches(run, start, total), run.config.data.prefetch)
    with closing(source):
        for number, micro in enumerate(_or_else(source, report_all), start + 1):
            begin = time.perf_counter()
            state, metrics = run.fns.step(state, micro, donate=True)
            pending.append(PendingStep(number, begin, metrics))

            # Report steps that are done; all of them before something is computed from the state.
            last = number == total
            evaluates = last or number % settings.eval_every == 0
            saves = last or number % settings.checkpoint_every == 0
            wait = evaluates or saves or not _is_asynchronous(run.device)
            loop_state = _report(run, pending, loop_state, events, wait)

            if evaluates:
                loop_state = _evaluate(run, state, loop_state, events)

            # A stop on one rank stops all: they must leave at the same step.
            stop = any(run.world.every(stop_requested()))
            if saves or stop:
                loop_state = report_all()
                _save(run, state, loop_state)
            if stop:
                break
    return state


def _or_else(source: Iterator[T], before: Callable[[], object]) -> Iterator[T]:
    """The items of `source`.

    Where it raises, `before` is called first, so that finished steps are reported.
    """
    try:
        yield from source
    except Exception:
        before()
        raise


def _is_asynchronous(device: str) -> bool:
    """Whether a step returns before it is computed: its metrics are then read when the next one was
    called.
    """
    return device != "cpu"


def _report(
    run: Run, pending: deque[PendingStep], loop_state: LoopState, events: Events, wait: bool
) -> LoopState:
    """Write and report the metrics of all steps but the newest, or with `wait` of that one too.

    Raises:
        UserError: a loss or gradient norm that is not finite.
    """
    kept_back = 0 if wait else 1
    while len(pending) > kept_back:
        number, begin, metrics = pending.popleft()
        if nonfinite(metrics) and not metrics["skipped"]:
            raise UserError(_nonfinite_message(run, number - 1))

        loop_state = loop_state._replace(skipped=loop_state.skipped + metrics["skipped"])
        if run.world.main:
            row = metrics_row(number, metrics, time.perf_counter() - begin, loop_state.skipped)
            append_row(run.out / "metrics.jsonl", row)
            events.on_step(row, run.config.train.steps)

        # On a device the next step began when this one ended.
        if pending:
            pending[0] = pending[0]._replace(begin=time.perf_counter())
    return loop_state


def _save(run: Run, state: TrainState, loop_state: LoopState) -> None:
    """Write a checkpoint; the rows before it are on the disk first."""
    if run.world.main:
        for name in ROWS:
            fsync_path(run.out / name)
    folder = run.out / "checkpoints"
    extra = loop_state._asdict()
    keep = run.config.train.keep_last
    save_checkpoint(folder, state, run.config, run.data, extra, keep, run.world)


def _evaluate(run: Run, state: TrainState, loop_state: LoopState, events: Events) -> LoopState:
    """Evaluate, report, and return the loop's state with the best value so far.

    The same on all ranks.
    """
    params = gather(state.params)
    step = int(state.step)
    row = {"step": step, **evaluate_held_out(run, params)}

    # Without held-out samples the newest draft is the best: 1 + step grows. An untrained one never
    # is, though it is reported.
    value = row.get("accepted_length", 1.0 + step) if step else 0.0
    if run.world.main:
        append_row(run.out / "eval.jsonl", row)
        events.on_eval(row)
        if value > loop_state.best or step == 0:
            events.on_best(params, run.frozen, row)
    return loop_state._replace(best=max(value, loop_state.best))


def _nonfinite_message(run: Run, step: int) -> str:
    chosen = run.recipe.order(len(run.train), run.config, step)
    names = [str(run.features.samples[run.train[i]]["id"]) for i in chosen]
    found = checkpoints(run.out / "checkpoints")
    last = f"last good checkpoint: {found[-1]}" if found else "no checkpoint was written yet"
    return (
        f"step {step + 1}: the loss or its gradient is not finite; samples {', '.join(names)}; "
        f"{last}; check these samples, lower optimizer.learning_rate, or leave such updates out "
        "with --on-nonfinite skip"
    )
