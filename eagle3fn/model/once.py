"""Functions with a backward of their own: right under `vjp` and `vmap`, and refused when differentiated twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    by: int,
    kept: int = 0,
    else_take: str = "objective.numerics = 'legacy'",
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of tensors and constants with the outputs of `forward` and the gradient of `backward`.

    Args:
        forward: `(*inputs) → outputs`, a tuple of tensors.
        backward: `(inputs, outputs, grads) → gradients` by the first `by` inputs.
        by: how many inputs, the first ones, are differentiated.
        kept: how many outputs, the last ones, carry no gradient: metrics, or what `backward` reads.
        else_take: what can be differentiated twice, for the error's message.

    The function raises `RuntimeError` when its gradient is differentiated. Under `vmap` it is called once for each
    entry of the mapped axis.
    """

    class Backward(torch.autograd.Function):
        """The gradient as a function of its own, so that a second derivative comes by here."""

        @staticmethod
        def forward(sizes: tuple[int, int], *flat: Any):  # pyright: ignore
            a, b = sizes
            return backward(flat[:a], flat[a : a + b], flat[a + b :])

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Nothing is kept."""

        @staticmethod
        def backward(ctx: Any, *_: Any):  # pyright: ignore
            raise RuntimeError(f"this loss can be differentiated once; for higher orders take {else_take}")

        vmap = staticmethod(lambda info, in_dims, *args: _each(Backward, info, in_dims, args))

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any):  # pyright: ignore
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            if kept:
                ctx.mark_non_differentiable(*output[-kept:])
            ctx.fixed = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.outputs = len(output)
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)

        @staticmethod
        def backward(ctx: Any, *grads: Any):  # pyright: ignore
            saved = list(ctx.saved_tensors)
            tensors, outputs = iter(saved[: -ctx.outputs]), saved[-ctx.outputs :]
            inputs = [next(tensors) if x is None else x for x in ctx.fixed]
            sizes = len(inputs), len(outputs)
            found = Backward.apply(sizes, *inputs, *outputs, *grads[: len(outputs) - kept])
            return (*found, *(None,) * (len(inputs) - by))

        vmap = staticmethod(lambda info, in_dims, *args: _each(Forward, info, in_dims, args))

    return Forward.apply


def _each(function: Any, info: Any, dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each entry of the mapped axis, stacked."""
    pairs = list(zip(args, dims, strict=True))
    columns = zip(
        *(
            function.apply(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))
            for i in range(info.batch_size)
        ),
        strict=True,
    )
    stacked = tuple(torch.stack(column) for column in columns)
    return stacked, (0,) * len(stacked)
