"""Where two runs of one case part: the first unroll step, operation and leaf, and the distance."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eagle3fn.model import table
from eagle3fn.specforge.arithmetic import forward_loss
from eagle3fn.specforge.oracle import (
    Oracle,
    eager_loss,
    run_oracle,
    specforge_draft,
    specforge_forward,
)
from eagle3fn.testing.builders import Case, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.results import (
    METRICS,
    ForwardLoss,
    Result,
    differences,
    run_forward,
    ulps,
)

ROWS = {weight.name: weight for weight in table.TABLE}


class Difference(NamedTuple):
    """The first thing that is not equal."""

    step: int
    """The unroll step."""

    operation: str

    leaf: str
    """The parameter, or metric, at which it was seen: in its input, its output or its gradient."""

    ulps: int
    """How far apart; -1 if that cannot be said."""


class Event(NamedTuple):
    """One use of a parameter."""

    before: Tensor
    """The operation's other input."""

    after: Tensor
    """Its output."""


class Trace(TorchFunctionMode):
    """Records every use of a parameter while it is open.

    `events` maps `(leaf, unroll step)` to an `Event`, in the order of execution.
    """

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in leaves.items()}
        self.events: dict[tuple[str, int], Event] = {}
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))

        # An operation on a parameter and one other tensor is a use of the parameter.
        tensors = [x for x in args if isinstance(x, Tensor)]
        names = [self.names[id(x)] for x in tensors if id(x) in self.names]
        if names and len(tensors) == 2 and isinstance(out, Tensor) and out.is_floating_point():
            name = names[0]
            before = next(x for x in tensors if id(x) not in self.names)
            event = Event(before.detach().clone(), out.detach().clone())
            self.events[name, self.seen[name]] = event
            self.seen[name] += 1
        return out


class Run(NamedTuple):
    """How one side computes a case."""

    result: Callable[[Case], Result]
    trace: Callable[[Case], Trace]


def ours(function: ForwardLoss = forward_loss) -> Run:
    """A function of `forward_loss`'s signature as a side."""

    def trace(case: Case) -> Trace:
        params = tiny_params(case)
        frozen = tiny_frozen(case)
        leaves = dict(params)
        if frozen.embed_tokens is not None:
            # A tied head is the same tensor. A copy keeps its products from counting as uses of
            # the embedding.
            leaves[table.EMBED] = frozen.embed_tokens.clone()
            frozen = frozen._replace(embed_tokens=leaves[table.EMBED])
        with torch.no_grad(), Trace(leaves) as found:
            function(params, tiny_batch(case), config=case.config(), frozen=frozen)
        return found

    return Run(lambda case: run_forward(function, case), trace)


def theirs(oracle: Oracle) -> Run:
    """SpecForge as a side, at level 2."""

    def trace(case: Case) -> Trace:
        frozen = tiny_frozen(case)
        draft = specforge_draft(oracle, case.draft(), tiny_params(case), frozen)
        with eager_loss(oracle), torch.no_grad(), Trace(dict(draft.named_parameters())) as found:
            specforge_forward(oracle, draft, frozen, tiny_batch(case), case.config().objective)
        return found

    return Run(lambda case: run_oracle(oracle, case), trace)


def first_difference(case: Case, left: Run, right: Run) -> Difference | None:
    """The first difference of two sides on a case; None if their results are equal.

    Looks at the forward pass step by step, in the left side's order of operations, then at that
    step's metrics. If those are all equal, at gradients of shorter unrolls.
    """
    a = left.result(case)
    b = right.result(case)
    if not differences(a, b):
        return None

    trace_a = left.trace(case)
    trace_b = right.trace(case)
    for step in range(case.steps):
        found = _forward(step, trace_a, trace_b) or _metrics(step, a, b)
        if found:
            return found

    found = _gradients(case, left, right)
    if found:
        return found
    return Difference(case.steps - 1, "sum over steps", "loss", _distance(a, b, "loss"))


def _forward(step: int, a: Trace, b: Trace) -> Difference | None:
    """The first use of a parameter in an unroll step whose input or output differs."""
    for (leaf, number), mine in a.events.items():
        if number != step:
            continue

        other = b.events.get((leaf, number))
        if other is None:
            return Difference(step, "not there on the other side", leaf, -1)

        if not torch.equal(mine.before, other.before):
            return Difference(step, ROWS[leaf].before, leaf, ulps(mine.before, other.before))

        if not torch.equal(mine.after, other.after):
            operation = "product with the weight"
            return Difference(step, operation, leaf, ulps(mine.after, other.after))
    return None


def _metrics(step: int, a: Result, b: Result) -> Difference | None:
    """The first metric that differs in an unroll step."""
    for name in METRICS:
        mine = a[name][step]
        other = b[name][step]
        if mine.dtype != other.dtype or not torch.equal(mine, other):
            return Difference(step, "loss and metrics", name, ulps(mine, other))
    return None


def _gradients(case: Case, left: Run, right: Run) -> Difference | None:
    """The first unroll length at which a gradient differs.

    The last step of that unroll is the one; of its leaves, the first that the backward pass gets
    to: the last that the forward pass uses.
    """
    used = dict.fromkeys(leaf for leaf, _ in left.trace(case).events)
    unseen = table.shapes(case.draft()).keys() - used.keys()
    for steps in range(1, case.steps + 1):
        short = replace(case, steps=steps)
        a = left.result(short)
        b = right.result(short)
        unequal = differences(a, b)
        for leaf in [*reversed(used), *sorted(unseen)]:
            if leaf in unequal:
                return Difference(steps - 1, "backward", leaf, _distance(a, b, leaf))
    return None


def _distance(a: Result, b: Result, name: str) -> int:
    if name not in a or name not in b:
        return -1
    return ulps(a[name], b[name])
