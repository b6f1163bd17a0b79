"""`bind(config, frozen)`: the public functions with everything static closed over."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import OptimizerConfig
from eagle3fn.base.types import Aux, Batch, Frozen, Params, TrainState, VocabMap
from eagle3fn.data.vocab import check_map
from eagle3fn.model.checks import check_frozen, check_loss, check_packing
from eagle3fn.model.losses import LOSSES
from eagle3fn.model.named_loss import Loss, try_loss
from eagle3fn.model.table import roles
from eagle3fn.train.optimizer import Optimizer
from eagle3fn.train.recipe import OURS, Recipe, check_schedule
from eagle3fn.train.step import Metrics, init_state, step


class Functions(NamedTuple):
    """Pure functions of one configuration."""

    init: Callable[[int], Params]  # seed → the first parameters, as `train.init` says
    forward_loss: Callable[[Params, Batch], tuple[Tensor, Aux]]
    init_state: Callable[[Params], TrainState]
    # (state, batch or micro-batches, donate=False, rate=None) → the next state, metrics
    step: Callable[..., tuple[TrainState, Metrics]]


_NAMED = {  # where a configuration names what `bind` was given as a text
    "loss": "e3.ObjectiveConfig(loss={!r})",
    "optimizer": "e3.OptimizerConfig(name={!r})",
}


def bind(
    config: Config,
    frozen: Frozen,
    mesh: DeviceMesh | None = None,
    recipe: Recipe = OURS,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
) -> Functions:
    """Close configuration, frozen tensors, mesh and recipe over `init`, `forward_loss`,
    `init_state` and `step`.

    With a one-dimensional device mesh the state is sharded over its ranks, and each calls `step`
    with its own part of the batch. `init` and `forward_loss` take and return plain tensors always.
    `loss` and `optimizer` are your own, in place of those that the settings name: see
    `model.named_loss.find_loss` and `train.optimizer.Optimizer`.

    Raises:
        UserError: no such loss or schedule, a loss of your own that fails when it is tried, packed
            rows that the objective or the recipe cannot take, weight decay of parameters that the
            draft has not, the frozen tensors don't fit the configuration, or `t2d` and `d2t` name
            different tokens.
    """
    for name, given in (("loss", loss), ("optimizer", optimizer)):
        if isinstance(given, str):
            raise UserError(
                f"bind: {name} = {given!r} is a name; give a function, or the name in the "
                f"configuration, {_NAMED[name].format(given)}"
            )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise UserError(
            f"bind: optimizer is {type(optimizer).__name__}; it must be an Optimizer(init, update),"
            " such as OPTIMIZERS[name](config.optimizer)"
        )
    check_loss(config, recipe.batch_means, loss)
    check_packing(config, recipe.batch_means)
    check_schedule(config, recipe)
    _check_decay_roles(config)
    check_frozen(frozen, config)
    _try_loss(config, frozen, recipe, loss)
    if _has_values(frozen.t2d) and _has_values(frozen.d2t):
        vocab_map = VocabMap(frozen.t2d.cpu(), frozen.d2t.cpu())
        check_map(vocab_map, config.draft.vocab_size, config.draft.draft_vocab_size, "frozen")

    if loss is not None:
        with_loss: Any = recipe.loss  # takes a loss by row, where a recipe's own must not
        recipe = recipe._replace(loss=partial(with_loss, loss=loss))
    if optimizer is not None:
        recipe = recipe._replace(optimizer=optimizer)
    return Functions(
        init=partial(recipe.start, config, frozen),
        forward_loss=partial(recipe.loss, config=config, frozen=frozen),
        init_state=partial(init_state, config=config, mesh=mesh, recipe=recipe),
        step=partial(step, config=config, frozen=frozen, mesh=mesh, recipe=recipe),
    )


def _try_loss(config: Config, frozen: Frozen, recipe: Recipe, loss: Loss | None) -> None:
    """Try a user's loss, where there are values to compute with; a sum of losses may hold one."""
    name = config.objective.loss
    is_known = isinstance(name, str) and (name in LOSSES or name in recipe.batch_means)
    if _has_values(frozen.target_head) and not (loss is None and is_known):
        try_loss(config, frozen.target_head.device, loss)


def _check_decay_roles(config: Config) -> None:
    """Refuse roles that are named for weight decay, and that no parameter of the draft has."""
    named = config.optimizer.decay_roles
    if named == OptimizerConfig.decay_roles:
        return
    found = {*roles(config.draft).values()}
    for role in named:
        if role not in found:
            known = ", ".join(map(repr, sorted(found)))
            raise UserError(
                f"optimizer.decay_roles has {role!r}, and no parameter of this draft is of that "
                f"role; name some of {known}"
            )


def _has_values(x: Tensor) -> bool:
    """False for a tensor of a shape alone: on the device "meta", or a fake one."""
    return type(x) is Tensor and x.device.type != "meta"
