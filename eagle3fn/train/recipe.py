"""What a run can exchange as values: its loss, start, schedule, optimizer, mask and order.

The defaults are this package's own.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import STARTS, OptimizerConfig
from eagle3fn.base.types import Frozen, Params
from eagle3fn.data.collate import AlignMask, align_mask
from eagle3fn.data.order import Order, shuffled
from eagle3fn.model.forward import ForwardLoss, forward_loss
from eagle3fn.model.table import init_params, start_from_target
from eagle3fn.train.optimizer import Optimizer, named_optimizer, own_optimizer
from eagle3fn.train.schedules import (
    MakeSchedule,
    Schedule,
    find_schedule,
    made_schedule,
    named_schedule,
)
from eagle3fn.train.warm_start import start_from_draft

Start = Callable[[Config, Frozen, int], Params]
"""As `start`: `(config, frozen, seed)` → the draft's first parameters."""


def start(config: Config, frozen: Frozen, seed: int) -> Params:
    """The draft's first parameters: `train.init` draws them all, takes head, norm and projection
    from the target, or takes all from a draft's folder.

    Raises:
        UserError: `train.init = "target"` with nothing to take (see `start_from_target`), or a
            folder whose draft is not the run's (see `start_from_draft`).
    """
    if config.train.init not in STARTS:
        return start_from_draft(config, frozen, config.train.init)
    dtype = getattr(torch, config.train.dtype)
    params = init_params(config.draft, seed, dtype, config.train.device)
    if config.train.init == "target":
        params = start_from_target(params, frozen)
    return params


class Recipe(NamedTuple):
    """The exchangeable functions of a run; `bind`, `step` and `train` take one.

    A checkpoint keeps the name: a run is resumed under the recipe that it began with.
    `batch_means` are names of losses that `loss` adds to the table, with the settings that they
    read. They are means over the whole batch, which cannot be split into micro-batches or ranks.
    """

    name: str = ""
    loss: ForwardLoss = forward_loss
    start: Start = start
    schedule: MakeSchedule | None = None  # None: the one that `optimizer.schedule` names
    optimizer: Optimizer | None = None  # None: the one that `optimizer.name` names
    align_mask: AlignMask = align_mask
    order: Order = shuffled
    batch_means: Mapping[str, tuple[str, ...]] = MappingProxyType({})


OURS = Recipe()
"""This package's own."""


def optimizer_of(config: Config, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer, or the one that `optimizer.name` names."""
    if recipe.optimizer is None:
        return named_optimizer(config.optimizer)
    return own_optimizer(recipe.optimizer, "the optimizer")


def schedule_of(config: Config, recipe: Recipe) -> Schedule:
    """The recipe's schedule, or the one that `optimizer.schedule` names.

    Raises:
        UserError: as `check_schedule`, or `train.steps` is not set.
    """
    _check_unread(config, recipe)
    return made_schedule(recipe.schedule or named_schedule, config.optimizer, config.train.steps)


def check_schedule(config: Config, recipe: Recipe) -> None:
    """Check that the schedule is there, and with the run's number of steps its first rate.

    Where `train.steps` is not chosen yet, a user's function is not called: it would be asked for a
    run of another length.

    Raises:
        UserError: no such schedule, one that gives no rate, or one is named that the recipe does
            not read.
    """
    _check_unread(config, recipe)
    if recipe.schedule is None and config.train.steps:
        schedule_of(config, recipe)(0)
    elif recipe.schedule is None:
        find_schedule(config.optimizer)


def _check_unread(config: Config, recipe: Recipe) -> None:
    named = config.optimizer.schedule
    if recipe.schedule is not None and named != OptimizerConfig.schedule:
        raise UserError(
            f"optimizer.schedule = {named!r}: the recipe {recipe.name!r} has a schedule of its "
            "own; leave the setting out, or train without the recipe"
        )
