"""`differentiable_once` alone: records with named fields, what is kept, and what is refused."""

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from eagle3fn.model.autograd import differentiable_once


class Inputs(NamedTuple):
    x: Tensor
    parts: tuple[Tensor, ...]
    shift: Tensor
    power: int


class Outputs(NamedTuple):
    total: Tensor
    size: Tensor


def forward(inputs: Inputs) -> Outputs:
    """`Σ parts · x^power + shift`, and the largest of x."""
    powered = inputs.x**inputs.power
    total = sum((part * powered for part in inputs.parts), start=inputs.shift)
    return Outputs(torch.as_tensor(total), inputs.x.amax())


def backward(inputs: Inputs, outputs: Outputs, grads: Outputs):
    """No gradient by `shift`, so as to see that it gets none."""
    assert inputs.shift is None
    assert outputs.total is None
    assert grads.size is None
    slope = inputs.power * inputs.x ** (inputs.power - 1)
    return {
        "x": grads.total * slope * sum(inputs.parts, start=torch.zeros(())),
        "parts": [grads.total * inputs.x**inputs.power for _ in inputs.parts],
    }


function = differentiable_once(
    forward,
    backward,
    inputs=Inputs,
    outputs=Outputs,
    without_gradient=["size"],
    unread_inputs=["shift"],
    unread_outputs=["total"],
    alternative="torch operations",
)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_gradients_reach_the_inputs_that_are_named(count):
    x = leaf(1.0, 2.0)
    parts = tuple(leaf(0.5, i) for i in range(count))
    shift = leaf(3.0, 4.0)
    outputs = function(Inputs(x, parts, shift, power=3))
    assert not outputs.size.requires_grad

    outputs.total.sum().backward()
    assert shift.grad is None
    wanted = 3 * x.detach() ** 2 * sum(part.detach() for part in parts)
    assert x.grad is not None and torch.equal(x.grad, wanted)
    for part in parts:
        assert part.grad is not None and torch.equal(part.grad, x.detach() ** 3)


def test_unread_inputs_and_outputs_are_not_kept_alive():
    shift = torch.ones(2)
    outputs = function(Inputs(leaf(1.0, 2.0), (leaf(0.5, 0.5),), shift, power=2))
    loss = outputs.total.sum()
    unread = [weakref.ref(x.untyped_storage()) for x in (shift, outputs.total)]
    del shift, outputs
    assert [reference() for reference in unread] == [None, None]
    loss.backward()


def test_vmap_is_one_call_for_each_entry():
    def gradient(x, part):
        inputs = Inputs(x, (part, part), torch.zeros(2), power=2)
        return torch.func.grad(lambda y: function(inputs._replace(x=y)).total.sum())(x)

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    part = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    wanted = torch.stack([gradient(x[i], part[i]) for i in range(2)])
    assert torch.equal(torch.func.vmap(gradient)(x, part), wanted)


def test_a_second_derivative_raises_and_names_the_alternative():
    def slope(x):
        inputs = Inputs(x, (torch.ones(2),), torch.zeros(2), power=2)
        return torch.func.grad(lambda y: function(inputs._replace(x=y)).total.sum())(x).sum()

    with pytest.raises(RuntimeError, match="once; for higher orders use torch operations"):
        torch.func.grad(slope)(torch.ones(2))


@pytest.mark.parametrize("option", ["without_gradient", "unread_inputs", "unread_outputs"])
def test_a_name_that_no_field_has_fails_at_definition(option):
    names: dict[str, Any] = {option: ["y"]}
    with pytest.raises(AssertionError):
        differentiable_once(forward, backward, inputs=Inputs, outputs=Outputs, **names)
