"""`step(state, batch) → (state, metrics)`: gradients, accumulation and update as one pure function,
on any ranks.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.config import Config
from eagle3fn.base.dtypes import wide
from eagle3fn.base.entries import entry_by_entry, is_transformed
from eagle3fn.base.errors import UserError
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.sections import HIGHEST_RATE
from eagle3fn.base.tree import named_leaves, tree_map
from eagle3fn.base.types import Aux, Batch, Frozen, Params, TrainState
from eagle3fn.model.checks import check_micro_batches
from eagle3fn.model.forward import ForwardLoss, forward_loss
from eagle3fn.train.finite import finite, watched
from eagle3fn.train.optimizer import Optimizer, UpdateInfo, clip
from eagle3fn.train.recipe import OURS, Recipe, optimizer_of, schedule_of
from eagle3fn.train.reduce import check_ranks, global_norm, over_ranks, to_shards, total
from eagle3fn.train.shard import (
    check_placed,
    full_params,
    leaves_of,
    local,
    on_whole,
    own_rows,
    place,
    ranks_of,
    state_of,
    take,
)

Metrics = dict[str, Any]
"""What `step` reports of an update, by name."""

_DROPPED = {"learning_rate": 0.0, "skipped": 1}
"""What the metrics of a dropped update say."""

_NO_DERIVATIVE = (
    "step has no derivative; differentiate forward_loss under objective.numerics = 'plain' and an "
    "update of your own, or detach the state"
)


def init_state(
    params: Params, *, config: Config, mesh: DeviceMesh | None = None, recipe: Recipe = OURS
) -> TrainState:
    """The state before the first update: fp32 masters (fp64 for fp64 parameters), the optimizer's
    first state, step 0.

    Under a mesh every rank gives the same whole `params` and keeps its rows of each leaf.
    """
    own = own_rows(params, *ranks_of(mesh))
    whole = {name: value.to("meta") for name, value in params.items()}
    return place(state_of(own, config, recipe), state_of(whole, config, recipe), mesh)


def step(
    state: TrainState,
    batch: Batch | tuple[Batch, ...],
    *,
    config: Config,
    frozen: Frozen,
    mesh: DeviceMesh | None = None,
    donate: bool = False,
    recipe: Recipe = OURS,
    rate: float | Tensor | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer update from a batch, or from a tuple of micro-batches whose gradients add up.

    Under `normalization = "rows"` each micro-batch's loss is divided by their number over all
    ranks. Under "mask" they are summed, and every micro-batch must carry the global `row_counts`.
    Inputs are untouched, unless `donate` gives the state's buffers to the next one: the given state
    then raises when it is touched. `rate`, a number or a 0-d tensor, replaces the schedule's
    learning rate; a tensor on a device is waited for.

    Under a mesh every rank calls with its own contiguous block of the global batch's micro-batches,
    as many as the others. Parameters are gathered before the first one; no rank waits for another
    until its last one.

    Under `torch.func.vmap`, over states, batches or rates, entries are updated one after another,
    to the same bits: `N` take the time of `N` steps and the memory of `2 N` states, and the numbers
    among the metrics are tensors.

    Returns:
        The next state, placed as the given one, and metrics over the global batch, the same on all
        ranks: `loss` `()`, `aux` (`Aux`, summed), `tokens` `()` int64, `grad_norm` `()` before the
        clip, the `learning_rate` applied, `finite` `(L,)` bool, whether each leaf of the updated
        state is (`train.finite.watched` names them), and `skipped`: 1 if `train.on_nonfinite =
        "skip"` dropped the update, whose step is counted all the same.

    Raises:
        UserError: no micro-batch, several without `row_counts`, `train.steps` not set, a state
            placed otherwise than `mesh` says or one that is differentiated, ranks that the
            reduction does not fit, or different numbers of micro-batches (off the CPU: an assertion
            of the device); donation or a mesh under `torch.func`.
    """
    if is_transformed() and (donate or mesh is not None):
        given = "donate=True" if donate else "a mesh"
        raise UserError(f"step: {given} does not go under torch.func; leave it out")
    if isinstance(rate, Tensor) and rate.ndim:
        raise UserError(
            f"step: rate has shape {tuple(rate.shape)}; it must be a number: map step over rates "
            "by torch.func.vmap"
        )
    if any(getattr(leaf, "requires_grad", False) for leaf in named_leaves((state, rate)).values()):
        raise UserError(_NO_DERIVATIVE)

    # Detached: a module's parameters among them would make what vmap returns require a gradient.
    frozen = tree_map(Tensor.detach, frozen)
    batches = (batch,) if isinstance(batch, Batch) else tuple(batch)
    update = partial(_step, config=config, mesh=mesh, donate=donate, recipe=recipe)
    return entry_by_entry(update, _NO_DERIVATIVE)(state, batches, frozen, rate)


def _step(
    state: TrainState,
    batches: tuple[Batch, ...],
    frozen: Frozen,
    rate: float | Tensor | None,
    config: Config,
    mesh: DeviceMesh | None,
    donate: bool,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    # Refuse what does not fit, before any work.
    world, _ = ranks_of(mesh)
    reduction = config.train.reduce
    check_micro_batches(batches, config, world, recipe.batch_means)
    check_ranks(world, reduction)
    check_placed(state, mesh)
    number = int(state.step)
    if rate is None:
        rate = schedule_of(config, recipe)(number)
    rate = float(rate)
    if not abs(rate) <= HIGHEST_RATE:
        raise UserError(
            f"step: the learning rate of update {number + 1} is {rate}: must be finite and at most "
            f"{HIGHEST_RATE:g}; give another rate, or mend the schedule"
        )

    # This rank's gradients, then each rank's rows of all ranks' sum.
    params = full_params(state.params)
    loss, aux, grads = accumulate(params, batches, config, frozen, world, recipe.loss)
    metrics = _metrics(loss, aux, batches, config, mesh)
    # In the table's order, on which the norm's bits depend; popped, so that each gradient is freed
    # when it is summed.
    grads = to_shards({name: grads.pop(name) for name in state.masters}, mesh, reduction)

    # One norm of the whole gradient, the same on all ranks.
    rows = {name: len(leaf) for name, leaf in state.masters.items()}
    norm = global_norm(grads, rows, mesh, reduction)
    metrics |= {"grad_norm": norm, "learning_rate": rate, "skipped": 0}

    # Drop an update that is not finite, where that is wanted.
    before = take(state, mesh) if donate else state
    parts = local(before)
    skips = config.train.on_nonfinite == "skip"
    dropped = before._replace(step=before.step + 1)
    if skips and not _is_finite(metrics["loss"], norm):
        kept = torch.ones(len(watched(parts)), dtype=torch.bool, device=norm.device)
        return dropped, metrics | {"finite": kept} | _DROPPED

    # The optimizer's update of this rank's rows. The state before it is written into only if the
    # update will not be dropped.
    overwrite = donate and not skips
    grads = clip(grads, norm, config.optimizer.max_grad_norm, donate)
    leaves = leaves_of(config)
    info = UpdateInfo(number, rate, leaves, partial(on_whole, leaves=leaves, mesh=mesh), overwrite)
    after = _updated(parts, grads, info, optimizer_of(config, recipe))

    # A finite gradient can make a state that is not, by its rate or its square.
    metrics["finite"] = finite(watched(after).values(), mesh)
    if skips and not metrics["finite"].all():
        return dropped, metrics | _DROPPED
    return place(after, before, mesh), metrics


def _updated(
    parts: TrainState, grads: Params, info: UpdateInfo, optimizer: Optimizer
) -> TrainState:
    """The state after an update: new masters and moments, and the parameters cast from these."""
    masters, opt = optimizer.update(grads, parts.opt, parts.masters, info)

    params = {}
    for name, master in masters.items():
        old = parts.params[name]
        params[name] = old.copy_(master) if info.donate else master.to(old.dtype)
    return TrainState(params, masters, opt, parts.step + 1)


def _is_finite(loss: Tensor, norm: Tensor) -> bool:
    return bool(torch.isfinite(loss) & torch.isfinite(norm))


def accumulate(
    params: Params,
    batches: tuple[Batch, ...],
    config: Config,
    frozen: Frozen,
    world: int = 1,
    loss_of: ForwardLoss = forward_loss,
) -> tuple[Tensor, Aux, Params]:
    """Loss, metrics and gradients summed over this rank's micro-batches; no communication.

    Several gradients are summed in at least fp32, or under `accumulation = "params"` in the
    parameters' dtype; one alone keeps it.
    """
    # Under "rows" each micro-batch's loss is a mean over its own rows: their mean is that of the
    # global batch.
    share = len(batches) * world if config.objective.normalization == "rows" else 1
    keeps_dtype = config.optimizer.accumulation == "params" or len(batches) == 1

    def scaled(inner: Params, batch: Batch) -> tuple[Tensor, Aux]:
        loss, aux = loss_of(inner, batch, config=config, frozen=frozen)
        return loss / share, aux._replace(losses=aux.losses / share)

    def part(batch: Batch) -> tuple[Tensor, Aux, Params]:
        (loss, aux), grads = value_and_grad(scaled, has_aux=True)(params, batch)
        return loss.detach(), aux, grads if keeps_dtype else tree_map(wide, grads)

    return total(map(part, batches), len(batches), config.train.reduce)


class _Sums(NamedTuple):
    """What is summed over the ranks."""

    loss: Tensor
    aux: Aux
    tokens: Tensor
    batches: Tensor  # () int64: micro-batches of a rank
    squared_batches: Tensor


def _metrics(
    loss: Tensor, aux: Aux, batches: tuple[Batch, ...], config: Config, mesh: DeviceMesh | None
) -> Metrics:
    """Loss, metrics and tokens over all ranks.

    Refuses ranks with different numbers of micro-batches.
    """
    tokens = torch.stack([batch.attention_mask.sum() for batch in batches]).sum()
    count = torch.full_like(tokens, len(batches))
    sums: _Sums = over_ranks(
        _Sums(loss, aux, tokens, count, count * count), mesh, config.train.reduce
    )
    if mesh is not None:
        # By Cauchy-Schwarz: ranks · Σ count² = (Σ count)² if and only if all counts are equal.
        same = sums.squared_batches * mesh.size() == sums.batches * sums.batches
        _check_counts(same, len(batches), mesh)
    return {"loss": sums.loss, "aux": sums.aux, "tokens": sums.tokens}


def _check_counts(same: Tensor, own: int, mesh: DeviceMesh) -> None:
    """Refuse ranks with different numbers of micro-batches.

    A device other than the CPU is not waited for, it stops.
    """
    message = (
        f"step: {own} micro-batches on rank {mesh.get_local_rank()}, not as many on others; "
        "give every rank as many"
    )
    if mesh.device_type != "cpu":
        torch._assert_async(same, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not same:
        raise UserError(message)
