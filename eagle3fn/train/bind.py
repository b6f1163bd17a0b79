"""`bind(config, frozen)`: the public functions with everything static closed over."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.types import Aux, Batch, Frozen, Params, TrainState
from eagle3fn.model.checks import check_frozen
from eagle3fn.model.forward import forward_loss
from eagle3fn.model.table import init_params
from eagle3fn.train.step import Metrics, init_state, step


class Functions(NamedTuple):
    """Pure functions of one configuration."""

    init: Callable[[int], Params]
    forward_loss: Callable[[Params, Batch], tuple[Tensor, Aux]]
    init_state: Callable[[Params], TrainState]
    step: Callable[[TrainState, Batch | tuple[Batch, ...]], tuple[TrainState, Metrics]]


def bind(config: Config, frozen: Frozen) -> Functions:
    """Close configuration and frozen tensors over `init`, `forward_loss`, `init_state` and `step`.

    Raises:
        UserError: the frozen tensors don't fit the configuration.
    """
    check_frozen(frozen, config)
    dtype = getattr(torch, config.train.dtype)
    return Functions(
        init=lambda seed: init_params(config.draft, seed, dtype, config.train.device),
        forward_loss=partial(forward_loss, config=config, frozen=frozen),
        init_state=partial(init_state, config=config),
        step=partial(step, config=config, frozen=frozen),
    )
