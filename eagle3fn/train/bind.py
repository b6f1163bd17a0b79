"""`bind(config, frozen)`: the public functions with everything static closed over."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

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
    step: Callable[..., tuple[TrainState, Metrics]]  # (state, batch or micro-batches, donate=False)


def bind(config: Config, frozen: Frozen, mesh: DeviceMesh | None = None) -> Functions:
    """Close configuration, frozen tensors and mesh over `init`, `forward_loss`, `init_state` and `step`.

    With a one-dimensional device mesh the state is sharded over its ranks, and each calls `step` with its own part of
    the batch. `init` and `forward_loss` speak of plain tensors always.

    Raises:
        UserError: the frozen tensors don't fit the configuration.
    """
    check_frozen(frozen, config)
    dtype = getattr(torch, config.train.dtype)
    return Functions(
        init=lambda seed: init_params(
            config.draft, seed, dtype, config.train.device, config.train.init
        ),
        forward_loss=partial(forward_loss, config=config, frozen=frozen),
        init_state=partial(init_state, config=config, mesh=mesh),
        step=partial(step, config=config, frozen=frozen, mesh=mesh),
    )
