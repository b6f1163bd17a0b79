"""Functions with a hand-written backward, for `vjp` and `vmap`; a second derivative is refused."""

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs", bound=tuple)
Outputs = TypeVar("Outputs", bound=tuple)

# A record as a flat list: for each field the number of its tensors, or None for a single value.
_Layout = tuple[int | None, ...]

_SAVED = object()  # in a list of kept values: a tensor, held by `save_for_backward`
_mapped = threading.local()


def differentiable_once(
    forward: Callable[[Inputs], Outputs],
    backward: Callable[[Inputs, Outputs, Outputs], dict[str, Any]],
    *,
    inputs: type[Inputs],
    outputs: type[Outputs],
    without_gradient: Collection[str] = (),
    unread_inputs: Collection[str] = (),
    unread_outputs: Collection[str] = (),
    alternative: str = "objective.numerics = 'plain'",
) -> Callable[[Inputs], Outputs]:
    """`forward` as a function whose gradient is `backward`; inputs and outputs are records.

    Args:
        forward: `inputs → outputs`.
        backward: `(inputs, outputs, grads) → {name of an input: its gradient}`. `grads` has the
            outputs' names. Inputs that the result does not name get no gradient.
        inputs: the NamedTuple that `forward` takes. A field is a tensor, a tuple of tensors, or a
            constant.
        outputs: the NamedTuple of tensors that `forward` returns.
        without_gradient: names of outputs that cannot be differentiated: metrics, or what `forward`
            makes for `backward`. They are None in `grads`.
        unread_inputs: names of inputs that `backward` does not read. They are not kept alive, and
            `backward` gets None for them. An input on which the gradient depends must not be named
            here, even if it is not read: autograd detects a second derivative by it.
        unread_outputs: names of outputs that `backward` does not read; not kept alive either.
        alternative: what can be differentiated twice, for the error message.

    Returns:
        A function of one record. Differentiating its gradient raises `RuntimeError`. Under `vmap`
        it runs once for each entry of the mapped axis.
    """
    input_names: tuple[str, ...] = inputs._fields  # pyright: ignore[reportAttributeAccessIssue]
    output_names: tuple[str, ...] = outputs._fields  # pyright: ignore[reportAttributeAccessIssue]
    assert set(unread_inputs) <= set(input_names), unread_inputs
    assert {*without_gradient, *unread_outputs} <= set(output_names), output_names

    # autograd sees flat arguments: the layout, then the values of the inputs in order.

    class Backward(torch.autograd.Function):
        """The gradient as a function of its own: differentiating it again calls its `backward`."""

        @staticmethod
        def forward(layout: _Layout, *flat: Any):  # pyright: ignore
            # `flat`: values of the inputs, then the outputs, then the gradients of the outputs
            count = len(output_names)
            given = inputs(*_fields(flat[: -2 * count], layout))
            made = outputs(*flat[-2 * count : -count])
            grads = outputs(*flat[-count:])
            return _in_order(backward(given, made, grads), input_names, layout)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Nothing is kept."""

        @staticmethod
        def backward(ctx: Any, *_: Any):  # pyright: ignore
            raise RuntimeError(
                f"this function can be differentiated once; for higher orders use {alternative}"
            )

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any):  # pyright: ignore
            return _entry_by_entry(Backward, info, in_dims, args)

    class Forward(torch.autograd.Function):
        """The value; its backward calls `Backward`."""

        @staticmethod
        def forward(layout: _Layout, *flat: Any):  # pyright: ignore
            return tuple(forward(inputs(*_fields(flat, layout))))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            layout, *flat = inputs
            made = dict(zip(output_names, output, strict=True))
            ctx.mark_non_differentiable(*(made[name] for name in without_gradient))

            # Else autograd makes zeros as gradients of these outputs, in their own size.
            ctx.set_materialize_grads(False)

            # Keep what `backward` reads: tensors by autograd, constants as they are.
            kept = _flat(zip(input_names, _fields(flat, layout), strict=True), unread_inputs)
            kept += _flat(made.items(), unread_outputs)
            ctx.layout = layout
            ctx.kept = [_SAVED if isinstance(value, Tensor) else value for value in kept]
            ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))

        @staticmethod
        def backward(ctx: Any, *grads: Any):  # pyright: ignore
            saved = iter(ctx.saved_tensors)
            kept = [next(saved) if value is _SAVED else value for value in ctx.kept]
            grads = _flat(zip(output_names, grads, strict=True), without_gradient)
            return None, *Backward.apply(ctx.layout, *kept, *grads)  # None: the layout's

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any):  # pyright: ignore
            return _entry_by_entry(Forward, info, in_dims, args)

    def function(record: Inputs) -> Outputs:
        layout = tuple(len(value) if _is_group(value) else None for value in record)
        flat = _flat(zip(input_names, record, strict=True))
        return outputs(*Forward.apply(layout, *flat))

    return function


def is_last_pull_back(grad: Tensor) -> bool:
    """In a backward: whether its saved tensors are read for the last time, and may be overwritten.

    Not where the graph stays for another backward (`retain_graph`, as for a pull-back of `vjp`).
    Not under `vmap`: the entries of the mapped axis share the saved tensors.
    """
    graph_stays = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
    is_batched = torch._C._functorch.is_batchedtensor(grad)  # pyright: ignore
    in_entry = getattr(_mapped, "depth", 0) > 0
    return not (graph_stays or is_batched or in_entry)


def _is_group(value: Any) -> bool:
    """Whether a field is a tuple of tensors, each an argument of its own for autograd."""
    return isinstance(value, tuple) and all(isinstance(x, Tensor) for x in value)


def _flat(named: Iterable[tuple[str, Any]], left_out: Collection[str] = ()) -> list[Any]:
    """The fields' values one after another, tuples of tensors opened; None for what is left out."""
    flat: list[Any] = []
    for name, value in named:
        values = value if _is_group(value) else (value,)
        flat.extend([None] * len(values) if name in left_out else values)
    return flat


def _fields(flat: Collection[Any], layout: _Layout) -> list[Any]:
    """The inverse of `_flat`: one value a field."""
    values = iter(flat)
    fields: list[Any] = []
    for count in layout:
        if count is None:
            fields.append(next(values))
        else:
            fields.append(tuple(next(values) for _ in range(count)))
    return fields


def _in_order(
    gradients: dict[str, Any], names: tuple[str, ...], layout: _Layout
) -> tuple[Tensor | None, ...]:
    """Gradients by name as one value for each flat input; None for an input without gradient."""
    assert gradients.keys() <= set(names), gradients.keys()
    flat: list[Tensor | None] = []
    for name, count in zip(names, layout, strict=True):
        found = gradients.get(name)
        if count is None:
            flat.append(found)
        else:
            flat.extend([None] * count if found is None else found)
    return tuple(flat)


def _entry_by_entry(
    function: Any, info: Any, in_dims: tuple, args: tuple
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """The rule of `vmap`: one call for each entry of the mapped axis, results stacked first."""
    mapped = [isinstance(dim, int) for dim in in_dims]

    def entry(index: int) -> tuple[Tensor | None, ...]:
        columns = zip(args, in_dims, mapped, strict=True)
        return function.apply(*(x.select(dim, index) if m else x for x, dim, m in columns))

    # `is_last_pull_back` must see that the entries share their saved tensors.
    _mapped.depth = getattr(_mapped, "depth", 0) + 1
    try:
        entries = [entry(index) for index in range(info.batch_size)]
    finally:
        _mapped.depth -= 1

    # A value that is None is None for every entry: an input without gradient.
    stacked = []
    for column in zip(*entries, strict=True):
        stacked.append(None if column[0] is None else torch.stack(column))
    out_dims = tuple(None if value is None else 0 for value in stacked)
    return tuple(stacked), out_dims
