"""Loss and rates over the held-out samples."""

from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch

from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Aux, Params
from eagle3fn.data.pipeline import batches
from eagle3fn.train.run import Run, to_device
from eagle3fn.train.shard import rows_of
from eagle3fn.train.track import readable


def evaluate_held_out(run: Run, params: Params) -> dict[str, Any]:
    """Loss and rates over the held-out samples, without gradients; `{}` if none are held out.

    `params` are plain. Every rank computes a block of the samples; the sum runs over all of them in their order, so
    the row is the same on any number of ranks.
    """
    if not run.held_out:
        return {}
    config = replace(run.config, data=replace(run.config.data, global_batch=1, micro_batch=1))
    config = replace(config, train=replace(config.train, seed=0))
    mine = rows_of(len(run.held_out), run.world.size, run.world.rank)
    own: list[Aux] = []
    with torch.no_grad():
        for (batch,) in batches(run.features, run.held_out, config, mine.start, mine.stop):
            _, aux = run.fns.forward_loss(params, to_device(batch, run.device))
            own.append(to_device(aux, "cpu"))
    every = [aux for part in run.world.every(own) for aux in part]
    row = readable(reduce(partial(tree_map, torch.add), every))
    row.pop("losses")
    return row
