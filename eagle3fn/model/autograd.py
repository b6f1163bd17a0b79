"""Functions with a hand-written backward, for `vjp` and `vmap`; a second derivative is refused."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs", bound=tuple)
Outputs = TypeVar("Outputs", bound=tuple)

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
        A function of one record. Differentiating its gradient, or in forward mode (`jvp`), raises
        `RuntimeError`. Under `vmap` it runs once for each entry of the mapped axis.
    """
    input_names = set(inputs._fields)  # pyright: ignore[reportAttributeAccessIssue]
    output_names = set(outputs._fields)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(unread_inputs) <= input_names, unread_inputs
    assert {*without_gradient, *unread_outputs} <= output_names, output_names

    # autograd sees tensors one by one. Frames, which are constants to it, put them into records.

    class Backward(torch.autograd.Function):
        """The gradient as a function of its own: differentiating it again calls its `backward`."""

        @staticmethod
        def forward(frames: "_Frames", *tensors: Tensor):  # pyright: ignore
            rest = iter(tensors)
            given = frames.inputs.filled(rest)
            made = frames.outputs.filled(rest)
            grads = frames.grads.filled(rest)
            return frames.call.in_order(backward(given, made, grads))

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

    class Forward(_NoForwardMode):
        """The value; its backward calls `Backward`."""

        @staticmethod
        def forward(frame: "_Frame", *tensors: Tensor):  # pyright: ignore
            return tuple(forward(frame.filled(iter(tensors))))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            frame, *tensors = inputs
            made = outputs(*output)
            ctx.alternative = alternative
            ctx.mark_non_differentiable(*(getattr(made, name) for name in without_gradient))

            # Else autograd makes zeros as gradients of these outputs, in their own size.
            ctx.set_materialize_grads(False)

            # Keep what `backward` reads.
            ctx.call = frame
            ctx.inputs, read_inputs = _taken_apart(frame.filled(iter(tensors)), unread_inputs)
            ctx.outputs, read_outputs = _taken_apart(made, unread_outputs)
            ctx.save_for_backward(*read_inputs, *read_outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any):  # pyright: ignore
            grads_frame, given = _taken_apart(outputs(*grads), without_gradient)
            frames = _Frames(ctx.call, ctx.inputs, ctx.outputs, grads_frame)
            gradients = Backward.apply(frames, *ctx.saved_tensors, *given)
            return None, *gradients  # None: the frame's

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any):  # pyright: ignore
            return _entry_by_entry(Forward, info, in_dims, args)

    def function(record: Inputs) -> Outputs:
        frame, tensors = _taken_apart(record)
        return outputs(*Forward.apply(frame, *tensors))

    return function


class _NoForwardMode(torch.autograd.Function):
    """A function that refuses forward mode in one sentence."""

    @staticmethod
    def jvp(ctx: Any, *_: Any):  # pyright: ignore
        raise RuntimeError(f"no forward mode here; for it use {ctx.alternative}")


def is_last_pull_back(grad: Tensor) -> bool:
    """In a backward: whether its saved tensors are read for the last time, and may be overwritten.

    Not where the graph stays for another backward (`retain_graph`, as for a pull-back of `vjp`).
    Not under `vmap`: the entries of the mapped axis share the saved tensors.
    """
    graph_stays = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
    is_batched = torch._C._functorch.is_batchedtensor(grad)  # pyright: ignore
    in_entry = getattr(_mapped, "depth", 0) > 0
    return not (graph_stays or is_batched or in_entry)


# Records and their tensors.


class _Tensors(NamedTuple):
    """In a frame, the place of a tuple of tensors."""

    count: int


_TENSOR = object()  # in a frame, the place of one tensor


class _Frame:
    """A record without its tensors: its constants, and the places of the tensors.

    A class that PyTorch's trees do not open: one argument, however many fields it has.
    """

    def __init__(self, kind: Any, fields: list[Any]) -> None:
        self.kind = kind
        self.fields = fields

    def filled(self, tensors: Iterator[Tensor]) -> Any:
        """The record, with the next of these tensors in their places."""
        values = []
        for field in self.fields:
            if field is _TENSOR:
                values.append(next(tensors))
            elif isinstance(field, _Tensors):
                values.append(tuple(next(tensors) for _ in range(field.count)))
            else:
                values.append(field)
        return self.kind(*values)

    def in_order(self, gradients: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """Gradients by name as one value for each tensor; None for a tensor without gradient."""
        assert gradients.keys() <= set(self.kind._fields), gradients.keys()
        ordered: list[Tensor | None] = []
        for name, field in zip(self.kind._fields, self.fields, strict=True):
            found = gradients.get(name)
            if field is _TENSOR:
                ordered.append(found)
            elif isinstance(field, _Tensors):
                ordered.extend([None] * field.count if found is None else found)
        return tuple(ordered)


class _Frames:
    """The frames of a backward; one argument, as `_Frame` is."""

    def __init__(self, call: _Frame, inputs: _Frame, outputs: _Frame, grads: _Frame) -> None:
        self.call = call
        self.inputs = inputs
        self.outputs = outputs
        self.grads = grads


def _taken_apart(record: Any, left_out: Collection[str] = ()) -> tuple[_Frame, list[Tensor]]:
    """A record's frame and its tensors in order; fields that are left out become None."""
    fields: list[Any] = []
    tensors: list[Tensor] = []
    for name, value in zip(record._fields, record, strict=True):
        if name in left_out:
            fields.append(None)
        elif isinstance(value, Tensor):
            fields.append(_TENSOR)
            tensors.append(value)
        elif isinstance(value, tuple) and _are_tensors(value):
            fields.append(_Tensors(len(value)))
            tensors.extend(value)
        else:
            fields.append(value)
    return _Frame(type(record), fields), tensors


def _are_tensors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


# The rule of `vmap`.


def _entry_by_entry(
    function: Any, info: Any, in_dims: tuple, args: tuple
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """One call for each entry of the mapped axis; the results are stacked along a first axis."""

    def entry(index: int) -> tuple[Tensor | None, ...]:
        columns = zip(args, in_dims, strict=True)
        return function.apply(*(x if dim is None else x.select(dim, index) for x, dim in columns))

    # `is_last_pull_back` must see that the entries share their saved tensors.
    _mapped.depth = getattr(_mapped, "depth", 0) + 1
    try:
        entries = [entry(index) for index in range(info.batch_size)]
    finally:
        _mapped.depth -= 1

    # What is None is so for every entry: an input without gradient.
    stacked = []
    for column in zip(*entries, strict=True):
        stacked.append(None if column[0] is None else torch.stack(column))
    out_dims = tuple(None if value is None else 0 for value in stacked)
    return tuple(stacked), out_dims
