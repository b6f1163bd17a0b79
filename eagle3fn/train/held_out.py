"""Loss and rates over the held-out samples."""

from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.device import to_device
from eagle3fn.base.errors import UserError
from eagle3fn.base.signals import StopRequested
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Aux, Params
from eagle3fn.data.order import shuffled
from eagle3fn.data.pipeline import batches
from eagle3fn.train.run import Run
from eagle3fn.train.shard import rows_of
from eagle3fn.train.track import readable


def evaluate_held_out(run: Run, params: Params) -> dict[str, Any]:
    """Loss and rates over the held-out samples, without gradients; `{}` if none are held out.

    `params` are plain. Every rank computes a block of the samples; the sum runs over all of them in
    their order, so the row is the same on any number of ranks.

    Returns:
        `loss` is the objective's `Σ decay^i · L_i` and `losses` its `L_i`, each a mean over the
        trained rows of all held-out samples (under `normalization = "rows"`: over all their rows);
        the rates are those of `readable`. A loss that is a mean over a batch is averaged over the
        samples, by their known rows.

    Raises:
        UserError: this rank's sources have failed, or another's.
        StopRequested: a signal came to a rank, and its samples did not; on all ranks.
    """
    if not run.held_out:
        return {}

    # One sample a batch, each once, in the same order whatever the seed, packing and the recipe: so
    # a step is a sample, and this rank's steps are its block of them.
    data = replace(run.config.data, global_batch=1, micro_batch=1, pack_tokens=0)
    every_row = replace(run.config.objective, survival=1.0)
    train = replace(run.config.train, seed=0)
    config = replace(run.config, objective=every_row, data=data, train=train)
    mine = rows_of(len(run.held_out), run.world.size, run.world.rank)
    read = partial(batches, align_mask=run.recipe.align_mask, order=shuffled)
    samples = read(run.features, run.held_out, config, mine.start, mine.stop)

    # A sample's losses are means over its rows: back to sums, which add up.
    own: list[tuple[Aux, Tensor]] = []
    fault: UserError | None = None
    try:
        with torch.no_grad():
            for (batch,) in samples:
                _, aux = run.fns.forward_loss(params, to_device(batch, run.device))
                aux = to_device(aux, "cpu")
                count = _averaged_rows(aux, run, batch.attention_mask.numel())
                own.append((aux._replace(losses=aux.losses * count), count))
    except UserError as error:
        if run.features.on_demand is None:
            raise
        fault = error  # of a rank's sources: all ranks leave together, and save before

    # Over all ranks, in the samples' order. A fault of one comes before a stop of another.
    stops = isinstance(fault, StopRequested)
    shared = run.world.every((own, None if fault is None or stops else str(fault), stops))
    if fault is not None and not stops:
        raise fault
    for rank, (_, text, _) in enumerate(shared):
        if text is not None:
            raise UserError(f"rank {rank}: {text}")
    if any(other for _, _, other in shared):
        raise StopRequested(str(fault) if stops else "stopped, as another rank was")
    every = [part for parts, _, _ in shared for part in parts]
    total, count = reduce(partial(tree_map, torch.add), every)
    losses = total.losses / count.clamp_min(1e-8)
    decay = run.config.objective.decay
    loss = sum(decay**step * value for step, value in enumerate(losses.tolist()))
    return {"loss": loss} | readable(total._replace(losses=losses))


def _averaged_rows(aux: Aux, run: Run, places: int) -> Tensor:
    """By how many rows each of a sample's step losses was divided: `(K,)`; 0 where it has none."""
    if run.config.objective.loss in run.recipe.batch_means:
        return aux.accept_rows
    if run.config.objective.normalization == "rows":
        return torch.full_like(aux.losses, places)
    return aux.rows.to(aux.losses.dtype)
