"""Where two runs of one case part: the first unroll step, operation and leaf, and how far apart they are."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eagle3fn.model import table
from eagle3fn.model.forward import forward_loss
from eagle3fn.specforge.oracle import (
    Oracle,
    eager_loss,
    specforge_draft,
    specforge_forward,
    run_oracle,
)
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import ForwardLoss, Result, differences, run_forward, ulps

BEFORE = {
    table.FC: "features",
    table.INPUT_NORM: "scaling by the root mean square",
    table.HIDDEN_NORM: "scaling by the root mean square",
    table.POST_NORM: "residual, scaling by the root mean square",
    table.NORM: "residual, scaling by the root mean square",
    table.O: "attention: turned queries and keys, scores, softmax, values",
    table.DOWN: "silu(gate) · up",
}
BACKWARD = (table.HEAD, table.NORM, table.DOWN, table.UP, table.GATE, table.POST_NORM, table.O, table.V, table.K,
            table.Q, table.HIDDEN_NORM, table.INPUT_NORM, table.FC, table.EMBED)  # fmt: skip


class Difference(NamedTuple):
    """The first thing that is not equal. `leaf` is the parameter at, before or behind which it was seen."""

    step: int
    operation: str
    leaf: str
    ulps: int


class Event(NamedTuple):
    """One use of a parameter: what came in beside it, and what went out."""

    before: Tensor
    after: Tensor


class Trace(TorchFunctionMode):
    """Records what happens at every parameter while it is open: `(leaf, unroll step)` to an `Event`, in order."""

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in leaves.items()}
        self.events: dict[tuple[str, int], Event] = {}
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        names = [self.names[id(x)] for x in tensors if id(x) in self.names]
        if names and len(tensors) == 2 and isinstance(out, Tensor) and out.is_floating_point():
            before = next(x for x in tensors if id(x) not in self.names)
            self.events[names[0], self.seen[names[0]]] = Event(
                before.detach().clone(), out.detach().clone()
            )
            self.seen[names[0]] += 1
        return out


Run = tuple[Callable[[Case], Result], Callable[[Case], Trace]]


def ours(function: ForwardLoss = forward_loss) -> Run:
    """How a function of `forward_loss`'s signature gives a result and a trace."""

    def trace(case: Case) -> Trace:
        frozen, params = tiny_frozen(case), tiny_params(case)
        own: dict[str, Tensor] = {}
        if (
            frozen.embed_tokens is not None
        ):  # a tensor of its own: a tied head's product is no use of the embedding
            own = {table.EMBED: frozen.embed_tokens.clone()}
            frozen = frozen._replace(embed_tokens=own[table.EMBED])
        with torch.no_grad(), Trace(params | own) as found:
            function(params, tiny_batch(case), config=case.config(), frozen=frozen)
        return found

    return lambda case: run_forward(function, case), trace


def theirs(oracle: Oracle) -> Run:
    """How the old tool gives a result and a trace."""

    def trace(case: Case) -> Trace:
        frozen = tiny_frozen(case)
        draft = specforge_draft(oracle, case.draft(), tiny_params(case), frozen)
        with eager_loss(oracle), torch.no_grad(), Trace(dict(draft.named_parameters())) as found:
            specforge_forward(oracle, draft, frozen, tiny_batch(case), case.config().objective)
        return found

    return lambda case: run_oracle(oracle, case), trace


def first_difference(case: Case, left: Run, right: Run) -> Difference | None:
    """Forward first, step by step and in the left side's order; then metrics; then gradients, by shorter unrolls."""
    a, b = left[0](case), right[0](case)
    if not differences(a, b):
        return None
    one, two = left[1](case), right[1](case)
    for step in range(case.steps):
        found = _forward(step, one, two) or _metrics(step, a, b)
        if found:
            return found
    return _gradients(case, left, right) or Difference(
        case.steps - 1, "sum over steps", "loss", _far(a, b, "loss")
    )


def _forward(step: int, one: Trace, two: Trace) -> Difference | None:
    for (leaf, number), event in one.events.items():
        other = two.events.get((leaf, number))
        if number != step:
            continue
        if other is None:
            return Difference(step, "not there on the other side", leaf, -1)
        if not torch.equal(event.before, other.before):
            return Difference(
                step, BEFORE.get(leaf, "input"), leaf, ulps(event.before, other.before)
            )
        if not torch.equal(event.after, other.after):
            return Difference(step, "product with the weight", leaf, ulps(event.after, other.after))
    return None


def _metrics(step: int, a: Result, b: Result) -> Difference | None:
    for name in ("losses", "acceptance", "correct", "rows"):
        if a[name].dtype != b[name].dtype or not torch.equal(a[name][step], b[name][step]):
            return Difference(step, "loss and metrics", name, ulps(a[name][step], b[name][step]))
    return None


def _gradients(case: Case, left: Run, right: Run) -> Difference | None:
    """The first step whose addition makes a gradient differ, and that step's first such leaf on the way back."""
    for steps in range(1, case.steps + 1):
        short = replace(case, steps=steps)
        a, b = left[0](short), right[0](short)
        found = differences(a, b)
        for leaf in BACKWARD:
            if leaf in found:
                return Difference(steps - 1, "backward", leaf, _far(a, b, leaf))
    return None


def _far(a: Result, b: Result, name: str) -> int:
    return ulps(a[name], b[name]) if name in a and name in b else -1
