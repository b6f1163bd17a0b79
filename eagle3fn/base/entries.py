"""`torch.func.vmap` of a function that has no batched form: a loop over the mapped axis."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import optree
import torch
from torch import Tensor

from eagle3fn.base.errors import UserError

T = TypeVar("T")


def is_transformed() -> bool:
    """Whether this runs inside `torch.func.vmap`, `grad`, `vjp` or `jvp`."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def entry_by_entry(function: Callable[..., T], remedy: str) -> Callable[..., T]:
    """`function`, called once for each entry of a mapped axis, with the bits of those calls.

    Outside of `torch.func` it is called as it is. Under `vmap` the calls take the time of as many,
    and their results are stacked: for a moment they are held twice. Numbers among the results
    become tensors then, int64 or fp64.

    Args:
        function: of pytrees, whose tensors are its only arguments that may be mapped, to a pytree
            of tensors and numbers. Its calls must return trees of one structure.
        remedy: what to do instead of differentiating it, for the error message.

    Returns:
        The function, of positional arguments. Differentiating it raises `UserError`.
    """

    def wrapped(*args: Any) -> T:
        if not is_transformed():
            return function(*args)
        leaves, treespec = optree.tree_flatten(args)  # pyright: ignore[reportArgumentType]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        call = _Call(function, leaves, treespec, remedy)
        results = _Entries.apply(call, *tensors)
        return cast(T, optree.tree_unflatten(call.result, results))

    return wrapped


class _Call:
    """A function and its arguments without their tensors; what PyTorch's trees do not open."""

    def __init__(self, function: Callable[..., Any], leaves: list, treespec: Any, remedy: str):
        self.function = function
        self.leaves = leaves
        self.treespec = treespec
        self.remedy = remedy
        self.result: Any = None  # the structure of what the function returned

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The function's value on these tensors, as a flat tuple of tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        value = self.function(*optree.tree_unflatten(self.treespec, leaves))
        flat, self.result = optree.tree_flatten(value)
        return tuple(map(_as_tensor, flat))

    def refuse(self) -> None:
        raise UserError(f"this function has no derivative; {self.remedy}")


def _as_tensor(value: Any) -> Tensor:
    """A number as a 0-d tensor, in a dtype that keeps its value."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


class _Entries(torch.autograd.Function):
    """A `_Call` on its tensors, with a loop as the rule of `vmap`."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor):  # pyright: ignore
        return call(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any):  # pyright: ignore
        ctx.call.refuse()

    @staticmethod
    def jvp(ctx: Any, *_: Any):  # pyright: ignore
        ctx.call.refuse()

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor):  # pyright: ignore
        entries = []
        for i in range(info.batch_size):
            chosen = [
                x if dim is None else x.select(dim, i)
                for x, dim in zip(tensors, in_dims[1:], strict=True)
            ]
            entries.append(_Entries.apply(call, *chosen))
        stacked = tuple(torch.stack(column) for column in zip(*entries, strict=True))
        return stacked, (0,) * len(stacked)
