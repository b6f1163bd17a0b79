"""Gradients of pure functions: one `value_and_grad` for the whole package."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from eagle3fn.base.tree import check_whole


def value_and_grad(
    function: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Return a function that gives `(function(x, …), gradient by x)`.

    With `has_aux`, `((value, aux), gradient)`.

    Differentiates by the first argument, any pytree of tensors. Uses `torch.func.vjp` with one
    pull-back under `no_grad`: the bits and the memory of `.backward()`, where `torch.func.grad`
    back-propagates with `create_graph=True` (other kernels, several times the memory). For higher
    orders call `torch.func` itself. The returned function raises `UserError` for sharded leaves:
    they are gathered first.
    """

    def wrapped(x: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        check_whole(x)

        def closed(inner: Any) -> Any:
            return function(inner, *args, **kwargs)

        value, pullback, *aux = vjp(closed, x, has_aux=has_aux)
        _check_scalar(value)
        with torch.no_grad():
            (gradient,) = pullback(torch.ones_like(value), retain_graph=False)
        return ((value, aux[0]) if has_aux else value), gradient

    return wrapped


def _check_scalar(value: Tensor) -> None:
    if value.ndim:
        raise ValueError(
            f"value_and_grad: the function returned shape {tuple(value.shape)}; it must return a "
            "scalar"
        )
