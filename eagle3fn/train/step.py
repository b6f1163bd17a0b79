"""`step(state, batch) → (state, metrics)`: gradients, accumulation and update as one pure function."""

from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Aux, Batch, Frozen, Params, TrainState
from eagle3fn.model.checks import check_sharing
from eagle3fn.model.forward import forward_loss
from eagle3fn.train.optimizer import make_optimizer

Metrics = dict[str, Any]


def init_state(params: Params, *, config: Config) -> TrainState:
    """The state before the first update: fp32 masters (fp64 for fp64 parameters), zero moments, step 0."""
    masters = {name: _wide(value.detach()).clone() for name, value in params.items()}
    opt = make_optimizer(config.optimizer, max(config.train.steps, 1)).init(masters)
    own = {name: value.detach().clone() for name, value in params.items()}
    return TrainState(own, masters, opt, torch.zeros((), dtype=torch.int64))


def step(
    state: TrainState, batch: Batch | tuple[Batch, ...], *, config: Config, frozen: Frozen
) -> tuple[TrainState, Metrics]:
    """One optimizer update from a batch, or from a tuple of micro-batches whose gradients add up.

    Under `normalization = "rows"` each micro-batch's loss is divided by their number. Under "mask" they are
    summed, and every micro-batch must carry the global `n`. Inputs are untouched.

    Returns:
        The next state, and metrics: `loss` `()`, `aux` (`Aux`, summed), `grad_norm` `()` before the clip, and the
        `learning_rate` applied.

    Raises:
        UserError: no micro-batch, several without `n`, or `train.steps` not set.
    """
    batches = (batch,) if isinstance(batch, Batch) else tuple(batch)
    check_sharing(batches, config)
    if config.train.steps < 1:
        raise UserError("train.steps = 0: the learning-rate schedule needs the number of updates; set train.steps")
    loss, aux, grads = accumulate(state.params, batches, config, frozen)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    grads = {name: _wide(grads[name]) for name in state.masters}
    masters, opt, info = optimizer.update(grads, state.opt, state.masters, int(state.step))
    params = {name: master.to(state.params[name].dtype) for name, master in masters.items()}
    return TrainState(params, masters, opt, state.step + 1), {"loss": loss, "aux": aux} | info


def accumulate(
    params: Params, batches: tuple[Batch, ...], config: Config, frozen: Frozen
) -> tuple[Tensor, Aux, Params]:
    """Loss, metrics and gradients over micro-batches, summed in order; gradients in fp32, or as "legacy" in bf16."""
    share = len(batches) if config.objective.normalization == "rows" else 1

    def scaled(inner: Params, batch: Batch) -> tuple[Tensor, Aux]:
        loss, aux = forward_loss(inner, batch, config=config, frozen=frozen)
        return loss / share, aux._replace(losses=aux.losses / share)

    legacy = config.optimizer.accumulation == "legacy" or len(batches) == 1
    total = None
    for batch in batches:
        (loss, aux), grads = value_and_grad(scaled, has_aux=True)(params, batch)
        part = loss.detach(), aux, grads if legacy else tree_map(_wide, grads)
        total = part if total is None else tree_map(torch.add, total, part)
    assert total is not None
    return total


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
