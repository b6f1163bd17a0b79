"""The training loop: batches in, steps, held-out evaluation, checkpoints; resumed without a trace."""

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
from eagle3fn.base.types import Batch, Frozen, Params, TrainState, VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.pipeline import batches, indices_of, prefetch
from eagle3fn.data.target import TargetTensors
from eagle3fn.model.table import start_from_target
from eagle3fn.train.checkpoint import (
    checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.horizon import with_horizon, write_horizon
from eagle3fn.train.launch import World
from eagle3fn.train.run import Run, prepare, to_device
from eagle3fn.train.shard import gather
from eagle3fn.train.step import Metrics
from eagle3fn.train.stop import sigterm_noted
from eagle3fn.train.track import append_row, cut_rows, nonfinite, step_row

ROWS = ("metrics.jsonl", "eval.jsonl")
T = TypeVar("T")


class Events(NamedTuple):
    """What the loop tells its caller: each metrics row, each held-out row, and each best draft."""

    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    on_eval: Callable[[dict[str, Any]], None] = lambda row: None
    on_best: Callable[[Params, Frozen, dict[str, Any]], None] = lambda params, frozen, row: None


class Made(NamedTuple):
    """An update whose metrics were not read yet."""

    number: int
    begin: float  # when it was called, or the one before it was read
    metrics: Metrics


class Kept(NamedTuple):
    """What else a resumed run needs: the best held-out value, and the updates dropped."""

    best: float = 0.0
    skipped: int = 0


def train(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    minutes: float | None = None,
    events: Events = Events(),  # noqa: B008
    world: World = World(),  # noqa: B008
) -> TrainState:
    """Train, or go on from the newest checkpoint in `out`; returns the last state, sharded if `world` has ranks.

    Writes `config.toml` (resolved), `horizon.json`, `metrics.jsonl`, `eval.jsonl` and `checkpoints/` into `out`. With
    `minutes`, the number of steps is chosen from a few timed steps, once: a resumed run keeps it. All ranks call; rank
    0 alone writes and tells `events`. After SIGTERM on any rank all finish the step, save it, and return its state.

    Raises:
        UserError: features, map, target and configuration don't fit together, a checkpoint of another run, another
            process training in `out`, or a loss that is not finite.
    """
    run = prepare(config, features, vocab_map, target, out, world)
    with locked(run.out) if world.main else nullcontext(), sigterm_noted() as told:
        state = _first_state(run, target)
        run, chosen = with_horizon(run, state, minutes)
        state, kept = _resume(run, state)
        if world.main:
            write_horizon(run, chosen)
            for name in ROWS:
                cut_rows(
                    run.out / name, int(state.step) or -1
                )  # without a checkpoint, step 0 is evaluated again
        if int(state.step) < run.config.train.steps:
            state = _steps(run, state, kept, events, told)
        return state


def _first_state(run: Run, target: TargetTensors) -> TrainState:
    params = run.fns.init(run.config.train.seed)
    if run.config.train.init == "target":
        params = start_from_target(params, run.frozen, target.norm)
    return run.fns.init_state(params)


def _resume(run: Run, state: TrainState) -> tuple[TrainState, Kept]:
    """The newest checkpoint's state, or the first one; leftovers of a killed save are removed."""
    folder = run.out / "checkpoints"
    if run.world.main:
        remove_unfinished(folder)
    newest = run.world.shared(checkpoints(folder)[-1:] if run.world.main else None)
    if not newest:
        return state, Kept()
    state, extra, rng = load_checkpoint(newest[0], state, run.config, run.data, run.world)
    torch.set_rng_state(rng)
    return state, Kept(**extra)


def _steps(
    run: Run, state: TrainState, kept: Kept, events: Events, told: Callable[[], bool]
) -> TrainState:
    plan, start, total = run.config.train, int(state.step), run.config.train.steps
    if start == 0:
        kept = _evaluate(run, state, kept, events)
    source, made = prefetch(_on_device(run, start, total), run.config.data.prefetch), deque[Made]()
    tell_all = lambda: _tell(run, made, kept, events, wait=True)  # noqa: E731
    with closing(source):
        for number, micro in enumerate(_or_else(source, tell_all), start + 1):
            begin = time.perf_counter()
            state, metrics = run.fns.step(state, micro, donate=True)
            made.append(Made(number, begin, metrics))
            evaluates, saves = (
                number % each == 0 or number == total
                for each in (plan.eval_every, plan.checkpoint_every)
            )
            kept = _tell(
                run, made, kept, events, wait=evaluates or saves or not _is_late(run.device)
            )
            if evaluates:
                kept = _evaluate(run, state, kept, events)
            stop = any(run.world.every(told()))
            if saves or stop:
                kept = tell_all()
                _save(run, state, kept)
            if stop:
                break
    return state


def _or_else(source: Iterator[T], before: Callable[[], object]) -> Iterator[T]:
    """What the source gives; where that raises, `before` is called first: the steps done are told."""
    try:
        yield from source
    except Exception:
        before()
        raise


def _is_late(device: str) -> bool:
    """Whether a step's metrics are read when the next one is on its way: reading them waits for the device."""
    return device != "cpu"


def _tell(run: Run, made: deque[Made], kept: Kept, events: Events, wait: bool) -> Kept:
    """Write and tell the metrics of all steps but the newest, or with `wait` of that too; refuse what is not finite."""
    while len(made) > (not wait):
        number, begin, metrics = made.popleft()
        if nonfinite(metrics) and not metrics["skipped"]:
            raise UserError(_nonfinite_message(run, number - 1))
        kept = kept._replace(skipped=kept.skipped + metrics["skipped"])
        if run.world.main:
            row = step_row(number, metrics, time.perf_counter() - begin, kept.skipped)
            append_row(run.out / "metrics.jsonl", row)
            events.on_step(row, run.config.train.steps)
        if made:  # on a device it began when this one ended
            made[0] = made[0]._replace(begin=time.perf_counter())
    return kept


def _save(run: Run, state: TrainState, kept: Kept) -> None:
    if run.world.main:
        for name in ROWS:
            fsync_path(run.out / name)
    folder = run.out / "checkpoints"
    save_checkpoint(
        folder, state, run.config, run.data, kept._asdict(), run.config.train.keep_last, run.world
    )


def _on_device(run: Run, start: int, stop: int) -> Iterator[tuple[Batch, ...]]:
    rank, size = run.world.rank, run.world.size
    for micro in batches(run.features, run.train, run.config, start, stop, rank, size):
        yield to_device(micro, run.device)


def _evaluate(run: Run, state: TrainState, kept: Kept, events: Events) -> Kept:
    """What is kept, with the best value so far, this evaluation's included; the same on all ranks."""
    params = gather(state.params)
    row = {"step": int(state.step), **evaluate_held_out(run, params)}
    value = row.get("accepted_length", 1.0 + row["step"]) if row["step"] else 0.0
    if run.world.main:
        append_row(run.out / "eval.jsonl", row)
        events.on_eval(row)
        if value > kept.best or not row["step"]:
            events.on_best(params, run.frozen, row)
    return kept._replace(best=max(value, kept.best))


def _nonfinite_message(run: Run, step: int) -> str:
    chosen = indices_of(len(run.train), run.config, step)
    names = [run.features.samples[run.train[i]]["id"] for i in chosen]
    found = checkpoints(run.out / "checkpoints")
    last = f"last good checkpoint: {found[-1]}" if found else "no checkpoint was written yet"
    return (
        f"step {step + 1}: the loss or its gradient is not finite; samples {', '.join(map(str, names))}; {last}; "
        "check these samples, lower optimizer.learning_rate, or leave such updates out with --on-nonfinite skip"
    )
