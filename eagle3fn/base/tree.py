"""Pytrees: named leaves and maps, by optree, whose order (sorted keys) is used everywhere."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import optree
import torch
from torch import Tensor

from eagle3fn.base.errors import UserError

T = TypeVar("T")


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `function` leaf by leaf to trees of one structure."""
    return optree.tree_map(function, tree, *rest)


def named_leaves(tree: Any) -> dict[str, Tensor]:
    """Leaves under dotted names, such as `masters.fc.weight` or `opt.1.mu.fc.weight`."""
    paths, leaves, _ = optree.tree_flatten_with_accessor(tree)
    names = [".".join(_entry(entry) for entry in path) for path in paths]
    return dict(zip(names, leaves, strict=True))


def check_whole(tree: Any) -> None:
    """Refuse sharded leaves: the loss is a function of plain tensors.

    Raises:
        UserError: names the first sharded leaf and `e3.gather(state)`.
    """
    for name, leaf in named_leaves(tree).items():
        if hasattr(leaf, "placements"):
            raise UserError(
                f"params: {name} is sharded over ranks; take the parameters of e3.gather(state)"
            )


def _entry(entry: Any) -> str:
    return str(entry.field) if isinstance(entry, optree.NamedTupleEntry) else str(entry.entry)


def like(tree: T, leaves: dict[str, Tensor]) -> T:
    """A tree of `tree`'s structure holding `leaves`, found by name.

    Raises:
        KeyError: a leaf of the structure is not among `leaves`.
    """
    _, treespec = optree.tree_flatten(tree)  # pyright: ignore[reportArgumentType]
    named = [leaves[name] for name in named_leaves(tree)]
    return cast(T, optree.tree_unflatten(treespec, named))


def equal(left: Any, right: Any) -> bool:
    """True if both trees have the same named leaves, tensors or arrays, bit for bit, with equal
    dtypes.
    """
    left = named_leaves(left)
    right = named_leaves(right)
    if left.keys() != right.keys():
        return False
    for name, leaf in left.items():
        other = torch.as_tensor(right[name])
        if leaf.dtype != right[name].dtype or not torch.equal(torch.as_tensor(leaf), other):
            return False
    return True


def pack(tree: Any) -> Tensor:
    """A tree's few small numbers as one fp64 vector, exactly: fp32 values, and integers below
    `2**53`.
    """
    return torch.cat([leaf.detach().reshape(-1).double() for leaf in optree.tree_leaves(tree)])


def unpack(vector: Tensor, like: T) -> T:
    """The tree of `like`'s structure, shapes and dtypes that `pack` made `vector` of."""
    leaves, treespec = optree.tree_flatten(like)  # pyright: ignore[reportArgumentType]
    parts = vector.split([leaf.numel() for leaf in leaves])
    restored = [
        part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return cast(T, optree.tree_unflatten(treespec, restored))
