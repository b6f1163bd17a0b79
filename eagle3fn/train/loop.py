"""The training loop: batches in, steps, held-out evaluation, checkpoints; resumed without a trace."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.config import Config, to_toml, with_steps
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Aux, Batch, Frozen, Params, TrainState, VocabMap
from eagle3fn.data.features import FeatureSet
from eagle3fn.data.pipeline import batches, prefetch, sample_indices, split
from eagle3fn.data.target import TargetTensors
from eagle3fn.model.table import start_from_target
from eagle3fn.train.bind import Functions, bind
from eagle3fn.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from eagle3fn.train.track import append_row, cut_rows, nonfinite, readable, step_row

_TIMED_STEPS = 24


class Events(NamedTuple):
    """What the loop tells its caller: each metrics row, each held-out row, and each best draft's parameters."""

    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    on_eval: Callable[[dict[str, Any]], None] = lambda row: None
    on_best: Callable[[Params, dict[str, Any]], None] = lambda params, row: None


class Run(NamedTuple):
    """Everything that stays the same during a run."""

    config: Config
    frozen: Frozen
    fns: Functions
    features: FeatureSet
    train: list[int]
    held_out: list[int]
    out: Path
    data: str  # fingerprint of features and vocabulary map


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

    Writes `config.toml` (resolved), `metrics.jsonl`, `eval.jsonl` and `checkpoints/` into `out`. With `minutes`,
    the number of steps is chosen from a few timed steps, once: a resumed run keeps it.

    Raises:
        UserError: features, map, target and configuration don't fit together, a checkpoint of another run, or a
            loss that is not finite.
    """
    run = prepare(config, features, vocab_map, target, out)
    state = _first_state(run, target)
    run = _with_horizon(run, state, minutes)
    state, best = _resume(run, state)
    start = int(state.step)
    total = run.config.train.steps
    if start < total:
        state = _steps(run, state, best, events)
    return state


def prepare(config: Config, features: FeatureSet, vocab_map: VocabMap, target: TargetTensors, out: str | Path) -> Run:
    """Check that all parts fit together and bind the functions."""
    own = config.draft.hidden_size != config.draft.target_hidden_size
    dtype, device = getattr(torch, config.train.dtype), config.train.device
    place = lambda x: x.to(device, dtype)  # noqa: E731
    frozen = Frozen(
        None if own else place(target.embed_tokens),
        place(target.head),
        vocab_map.t2d.to(device),
        vocab_map.d2t.to(device),
    )
    kept, held_out = split(len(features.samples), config.data.held_out)
    return Run(
        config, frozen, bind(config, frozen), features, kept, held_out, Path(out), fingerprint(features, vocab_map)
    )


def fingerprint(features: FeatureSet, vocab_map: VocabMap) -> str:
    """Hash of what a run reads: the features' own fingerprint, their samples, and the vocabulary map."""
    names = [sample["id"] for sample in features.samples]
    text = json.dumps([features.index.get("fingerprint"), names])
    return hashlib.sha256(text.encode() + vocab_map.t2d.cpu().numpy().tobytes()).hexdigest()


def evaluate_held_out(run: Run, params: Params) -> dict[str, Any]:
    """Loss and rates over the held-out samples, without gradients; `{}` if none are held out."""
    if not run.held_out:
        return {}
    config = replace(run.config, data=replace(run.config.data, global_batch=1, micro_batch=1))
    config = replace(config, train=replace(config.train, seed=0))
    total: Aux | None = None
    with torch.no_grad():
        for (batch,) in batches(run.features, run.held_out, config, 0, len(run.held_out)):
            _, aux = run.fns.forward_loss(params, to_device(batch, config.train.device))
            total = aux if total is None else tree_map(torch.add, total, aux)
    assert total is not None
    row = readable(total)
    row.pop("losses")
    return row


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with every tensor on `device`."""
    return Batch(*(None if value is None else value.to(device) for value in batch))  # pyright: ignore[reportArgumentType]


def _first_state(run: Run, target: TargetTensors) -> TrainState:
    params = run.fns.init(run.config.train.seed)
    if run.config.train.init == "target":
        params = start_from_target(params, run.frozen, target.norm)
    return run.fns.init_state(params)


def _with_horizon(run: Run, state: TrainState, minutes: float | None) -> Run:
    """Fill in `train.steps`: as configured, as the run began with, as `minutes` allow, or as epochs need."""
    path = run.out / "horizon.json"
    if run.config.train.steps:
        steps = run.config.train.steps
    elif path.exists():
        steps = json.loads(path.read_text())["steps"]
    elif minutes is not None:
        steps = max(1, int(minutes * 60 / seconds_per_step(run, state)))
    else:
        steps = max(1, run.config.train.epochs * len(run.train) // run.config.data.global_batch)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"steps": steps}) + "\n")
    config = with_steps(run.config, steps)
    with whole_file(run.out / "config.toml") as temporary:
        temporary.write_text(to_toml(config))
    return run._replace(config=config, fns=bind(config, run.frozen))


def seconds_per_step(run: Run, state: TrainState) -> float:
    """Measured seconds of a step of average length and its share of an evaluation; the timed steps are dropped."""
    config = with_steps(run.config, _TIMED_STEPS + 1)
    fns = bind(config, run.frozen)
    tokens, begin = 0, time.perf_counter()
    for number, micro in enumerate(_on_device(run._replace(config=config), 0, _TIMED_STEPS + 1)):
        fns.step(state, micro)
        if number == 0:
            begin = time.perf_counter()
        else:
            tokens += sum(int(batch.attention_mask.sum()) for batch in micro)
    spent = time.perf_counter() - begin
    lengths = [run.features.samples[i].get("length") for i in run.train]
    known = [min(length, config.data.max_length) for length in lengths if length]
    per_step = sum(known) / len(known) * config.data.global_batch if known else tokens / _TIMED_STEPS
    begin = time.perf_counter()
    evaluate_held_out(run, state.params)
    return spent * per_step / tokens + (time.perf_counter() - begin) / config.train.eval_every


def _resume(run: Run, state: TrainState) -> tuple[TrainState, float]:
    found = checkpoints(run.out / "checkpoints")
    best = 0.0
    if found:
        state, extra = load_checkpoint(found[-1], state, run.config, run.data)
        best = extra["best"]
    for name in ("metrics.jsonl", "eval.jsonl"):
        cut_rows(run.out / name, int(state.step))
    return state, best


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
        events.on_best(state.params, row)
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
