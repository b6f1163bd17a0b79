"""Functions with a backward of their own: right under `vjp` and `vmap`, and refused when differentiated twice."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    kept: int = 0,
    unread: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    else_take: str = "objective.numerics = 'plain'",
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of tensors and constants with the outputs of `forward` and the gradient of `backward`.

    Args:
        forward: `(*inputs) → outputs`, a tuple of tensors.
        backward: `(inputs, outputs, grads) → gradients` by the first inputs, as many as it returns.
        kept: how many outputs, the last ones, carry no gradient: metrics, or what `backward` reads.
        unread: places of inputs and of outputs that `backward` does not read: it finds None there, and they are not
            kept alive. An input on which the gradient depends must not be among them: a second derivative comes by it.
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
            raise RuntimeError(
                f"this loss can be differentiated once; for higher orders take {else_take}"
            )

        vmap = staticmethod(lambda info, in_dims, *args: _each(Backward, info, in_dims, args))

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any):  # pyright: ignore
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            if kept:
                ctx.mark_non_differentiable(*output[-kept:])
            ctx.set_materialize_grads(False)  # else the kept outputs get zeros of their own size
            ctx.sizes = len(inputs), len(output)
            given = [*_without(inputs, unread[0]), *_without(output, unread[1])]
            ctx.fixed = [None if isinstance(x, Tensor) else (x,) for x in given]
            ctx.save_for_backward(*(x for x in given if isinstance(x, Tensor)))

        @staticmethod
        def backward(ctx: Any, *grads: Any):  # pyright: ignore
            (inputs, outputs), tensors = ctx.sizes, iter(ctx.saved_tensors)
            given = [next(tensors) if x is None else x[0] for x in ctx.fixed]
            found = Backward.apply(ctx.sizes, *given, *grads[: outputs - kept])
            return (*found, *(None,) * (inputs - len(found)))

        vmap = staticmethod(lambda info, in_dims, *args: _each(Forward, info, in_dims, args))

    return Forward.apply


_mapped = threading.local()


def is_last_pull_back(grad: Tensor) -> bool:
    """In a backward: whether what was saved for it is read now for the last time, so that it may be written over.

    Not where the graph stays for another backward (`retain_graph`, as for a pull-back of `vjp`), nor under `vmap`:
    the entries of the mapped axis share what was saved.
    """
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
    batched = torch._C._functorch.is_batchedtensor(grad)  # pyright: ignore
    shared = batched or getattr(_mapped, "depth", 0) > 0
    return not kept and not shared


def _without(values: tuple, places: tuple[int, ...]) -> list[Any]:
    return [None if place in places else value for place, value in enumerate(values)]


def _each(
    function: Any, info: Any, dims: tuple, args: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each entry of the mapped axis, stacked."""
    pairs = list(zip(args, dims, strict=True))
    _mapped.depth = getattr(_mapped, "depth", 0) + 1
    try:
        entries = [
            function.apply(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))
            for i in range(info.batch_size)
        ]
    finally:
        _mapped.depth -= 1
    columns = zip(*entries, strict=True)
    stacked = tuple(torch.stack(column) for column in columns)
    return stacked, (0,) * len(stacked)
