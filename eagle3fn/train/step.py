"""`step(state, batch) → (state, metrics)`: gradients, accumulation and update as one pure function, on any ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.tree import tree_map, wide
from eagle3fn.base.types import Aux, Batch, Frozen, Params, TrainState
from eagle3fn.model.checks import check_sharing
from eagle3fn.model.forward import forward_loss
from eagle3fn.train.optimizer import make_optimizer
from eagle3fn.train.reduce import check_ranks, global_norm, over_ranks, to_shards, total
from eagle3fn.train.shard import check_placed, full_params, local, placed_like, shard, take

Metrics = dict[str, Any]


def init_state(params: Params, *, config: Config, mesh: DeviceMesh | None = None) -> TrainState:
    """The state before the first update: fp32 masters (fp64 for fp64 parameters), zero moments, step 0.

    Under a mesh every rank gives the same whole `params` and keeps its rows of each leaf.
    """
    whole = {name: value.detach() for name, value in params.items()}
    own = tree_map(torch.clone, whole) if mesh is None else shard(whole, mesh)
    masters = {name: wide(part).clone() for name, part in local(own).items()}
    moments = make_optimizer(config.optimizer, max(config.train.steps, 1)).init(masters)
    opt = type(moments)(*(placed_like(moment, own) for moment in moments))
    return TrainState(own, placed_like(masters, own), opt, torch.zeros((), dtype=torch.int64))


def step(
    state: TrainState,
    batch: Batch | tuple[Batch, ...],
    *,
    config: Config,
    frozen: Frozen,
    mesh: DeviceMesh | None = None,
    donate: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer update from a batch, or from a tuple of micro-batches whose gradients add up.

    Under `normalization = "rows"` each micro-batch's loss is divided by their number over all ranks. Under "mask" they
    are summed, and every micro-batch must carry the global `n`. Inputs are untouched, unless `donate` gives the state's
    buffers to the next one: the given state then raises when it is touched.

    Under a mesh every rank calls with its own contiguous block of the global batch's micro-batches, as many as the
    others. Parameters are gathered before the first one; no rank waits for another until its last one.

    Returns:
        The next state, placed as the given one, and metrics over the global batch, the same on all ranks: `loss` `()`,
        `aux` (`Aux`, summed), `tokens` `()` int64, `grad_norm` `()` before the clip, the `learning_rate` applied,
        and `skipped`: 1 if `train.on_nonfinite = "skip"` dropped the update, whose step is counted all the same.

    Raises:
        UserError: no micro-batch, several without `n`, `train.steps` not set, a state placed otherwise than `mesh`
            says, ranks that the reduction does not fit, or different numbers of micro-batches (off the CPU: an
            assertion of the device).
    """
    batches = (batch,) if isinstance(batch, Batch) else tuple(batch)
    world, how = 1 if mesh is None else mesh.size(), config.train.reduce
    check_sharing(batches, config, world)
    check_ranks(world, how)
    check_placed(state, mesh)
    if config.train.steps < 1:
        raise UserError(
            "train.steps = 0: the learning-rate schedule needs the number of updates; set train.steps"
        )
    loss, aux, grads = accumulate(full_params(state.params), batches, config, frozen, world)
    metrics = _metrics(loss, aux, batches, config, mesh)
    grads = to_shards({name: grads.pop(name) for name in state.masters}, mesh, how)
    norm = global_norm(grads, {name: len(leaf) for name, leaf in state.masters.items()}, mesh, how)
    before = take(state) if donate else state
    if config.train.on_nonfinite == "skip" and not bool(
        torch.isfinite(metrics["loss"]) & torch.isfinite(norm)
    ):
        dropped = {"grad_norm": norm, "learning_rate": 0.0, "skipped": 1}
        return before._replace(step=before.step + 1), metrics | dropped
    after, info = _update(before, grads, norm, config, donate)
    return after, metrics | info | {"skipped": 0}


def accumulate(
    params: Params, batches: tuple[Batch, ...], config: Config, frozen: Frozen, world: int = 1
) -> tuple[Tensor, Aux, Params]:
    """Loss, metrics and gradients over this rank's micro-batches, in fp32, or as "legacy" in bf16; no communication."""
    share = len(batches) * world if config.objective.normalization == "rows" else 1

    def scaled(inner: Params, batch: Batch) -> tuple[Tensor, Aux]:
        loss, aux = forward_loss(inner, batch, config=config, frozen=frozen)
        return loss / share, aux._replace(losses=aux.losses / share)

    def part(batch: Batch) -> tuple[Tensor, Aux, Params]:
        (loss, aux), grads = value_and_grad(scaled, has_aux=True)(params, batch)
        return loss.detach(), aux, grads if legacy else tree_map(wide, grads)

    legacy = config.optimizer.accumulation == "legacy" or len(batches) == 1
    return total(map(part, batches), len(batches), config.train.reduce)


def _metrics(
    loss: Tensor, aux: Aux, batches: tuple[Batch, ...], config: Config, mesh: DeviceMesh | None
) -> Metrics:
    """Loss, metrics and tokens over all ranks; refuses ranks with different numbers of micro-batches."""
    tokens = torch.stack([batch.attention_mask.sum() for batch in batches]).sum()
    count = torch.full_like(tokens, len(batches))
    own = loss, aux, tokens, count, count * count
    loss, aux, tokens, count, square = over_ranks(own, mesh, config.train.reduce)
    if mesh is not None:
        _check_counts(
            square * mesh.size() == count * count, len(batches), mesh
        )  # equal if and only if all counts are
    return {"loss": loss, "aux": aux, "tokens": tokens}


def _check_counts(same: Tensor, own: int, mesh: DeviceMesh) -> None:
    """Refuse ranks with different numbers of micro-batches; a device other than the CPU is not waited for, it stops."""
    told = f"step: {own} micro-batches on rank {mesh.get_local_rank()}, not as many on others; give every rank as many"
    if mesh.device_type != "cpu":
        torch._assert_async(same, told)  # pyright: ignore[reportPrivateImportUsage]
    elif not same:
        raise UserError(told)


def _update(
    state: TrainState, grads: Params, norm: Tensor, config: Config, donate: bool
) -> tuple[TrainState, dict[str, Any]]:
    parts = local(state)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    masters, opt, info = optimizer.update(
        grads, norm, parts.opt, parts.masters, int(state.step), donate
    )
    params = {}
    for name, master in masters.items():
        old = parts.params[name]
        params[name] = old.copy_(master) if donate else master.to(old.dtype)
    return placed_like(TrainState(params, masters, opt, parts.step + 1), state), info
