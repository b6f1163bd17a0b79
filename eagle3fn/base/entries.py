"""`torch.func.vmap` of a function that has no batched form: a loop over the mapped axis."""

from collections.abc import Callable
from itertools import compress
from typing import Any, TypeVar, cast

import optree
import torch
from torch import Tensor

from eagle3fn.base.errors import UserError

T = TypeVar("T")


def is_transformed() -> bool:
    """Whether this runs inside `torch.func.vmap`, `grad`, `vjp` or `jvp`."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore


def is_mapped(tree: Any) -> bool:
    """Whether a tensor of the tree is batched by a `vmap` around this call."""
    functorch: Any = torch._C._functorch  # pyright: ignore

    def batched(x: Tensor) -> bool:
        while functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_batchedtensor(x):
                return True
            x = functorch.get_unwrapped(x)
        return False

    return any(batched(leaf) for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))


def entry_by_entry(
    function: Callable[..., T], refusal: str, once: bool = False
) -> Callable[..., T]:
    """`function`, called once for each entry of a mapped axis, with the bits of those calls.

    Outside of `torch.func` it is called as it is. Under `vmap` the calls take the time of as many,
    and their results are stacked: for a moment they are held twice. Numbers among the results
    become tensors then, int64 or fp64.

    Args:
        function: of pytrees, whose tensors are its only arguments that may be mapped, to a pytree
            of tensors and numbers. Its calls must return trees of one structure.
        refusal: one sentence for who differentiates it: that it cannot be, and what to do instead.
        once: it can be differentiated once; its backward calls the function again.

    Returns:
        The function, of positional arguments. Differentiating it, or its gradient, raises
        `UserError`.
    """

    def wrapped(*args: Any) -> T:
        if not is_transformed():
            return function(*args)
        leaves, treespec = optree.tree_flatten(args)  # pyright: ignore[reportArgumentType]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        call = _Call(function, leaves, treespec, refusal, once)
        results = _Entries.apply(call, *tensors)
        return cast(T, optree.tree_unflatten(call.result, results))

    return wrapped


class _Call:
    """A function and its arguments without their tensors; what PyTorch's trees do not open."""

    def __init__(
        self, function: Callable[..., Any], leaves: list, treespec: Any, refusal: str, once: bool
    ):
        self.function = function
        self.leaves = leaves
        self.treespec = treespec
        self.refusal = refusal
        self.once = once
        self.result: Any = None  # the structure of what the function returned

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The function's value on these tensors, as a flat tuple of tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        value = self.function(*optree.tree_unflatten(self.treespec, leaves))
        flat, self.result = optree.tree_flatten(value)
        return tuple(map(_as_tensor, flat))

    def pull_back(self, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list:
        """The gradient by each tensor, None by one of integers, of a call that is made again."""
        places = [i for i, x in enumerate(tensors) if x.is_floating_point()]

        def of_floats(*floats: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for place, x in zip(places, floats, strict=True):
                given[place] = x
            return tuple(x for x in self(tuple(given)) if x.is_floating_point())

        _, pull, *_ = torch.func.vjp(of_floats, *(tensors[place] for place in places))
        found: list[Tensor | None] = [None] * len(tensors)
        for place, grad in zip(places, pull(grads), strict=True):
            found[place] = grad
        return found

    def refuse(self) -> None:
        raise UserError(self.refusal)


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
        ctx.call, *tensors = inputs
        if ctx.call.once:
            ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))
            ctx.is_float = [x.is_floating_point() for x in output]
            ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any):  # pyright: ignore
        call = ctx.call
        if not call.once:
            call.refuse()
        wanted = tuple(compress(grads, ctx.is_float))
        return None, *entry_by_entry(call.pull_back, call.refusal)(ctx.saved_tensors, wanted)

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
