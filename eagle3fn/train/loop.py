"""The training loop: batches in, steps, held-out evaluation, checkpoints.

A resumed run is bit-identical.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, TypeVar

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import fsync_path
from eagle3fn.base.launch import World
from eagle3fn.base.signals import Stop, StopRequested, signals_noted
from eagle3fn.base.types import Batch, TrainState, VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.held import held
from eagle3fn.data.stages import prefetch
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.train.bad_updates import (
    check_dropped,
    check_held_out,
    check_update,
)
from eagle3fn.train.begin import LoopState, Point
from eagle3fn.train.branch import write_branch
from eagle3fn.train.checkpoint import save_checkpoint
from eagle3fn.train.counted import check_counted_held_out, check_uncounted, uncounted_after
from eagle3fn.train.events import Events
from eagle3fn.train.feed import Feed
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.horizon import patience_line, write_horizon
from eagle3fn.train.ready import ROWS, end_lines, end_of, ready
from eagle3fn.train.recipe import OURS, Recipe, schedule_of
from eagle3fn.train.run import Run, prepare, training_batches
from eagle3fn.train.shard import gather
from eagle3fn.train.step import Metrics
from eagle3fn.train.track import append_row, cut_rows, metrics_row

T = TypeVar("T")


class PendingStep(NamedTuple):
    """An update whose metrics were not read yet: reading them waits for the device."""

    number: int
    begin: float  # seconds; when it was called, or when the one before it was read
    metrics: Metrics


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
    source: str | Path | None = None,
    max_steps: int | None = None,
) -> TrainState:
    """Train, or go on from the newest checkpoint in `out`.

    Returns the last state, sharded if `world` has ranks. With `max_steps` this call makes that many
    updates at most and saves the last one; the schedule stays that of the whole run. Under
    `train.patience` the run may end before its last update: then further calls make none.

    With `source`, a checkpoint of another run or that run's folder, a new `out` goes on from there,
    under a configuration and data that may be others (`train.changes`): with its whole state, its
    rows up to that step, and the steps counted on. Once `out` has a checkpoint of its own, that is
    gone on from.

    Writes `config.toml` (resolved), `horizon.json`, `metrics.jsonl`, `eval.jsonl` and
    `checkpoints/` into `out`, and with `source` `from.json`. With `minutes`, the number of steps is
    chosen from a few timed steps, once: a resumed run keeps it (`train.horizon` says what may
    change it). All ranks call; rank 0 alone writes and calls `events`. After Ctrl-C, SIGTERM or
    SIGHUP on any rank all finish the step, save it, and return its state.

    Raises:
        UserError: features, map, target and configuration don't fit together, a checkpoint of
            another run, another process training in `out`, a loss that is not finite, the
            held-out one too, or one that counts no row.
    """
    run = prepare(config, features, vocab_map, target, out, world, recipe)
    lock = held(run.out) if world.main else nullcontext()
    with lock:
        # Where it goes on, and its state.
        run, point, horizon, state, loop_state, end, lines = ready(run, source, minutes, events)

        # The run's files: of another run that it goes on from, cut to its step.
        if world.main:
            if point.branches:
                assert source is not None and point.path is not None
                write_branch(run.out, source, point.path, point.step, lines[1:])
            write_horizon(run, horizon)
            patience = patience_line(run, point.step, loop_state.waited)
            for line in [*lines, patience] if patience else lines:
                events.on_notice(line)
            _cut_rows(run, point, loop_state, events)

        # An evaluation that is owed may end the run's patience.
        if point.branches or loop_state.owes_evaluation:
            loop_state = _evaluate(run, state, loop_state, events)
            _save(run, state, loop_state)
            end = end_of(run.config, point.step, loop_state)
        if not end.finished:
            # A signal before this ends the program: nothing is lost that is not on the disk.
            with signals_noted() as stop_requested:
                state, loop_state = _steps(
                    run, state, loop_state, events, stop_requested, max_steps
                )
        if world.main:
            end = end_of(run.config, int(state.step), loop_state)
            for line in end_lines(run.config, end, loop_state):
                events.on_notice(line)
            events.on_end(end)
        return state


def _cut_rows(run: Run, point: Point, loop_state: LoopState, events: Events) -> None:
    """Keep the rows up to the step that the run goes on from; what is lost is said."""
    # Without a checkpoint step 0 is evaluated again, so its row goes too. So does that of the step
    # at which another run is left, and of an evaluation that is owed.
    last = {"metrics.jsonl": point.step or -1, "eval.jsonl": point.step or -1}
    if point.branches or loop_state.owes_evaluation:
        last["eval.jsonl"] = point.step - 1
    for name, kind in ROWS.items():
        line = cut_rows(run.out / name, last[name], kind)
        if line:
            events.on_notice(line)


def _steps(
    run: Run,
    state: TrainState,
    loop_state: LoopState,
    events: Events,
    stop_requested: Stop,
    max_steps: int | None,
) -> tuple[TrainState, LoopState]:
    """Train until the last step, the last one of this call, the end of the patience, or until a
    stop is requested on any rank.

    Raises:
        UserError: as `_report` and `_evaluate`; or the schedule gives no rate, after the state so
            far was saved.
        StopRequested: a signal came, and features of the first evaluation did not.
    """
    settings = run.config.train
    total = settings.steps
    start = int(state.step)
    last = total if max_steps is None else min(total, start + max_steps)
    if start == 0:
        loop_state = _evaluate(run, state, loop_state, events)

    pending = deque[PendingStep]()

    def report_all() -> LoopState:
        return _report(run, pending, loop_state, events, wait=True)

    def save_finished() -> None:
        _save_progress(run, state, start, report_all())

    # Sources may end with an error at any time.
    keep_finished = save_finished if run.features.on_demand else report_all

    places = training_batches(run, start + run.shift, last + run.shift)
    source = prefetch(places, run.config.data.prefetch)
    feed = _feed(run, source)
    with closing(source):
        for number, micro in enumerate(_or_else(feed, keep_finished), start + 1):
            begin = time.perf_counter()
            with _on_user_error(save_finished):  # before the state changes
                rate = schedule_of(run.config, run.recipe)(number - 1)
            state, metrics = run.fns.step(state, micro, donate=True, rate=rate)
            pending.append(PendingStep(number, begin, metrics))

            # Report steps that are done; all of them before something is computed from the state.
            evaluates = number == total or number % settings.eval_every == 0
            saves = number == last or number % settings.checkpoint_every == 0
            wait = evaluates or saves or not _is_asynchronous(run.device)
            loop_state = _report(run, pending, loop_state, events, wait)

            # Where its features do not come, the next call evaluates.
            if evaluates:
                loop_state = loop_state._replace(owes_evaluation=True)
                try:
                    loop_state = _evaluate(run, state, loop_state, events, keep_finished)
                except StopRequested:
                    break

            # A stop on one rank stops all: they must leave at the same step.
            early = end_of(run.config, number, loop_state).early
            stop = any(run.world.every(stop_requested())) or early
            if saves or stop:
                loop_state = report_all()
                _save(run, state, loop_state)
            if stop:
                break
        else:
            # Without its last update, where a signal came while samples were waited for.
            _keep_cut(run, state, start, last, loop_state)
    _report_waited(run, feed, events)
    return state, loop_state


@contextmanager
def _on_user_error(before: Callable[[], object]) -> Iterator[None]:
    """Call `before` where the block raises a user error."""
    try:
        yield
    except UserError:
        before()
        raise


def _keep_cut(run: Run, state: TrainState, start: int, last: int, loop_state: LoopState) -> None:
    """Save what was trained, where that is less than this call was to train."""
    if int(state.step) < last:
        _save_progress(run, state, start, loop_state)


def _save_progress(run: Run, state: TrainState, start: int, loop_state: LoopState) -> None:
    """Save a state that this call has moved on from `start`."""
    if int(state.step) > start:
        _save(run, state, loop_state)


def _report_waited(run: Run, feed: Iterator[tuple[Batch, ...]], events: Events) -> None:
    if isinstance(feed, Feed) and run.world.main:
        events.on_notice(f"updates waited for features {feed.share_waited():.0%} of the time")


def _feed(run: Run, source: Iterator[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
    """The batches as the loop takes them; those with features on demand may fail on one rank."""
    on_demand = run.features.on_demand
    return source if on_demand is None else Feed(source, run.world, on_demand.answers)


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
        UserError: a loss, gradient norm or state that is not finite, too many dropped updates, or
            too many that count no row.
    """
    kept_back = 0 if wait else 1
    while len(pending) > kept_back:
        number, begin, metrics = pending.popleft()
        check_update(run, number, metrics)

        skipped = metrics["skipped"]
        loop_state = loop_state._replace(
            skipped=loop_state.skipped + skipped,
            in_a_row=loop_state.in_a_row + 1 if skipped else 0,
            uncounted=uncounted_after(loop_state.uncounted, metrics),
        )
        if run.world.main:
            row = metrics_row(number, metrics, time.perf_counter() - begin, loop_state.skipped)
            append_row(run.out / "metrics.jsonl", row)
            events.on_step(row, run.config.train.steps)
        check_dropped(run, number, loop_state.in_a_row)
        check_uncounted(run.config, number, loop_state.uncounted)

        # On a device the next step began when this one ended.
        if pending:
            pending[0] = pending[0]._replace(begin=time.perf_counter())
    return loop_state


def _save(run: Run, state: TrainState, loop_state: LoopState) -> None:
    """Write a checkpoint; the rows before it are on the disk first, and the features kept."""
    if run.features.on_demand:
        run.features.on_demand.settle()
    if run.world.main:
        for name in ROWS:
            fsync_path(run.out / name)
    folder = run.out / "checkpoints"
    extra = loop_state._asdict()
    keep = run.config.train.keep_last
    save_checkpoint(
        folder, state, run.config, run.data, extra, keep, run.world, run.shift, run.earlier
    )


def _evaluate(
    run: Run,
    state: TrainState,
    loop_state: LoopState,
    events: Events,
    on_missing: Callable[[], object] = lambda: None,
) -> LoopState:
    """Evaluate, report, and return the loop's state with the best value so far.

    The same on all ranks. A state that fails is neither reported nor exported. `on_missing` is
    called, on all ranks, where features do not come.

    Raises:
        UserError: a held-out loss that is not finite, or that counts no row; as
            `evaluate_held_out`.
    """
    params = gather(state.params)
    step = int(state.step)
    with _on_user_error(on_missing):
        found = evaluate_held_out(run, params)
    row = {"step": step, **found}
    loop_state = loop_state._replace(owes_evaluation=False)
    check_held_out(run, row)
    check_counted_held_out(row)

    # Without held-out samples there is nothing to compare by, and the newest draft is published. An
    # untrained one is published on its own, and is never the best.
    value = row.get("accepted_length", 0.0)
    risen = value > loop_state.best
    if run.world.main:
        append_row(run.out / "eval.jsonl", row)
        events.on_eval(row)
        if risen or step == 0 or not run.held_out:
            events.on_draft(params, run.frozen, row)
    if step == 0 or not run.held_out:
        return loop_state
    return loop_state._replace(
        best=max(value, loop_state.best), waited=0 if risen else loop_state.waited + 1
    )
