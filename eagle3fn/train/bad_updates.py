"""Updates and states that are not finite: what ends a run, and in which words."""

import math
from typing import Any

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import TrainState
from eagle3fn.data.pipeline import ordered
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.finite import finite, watched
from eagle3fn.train.run import Run
from eagle3fn.train.shard import local, specs

# A damaged sample is met once an epoch. So many dropped updates, one after the other, mean that
# the rate or the state is at fault, and a run that goes on would train nothing.
MOST_DROPPED = 20


def check_first(run: Run, state: TrainState) -> None:
    """Refuse a first state that is not finite; all ranks call.

    Raises:
        UserError: names the tensor.
    """
    init = run.config.train.init
    mend = "mend the tensors that it is taken from, or set train.init='random'"
    if init == "random":
        mend = "lower draft.initializer_range, or mend the recipe that makes it"
    found = finite(watched(local(state)).values(), run.mesh)
    if not found.all():
        raise UserError(
            f"train.init = {init!r}: the first {_named(run, found)} NaN or infinity; {mend}"
        )


def check_update(run: Run, number: int, metrics: dict[str, Any]) -> None:
    """Refuse an update that was made and is not finite, or that made the state so.

    Raises:
        UserError: names step, samples or tensor, and the last good checkpoint.
    """
    if metrics["skipped"]:
        return
    skip = "or leave such updates out with --on-nonfinite skip"
    if not bool(torch.isfinite(metrics["loss"]) & torch.isfinite(metrics["grad_norm"])):
        raise UserError(
            f"step {number}: the loss or its gradient is not finite; samples "
            f"{_samples(run, number)}; {_last_good(run)}; check these samples, lower "
            f"optimizer.learning_rate, {skip}"
        )
    if not bool(metrics["finite"].all()):
        raise UserError(
            f"step {number}: after an update whose loss and gradient are finite "
            f"{_named(run, metrics['finite'])} NaN or infinity; {_last_good(run)}; lower "
            f"optimizer.learning_rate or optimizer.max_grad_norm, {skip}"
        )


def check_held_out(run: Run, row: dict[str, Any]) -> None:
    """Refuse a state whose held-out loss is not finite, though its values are.

    `row` is that of an evaluation; without held-out samples it has no loss.

    Raises:
        UserError: names the step and the last good checkpoint.
    """
    if math.isfinite(row.get("loss", 0.0)):
        return
    step = row["step"]
    if step == 0:
        raise UserError(
            "step 0: the held-out loss is not finite before any update; check the held-out samples "
            f"(the last data.held_out = {len(run.held_out)}) and train.init, or set "
            "train.dtype='float32'"
        )
    raise UserError(
        f"step {step}: the held-out loss is not finite; {_last_good(run)}; lower "
        "optimizer.learning_rate"
    )


def dropped_line(skipped: int) -> str:
    """One line on the updates that a run has dropped."""
    updates = "1 update was" if skipped == 1 else f"{skipped} updates were"
    return (
        f"{updates} dropped (train.on_nonfinite = 'skip'): the loss, gradient or state was not "
        "finite; metrics.jsonl has no loss at these steps"
    )


def check_dropped(run: Run, number: int, in_a_row: int) -> None:
    """End a run whose updates are all dropped, one after the other.

    Raises:
        UserError: `MOST_DROPPED` of them, or as many as the run has.
    """
    if in_a_row >= min(MOST_DROPPED, run.config.train.steps):
        raise UserError(
            f"step {number}: the last {in_a_row} updates were all dropped, as their loss, gradient "
            f"or state was not finite; samples of this one {_samples(run, number)}; "
            f"{_last_good(run)}; lower optimizer.learning_rate, or mend the features"
        )


def _named(run: Run, found: torch.Tensor) -> str:
    """The leaves that are not finite, as a subject and its verb."""
    names = watched(specs(run.config, 1, 0, run.recipe))
    bad = [name for name, good in zip(names, found.tolist(), strict=True) if not good]
    if len(bad) == 1:
        return f"{bad[0]} holds"
    return f"{bad[0]} and {len(bad) - 1} more tensors hold"


def _samples(run: Run, number: int) -> str:
    step = number - 1 + run.shift
    chosen = ordered(run.train, run.config, step, step + 1, run.recipe.order)
    return ", ".join(str(run.features.samples[sample]["id"]) for sample, _ in chosen)


def _last_good(run: Run) -> str:
    found = checkpoints(run.out / "checkpoints")
    return f"last good checkpoint: {found[-1]}" if found else "no checkpoint was written yet"
