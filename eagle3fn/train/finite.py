"""Whether a state is finite, leaf by leaf; a device is not waited for."""

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.tree import named_leaves
from eagle3fn.base.types import TrainState


def watched(state: TrainState) -> dict[str, Tensor]:
    """The leaves that are finite only if the whole state is: the parameters, which are cast from
    the masters, and the optimizer's floating ones. Those of specs too.
    """
    leaves = named_leaves(state._replace(masters={}))
    return {name: leaf for name, leaf in leaves.items() if leaf.dtype.is_floating_point}


def finite(leaves: Iterable[Tensor], mesh: DeviceMesh | None = None) -> Tensor:
    """Whether each floating leaf is finite on all ranks: `(L,)` bool.

    The leaves are this rank's rows, as plain tensors. One pass over each: the smallest and the
    largest value are finite only if all are, as NaN is both.
    """
    flags = []
    for _, part in groupby(leaves, key=lambda leaf: leaf.dtype):
        extremes: list[Tensor] = []
        for leaf in part:
            extremes += leaf.aminmax() if leaf.numel() else [leaf.new_zeros(())] * 2
        flags.append(torch.stack(extremes).isfinite().view(-1, 2).all(1))
    found = torch.cat(flags)

    if mesh is None or mesh.size() == 1:
        return found
    on_all = found.to(torch.uint8)
    dist.all_reduce(on_all, dist.ReduceOp.MIN, group=mesh.get_group())
    return on_all.bool()
