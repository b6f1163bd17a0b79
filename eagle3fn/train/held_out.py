"""Loss and rates over the held-out samples."""

from dataclasses import replace
from typing import Any

import torch

from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Aux, Params
from eagle3fn.data.pipeline import batches
from eagle3fn.train.run import Run, to_device
from eagle3fn.train.track import readable


def evaluate_held_out(run: Run, params: Params) -> dict[str, Any]:
    """Loss and rates over the held-out samples, without gradients; `{}` if none are held out."""
    if not run.held_out:
        return {}
    config = replace(run.config, data=replace(run.config.data, global_batch=1, micro_batch=1))
    config = replace(config, train=replace(config.train, seed=0))
    total: Aux | None = None
    with torch.no_grad():
        for (batch,) in batches(run.features, run.held_out, config, 0, len(run.held_out)):
            _, aux = run.fns.forward_loss(params, to_device(batch, config.train.device))
            total = aux if total is None else tree_map(torch.add, total, aux)
    assert total is not None
    row = readable(total)
    row.pop("losses")
    return row
