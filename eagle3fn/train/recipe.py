"""What a run can exchange as values: its loss, start, schedule, optimizer, mask and order.

The defaults are this package's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from eagle3fn.base.config import STARTS, Config
from eagle3fn.base.types import Frozen, Params
from eagle3fn.data.collate import AlignMask, align_mask
from eagle3fn.data.pipeline import Order, shuffled
from eagle3fn.model.forward import ForwardLoss, forward_loss
from eagle3fn.model.table import init_params, start_from_target
from eagle3fn.train.optimizer import MakeSchedule, Optimizer, cosine_schedule, named_optimizer
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
    `batch_means` are names of losses that `loss` adds to the table, as means over the whole batch:
    they cannot be split into micro-batches or ranks.
    """

    name: str = ""
    loss: ForwardLoss = forward_loss
    start: Start = start
    schedule: MakeSchedule = cosine_schedule
    optimizer: Optimizer | None = None  # None: the one that `optimizer.name` names
    align_mask: AlignMask = align_mask
    order: Order = shuffled
    batch_means: frozenset[str] = frozenset()


OURS = Recipe()
"""This package's own."""


def optimizer_of(config: Config, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer, or the one that `optimizer.name` names."""
    return recipe.optimizer or named_optimizer(config.optimizer)
