"""Numbers at their limits: loss and gradients against the same problem in fp64.

Every problem's values are drawn in the dtype that is tested and then widened, so that what differs
is the arithmetic alone.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.tree import tree_map
from eagle3fn.data.validate import LARGEST, hidden_fault
from eagle3fn.model import table
from eagle3fn.testing.builders import (
    Case,
    tiny_frozen,
    tiny_params,
    tiny_unaligned,
)

# Relative errors: a few units of the dtype's rounding, times what a layer and a head amplify.
BOUND = {"float32": 5e-5, "bfloat16": 0.2}
LOSS_BOUND = {"float32": 2e-5, "bfloat16": 0.05}


class Problem(NamedTuple):
    """Parameters, a target's tensors and a batch."""

    case: Case
    params: dict[str, torch.Tensor]
    frozen: e3.Frozen
    batch: e3.Batch


def make(case: Case, **scales: float) -> Problem:
    """A drawn problem; features by their names, and weights by theirs, are scaled."""
    samples = tiny_unaligned(case)
    params = tiny_params(case)
    frozen = tiny_frozen(case)
    for name, scale in scales.items():
        if name in samples._fields:
            samples = samples._replace(**{name: getattr(samples, name) * scale})
        elif name in frozen._fields:
            frozen = frozen._replace(**{name: getattr(frozen, name) * scale})
        else:
            weight = getattr(table, name)
            params[weight] = params[weight] * scale
    return Problem(case, params, frozen, samples.aligned(case.steps))


SMALL = Case(lengths=(9, 6), mask="full", tokens="inside")

PROBLEMS = {
    "features of 1e12": lambda case: make(case, aux_hidden=2.5e11),
    "features of 1e-30": lambda case: make(case, aux_hidden=1e-30),
    "features of zero": lambda case: make(case, aux_hidden=0.0),
    "target logits of 1e4": lambda case: make(case, last_hidden=1e4),
    "equal target logits": lambda case: make(case, last_hidden=0.0),
    "a target head of zeros": lambda case: make(case, target_head=0.0),
    "a draft head of zeros": lambda case: make(case, HEAD=0.0),
    "draft logits of 1e4": lambda case: make(case, HEAD=1e4),
    "weights of 1e8": lambda case: make(case, FC=1e8),
    "weights of 1e-20": lambda case: make(case, FC=1e-20, Q=1e-20, K=1e-20),
    "attention scores of 1e4": lambda case: make(case, Q=1e2, K=1e2),
    "D of 1": lambda case: make(replace(case, draft_vocab=1)),
    "D of 2": lambda case: make(replace(case, draft_vocab=2)),
    "D of V": lambda case: make(replace(case, draft_vocab=case.vocab)),
    "K above S": lambda case: make(replace(case, lengths=(3,), steps=8)),
    "one token": lambda case: make(replace(case, lengths=(1,))),
    "one token beside many": lambda case: make(replace(case, lengths=(1, 9))),
    "no row": lambda case: make(replace(case, mask="empty")),
}


def value_and_gradient(problem: Problem, numerics: Any, dtype: str) -> tuple[Any, Any]:
    """Loss and gradients with every tensor in `dtype`."""
    kind = getattr(torch, dtype)

    def cast(x: Any) -> Any:
        is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(kind) if is_float else x

    config = replace(problem.case, dtype=dtype).config()
    config = replace(config, objective=replace(config.objective, numerics=numerics))
    fns = e3.bind(config, tree_map(cast, problem.frozen))
    evaluate = e3.value_and_grad(fns.forward_loss, has_aux=True)
    batch = problem.batch
    counts = batch.row_counts
    (loss, _), grads = evaluate(
        tree_map(cast, problem.params), tree_map(cast, batch)._replace(row_counts=counts)
    )
    return loss, grads


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("numerics", ["plain", "fast"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_limits_are_as_in_fp64(name, numerics, dtype):
    problem = PROBLEMS[name](replace(SMALL, dtype=dtype))
    want, want_grads = value_and_gradient(problem, "plain", "float64")
    loss, grads = value_and_gradient(problem, numerics, dtype)

    assert loss.isfinite()
    assert abs(loss - want) <= LOSS_BOUND[dtype] * max(abs(want), 1e-3), (loss, want)
    # Gradients that vanish beside the others, as of saturated attention, are rounding.
    whole = sum(float(grad.norm()) ** 2 for grad in want_grads.values()) ** 0.5
    for leaf, grad in grads.items():
        assert grad.isfinite().all(), leaf
        want_grad = want_grads[leaf]
        distance = float((grad.double() - want_grad).norm())
        assert distance <= BOUND[dtype] * max(float(want_grad.norm()), 1e-3 * whole), leaf


def test_features_beyond_the_limit_are_refused():
    """There a norm's gradient in fp32 is finite and wrong."""
    aux = torch.ones(4, 6)
    last = torch.ones(4, 2)
    aux[2, 5] = -LARGEST
    assert hidden_fault(aux, last, 4, taps=3, size=2, dtype="float32") is None
    aux[2, 5] = -2 * LARGEST
    assert hidden_fault(aux, last, 4, taps=3, size=2, dtype="float32") == (
        "aux_hidden holds 2.0e+12 at token 2: must be within 1e+12, beyond which a norm is wrong "
        "in float32"
    )
