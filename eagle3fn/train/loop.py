"""The training loop: batches in, steps, held-out evaluation, checkpoints; resumed without a trace."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import locked
from eagle3fn.base.types import Batch, Frozen, Params, TrainState, VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.pipeline import batches, prefetch, sample_indices
from eagle3fn.data.target import TargetTensors
from eagle3fn.model.table import start_from_target
from eagle3fn.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.horizon import with_horizon, write_horizon
from eagle3fn.train.run import Run, prepare, to_device
from eagle3fn.train.track import append_row, cut_rows, nonfinite, step_row


class Events(NamedTuple):
    """What the loop tells its caller: each metrics row, each held-out row, and each best draft."""

    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    on_eval: Callable[[dict[str, Any]], None] = lambda row: None
    on_best: Callable[[Params, Frozen, dict[str, Any]], None] = lambda params, frozen, row: None


def train(
    config: Config,
    features: FeatureSet,
    vocab_map: VocabMap,
    target: TargetTensors,
    out: str | Path,
    minutes: float | None = None,
    events: Events = Events(),  # noqa: B008
) -> TrainState:
    """Train, or go on from the newest checkpoint in `out`; returns the last state.

    Writes `config.toml` (resolved), `horizon.json`, `metrics.jsonl`, `eval.jsonl` and `checkpoints/` into `out`. With
    `minutes`, the number of steps is chosen from a few timed steps, once: a resumed run keeps it.

    Raises:
        UserError: features, map, target and configuration don't fit together, a checkpoint of another run, another
            process training in `out`, or a loss that is not finite.
    """
    run = prepare(config, features, vocab_map, target, out)
    with locked(run.out):
        state = _first_state(run, target)
        run, chosen = with_horizon(run, state, minutes)
        state, best = _resume(run, state)
        write_horizon(run, chosen)
        for name in ("metrics.jsonl", "eval.jsonl"):
            cut_rows(run.out / name, int(state.step))
        if int(state.step) < run.config.train.steps:
            state = _steps(run, state, best, events)
        return state


def _first_state(run: Run, target: TargetTensors) -> TrainState:
    params = run.fns.init(run.config.train.seed)
    if run.config.train.init == "target":
        params = start_from_target(params, run.frozen, target.norm)
    return run.fns.init_state(params)


def _resume(run: Run, state: TrainState) -> tuple[TrainState, float]:
    """The newest checkpoint's state, or the first one; leftovers of a killed save are removed."""
    folder = run.out / "checkpoints"
    for left in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(left)
    found = checkpoints(folder)
    if not found:
        return state, 0.0
    state, extra = load_checkpoint(found[-1], state, run.config, run.data)
    return state, extra["best"]


def _steps(run: Run, state: TrainState, best: float, events: Events) -> TrainState:
    plan, start, total = run.config.train, int(state.step), run.config.train.steps
    if start == 0:
        _evaluate(run, state, 0.0, events)
    source = prefetch(_on_device(run, start, total), run.config.data.prefetch)
    with closing(source):
        for number, micro in enumerate(source, start + 1):
            begin = time.perf_counter()
            state, metrics = run.fns.step(state, micro)
            if nonfinite(metrics):
                raise UserError(_nonfinite_message(run, number - 1))
            tokens = sum(int(batch.attention_mask.sum()) for batch in micro)
            row = step_row(number, metrics, time.perf_counter() - begin, tokens)
            append_row(run.out / "metrics.jsonl", row)
            events.on_step(row, total)
            if number % plan.eval_every == 0 or number == total:
                best = _evaluate(run, state, best, events)
            if number % plan.checkpoint_every == 0 or number == total:
                extra = {"best": best, "data": run.data}
                save_checkpoint(run.out / "checkpoints", state, run.config, extra, plan.keep_last)
    return state


def _on_device(run: Run, start: int, stop: int) -> Iterator[tuple[Batch, ...]]:
    for micro in batches(run.features, run.train, run.config, start, stop):
        yield tuple(to_device(batch, run.config.train.device) for batch in micro)


def _evaluate(run: Run, state: TrainState, best: float, events: Events) -> float:
    row = {"step": int(state.step), **evaluate_held_out(run, state.params)}
    append_row(run.out / "eval.jsonl", row)
    events.on_eval(row)
    value = row.get("accepted_length", 1.0 + row["step"])
    if value > best:
        events.on_best(state.params, run.frozen, row)
        return value
    return best


def _nonfinite_message(run: Run, step: int) -> str:
    chosen = sample_indices(len(run.train), run.config.data.global_batch, run.config.train.seed, step)
    names = [run.features.samples[run.train[i]]["id"] for i in chosen]
    found = checkpoints(run.out / "checkpoints")
    last = f"last good checkpoint: {found[-1]}" if found else "no checkpoint was written yet"
    return (
        f"step {step + 1}: the loss or its gradient is not finite; samples {', '.join(map(str, names))}; {last}; "
        "check these samples, or lower optimizer.learning_rate"
    )
