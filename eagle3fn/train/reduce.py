"""Sums over micro-batches and ranks: in order, or by one binary tree that the number of ranks does
not change.

The tree over `M` parts halves them while their number is even; an odd number is summed in order. A
rank holds a contiguous block of `M / ranks` parts, so for a power of two its block is a subtree,
and the ranks are the top.
"""

from collections.abc import Iterable
from functools import partial, reduce
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle3fn.base.dtypes import wide
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import pack, tree_map, unpack
from eagle3fn.base.types import Params
from eagle3fn.train.shard import gather_rows, padded, ranks_of, rows_of

# The name before torch 2.13 is `reduce_scatter_tensor`.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_add = partial(tree_map, torch.add)

T = TypeVar("T")


def total(parts: Iterable[T], count: int, reduction: str) -> T:
    """The sum of the next `count` trees of tensors, read one by one.

    At most `log2(count)` partial sums are kept.
    """
    parts = iter(parts)
    if reduction != "tree" or count % 2:
        return reduce(_add, islice(parts, count))
    left = total(parts, count // 2, reduction)
    right = total(parts, count // 2, reduction)
    return _add(left, right)


def check_ranks(world: int, reduction: str) -> None:
    """Refuse a number of ranks that the tree does not fit.

    Raises:
        UserError: `train.reduce = "tree"` on a number of ranks that is no power of two.
    """
    if reduction == "tree" and world.bit_count() != 1:
        raise UserError(
            f"train.reduce = 'tree' on {world} ranks: its sums are the same only for powers of "
            "two; start 1, 2, 4, … ranks, or set train.reduce='sum'"
        )


def over_ranks(tree: T, mesh: DeviceMesh | None, reduction: str) -> T:
    """Small tensors summed over the ranks, the same on all."""
    world, _ = ranks_of(mesh)
    if world == 1:
        return tree
    every = gather_rows(pack(tree)[None], world, mesh)
    return total((unpack(row, tree) for row in every), world, reduction)


def to_shards(grads: Params, mesh: DeviceMesh | None, reduction: str) -> Params:
    """Each rank's rows of gradients summed over the ranks in at least fp32.

    Empties `grads` as it goes.
    """
    return {name: _to_shard(wide(grads.pop(name)), mesh, reduction) for name in list(grads)}


def _to_shard(grad: Tensor, mesh: DeviceMesh | None, reduction: str) -> Tensor:
    """This rank's rows of the sum of all ranks' `grad`."""
    if mesh is None or mesh.size() == 1:
        return grad
    world, rank = ranks_of(mesh)
    rows = rows_of(len(grad), world, rank)
    block = -(-len(grad) // world)

    # Collectives want blocks of one size.
    sent = padded(grad, world * block)
    if reduction == "tree":
        # Every rank's share of this rank's rows, summed here by the tree.
        every = torch.empty_like(sent)
        dist.all_to_all_single(every, sent, group=mesh.get_group())
        summed = total(every.unflatten(0, (world, block)), world, reduction)
    else:
        summed = sent.new_empty(block, *sent.shape[1:])
        _reduce_scatter(summed, sent, group=mesh.get_group())
    return summed[: len(rows)]


def global_norm(
    grads: Params, lengths: dict[str, int], mesh: DeviceMesh | None, reduction: str
) -> Tensor:
    """The norm of all ranks' gradient shards together, `()`.

    `lengths` are the leaves' global rows, in order.

    "tree" sums squares within each row, then over all rows, halves upon halves: elementwise
    additions alone, whose bits depend neither on the number of rows a rank holds nor on its
    threads.
    """
    if reduction == "tree":
        return _norm_by_rows(grads, lengths, mesh)

    own = torch.nn.utils.get_total_norm(list(grads.values()))
    if mesh is None or mesh.size() == 1:
        return own
    squared = own.square()
    dist.all_reduce(squared, group=mesh.get_group())
    return squared.sqrt()


def _norm_by_rows(grads: Params, lengths: dict[str, int], mesh: DeviceMesh | None) -> Tensor:
    world, _ = ranks_of(mesh)

    # A sum of squares for each row of this rank's shards, padded to blocks of one size.
    blocks = [-(-lengths[name] // world) for name in grads]
    parts = []
    for grad, block in zip(grads.values(), blocks, strict=True):
        row_sums = _fold(grad.square()[..., None].flatten(1))
        parts.append(padded(row_sums, block))

    # All ranks' row sums: (ranks, Σ blocks).
    every = gather_rows(torch.cat(parts)[None], world, mesh)

    # Leaf by leaf the rows of all ranks, without the padding at the end.
    leaves = []
    for name, part in zip(grads, every.split(blocks, dim=1), strict=True):
        leaves.append(part.reshape(-1)[: lengths[name]])
    return _fold(torch.cat(leaves)[None])[0].sqrt()


def _fold(x: Tensor) -> Tensor:
    """Sums of the rows of `(R, C)`, as `(R,)`: the right half is added to the left until one column
    is left.

    Overwrites `x`.
    """
    columns = x.shape[1]
    while columns > 1:
        half = (columns + 1) // 2
        x[:, : columns - half] += x[:, half:columns]
        columns = half
    return x[:, 0]
