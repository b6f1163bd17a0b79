"""How many steps a run takes: as configured, as it began with, as the minutes allow, or as epochs need."""

import time
from pathlib import Path

import torch

from eagle3fn.base.config import to_dict, with_steps
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, whole_file, write_json
from eagle3fn.base.toml import to_toml
from eagle3fn.base.types import TrainState
from eagle3fn.data.pipeline import batches
from eagle3fn.train.bind import bind
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.run import Run, to_device
from eagle3fn.train.shard import gather

_TIMED_STEPS = 24
_FILE = "horizon.json"


def with_horizon(run: Run, state: TrainState, minutes: float | None) -> tuple[Run, str]:
    """The run with `train.steps` filled in, and what chose them: "steps", "minutes" or "epochs". Writes nothing.

    Raises:
        UserError: steps and minutes together, or a run that began with another choice.
    """
    plan = run.config.train
    if plan.steps and minutes is not None:
        raise UserError(
            f"--minutes and train.steps = {plan.steps} both choose the number of steps; leave one out"
        )
    chosen = "steps" if plan.steps else "epochs" if minutes is None else "minutes"
    found = run.world.shared(_begun(run.out / _FILE) if run.world.main else None)
    if found and found[1] not in (chosen, "") and chosen != "steps":
        raise UserError(
            f"{run.out / _FILE}: the run began with its steps chosen by {found[1]}, now it is {chosen}; call it as "
            "before, or train into another folder"
        )
    if plan.steps:
        steps = plan.steps
    elif found:
        steps = found[0]
    elif minutes is not None:
        steps = run.world.shared(max(1, int(minutes * 60 / seconds_per_step(run, state))))
    else:
        steps = max(1, plan.epochs * len(run.train) // run.config.data.global_batch)
    config = with_steps(run.config, steps)
    return run._replace(config=config, fns=bind(config, run.frozen, run.mesh)), chosen


def write_horizon(run: Run, chosen: str) -> None:
    """Keep the choice, and the resolved configuration, in the run's folder."""
    write_json(run.out / _FILE, {"steps": run.config.train.steps, "chosen_by": chosen})
    with whole_file(run.out / "config.toml") as temporary:
        temporary.write_text(to_toml(to_dict(run.config)))


def _begun(path: Path) -> tuple[int, str] | None:
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or type(found.get("steps")) is not int:
        raise UserError(
            f"{path}: no number of steps in it; delete it, or train into another folder"
        )
    return found["steps"], found.get("chosen_by", "")


def seconds_per_step(run: Run, state: TrainState) -> float:
    """Measured seconds of a step of average length and its share of an evaluation; the timed steps are dropped."""
    config = with_steps(run.config, _TIMED_STEPS + 1)
    fns = bind(config, run.frozen, run.mesh)
    tokens, begin = 0, time.perf_counter()
    world = run.world
    for number, micro in enumerate(
        batches(run.features, run.train, config, 0, _TIMED_STEPS + 1, world.rank, world.size)
    ):
        _, metrics = fns.step(state, to_device(micro, run.device))
        if number == 0:
            _wait(run.device)
            begin = time.perf_counter()
        else:
            tokens += int(metrics["tokens"])
    _wait(run.device)
    spent = time.perf_counter() - begin
    lengths = [run.features.samples[i].get("length") for i in run.train]
    known = [min(length, config.data.max_length) for length in lengths if length]
    per_step = (
        sum(known) / len(known) * config.data.global_batch if known else tokens / _TIMED_STEPS
    )
    begin = time.perf_counter()
    evaluate_held_out(run, gather(state.params))
    return spent * per_step / tokens + (time.perf_counter() - begin) / config.train.eval_every


def _wait(device: str) -> None:
    """A device is still at work when a step returns."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
