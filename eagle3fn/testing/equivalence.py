"""`assert_equivalent(my_forward_loss)`: a changed objective against another one, on drawn cases."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from eagle3fn.model.forward import forward_loss
from eagle3fn.testing import results
from eagle3fn.testing.builders import Case
from eagle3fn.testing.results import ForwardLoss, Result, differences, run_forward
from eagle3fn.testing.strategies import drawn, simplest


def _unchanged(case: Case) -> Case:
    return case


class Side(NamedTuple):
    """One side of a comparison that is not a function of `forward_loss`'s signature."""

    name: str
    """How Python names this side, after `lines`."""

    run: Callable[[Case], Result]
    """Everything that is compared, computed on a case."""

    adapt: Callable[[Case], Case] = _unchanged
    """The nearest case that this side can run; a case that it can run, as it is."""

    lines: tuple[str, ...] = ()
    """Lines of Python that define `name`. They come first, before anything imports torch."""


Against = str | ForwardLoss | Side


def assert_equivalent(
    my_forward_loss: ForwardLoss,
    against: Against = "plain",
    cases: int = 50,
    seed: int = 0,
    ulps: int = 0,
    **pins: Any,
) -> None:
    """Compare loss, per-step losses, acceptance, accuracy counts and every gradient leaf.

    By default two values are equal if `torch.equal` says so. With `ulps`, the floating-point ones
    may differ by rounding, as after sums in another order::

        max |a - b| ≤ ulps · u,    u = spacing of the dtype at the leaf's largest magnitude

    over all elements of a leaf (a loss, a metric, a parameter's gradient). The unit is the leaf's
    and not each element's: an element that is small by cancellation has the absolute error of
    the terms that cancel. A scalar's unit is its own. Shapes, dtypes, integers and infinities have
    to be the same, and NaN equals nothing, as for `torch.equal`.

    Args:
        my_forward_loss: `(params, batch, *, config, frozen) → (loss, aux)`, as
            `eagle3fn.forward_loss`. Its gradients are taken by `eagle3fn.value_and_grad`.
        against: "plain", our own under the plain numerics; a function like the first; or
            a `Side`, whose cases are the drawn ones as it can run them.
        cases: how many are drawn.
        seed: the same cases for the same seed.
        ulps: how far floating-point values may differ, in units in the last place; 0: not at all.
        pins: fields of `Case` with the value they have in every case: `dtype="float32"`.

    Raises:
        AssertionError: something differs. The message names it, with the distance in ulps, and
            ends with lines that repeat the case when pasted. That case is as simple as it still
            fails.
        ValueError: fewer than one case, which would pass whatever is given; a negative `ulps`;
            an unknown `against`; or a pin that is not a field of `Case`.
        Exception: whatever a side raises on a case; a note on it ends with lines that repeat that.
    """
    if cases < 1:
        raise ValueError(f"cases = {cases}: must be at least 1, or nothing is compared")
    side = _side(against)
    for case in drawn(cases, seed, **pins):
        _compare(my_forward_loss, against, side, side.adapt(case), ulps, pinned=pins)


def assert_case(
    my_forward_loss: ForwardLoss, case: Case, against: Against = "plain", ulps: int = 0
) -> None:
    """`assert_equivalent` on one case."""
    _compare(my_forward_loss, against, _side(against), case, ulps)


def _side(against: Against) -> Side:
    if isinstance(against, Side):
        return against
    if callable(against):
        return Side(_name(against), lambda case: run_forward(against, case))
    if against == "plain":
        return Side(repr(against), lambda case: run_forward(forward_loss, case))
    raise ValueError(f"against = {against!r}: must be 'plain', a function or a Side")


def _compare(
    mine: ForwardLoss,
    against: Against,
    side: Side,
    case: Case,
    ulps: int,
    pinned: Collection[str] = (),
) -> None:
    assert_same(
        left=lambda case: run_forward(mine, case),
        right=side.run,
        case=case,
        repeat=lambda case: snippet(mine, case, against, ulps),
        can_run=lambda case: side.adapt(case) == case,
        ulps=ulps,
        pinned=pinned,
    )


def assert_same(
    left: Callable[[Case], Result],
    right: Callable[[Case], Result],
    case: Case,
    repeat: Callable[[Case], str],
    can_run: Callable[[Case], bool] = lambda case: True,
    ulps: int = 0,
    pinned: Collection[str] = (),
) -> None:
    """Compare two sides' results on a case.

    Args:
        left: computes one side's result.
        right: computes the other's.
        case: the case to compare on.
        repeat: lines of Python that repeat the comparison on a case.
        can_run: whether both sides can run a simpler case.
        ulps: as for `assert_equivalent`.
        pinned: fields that a simpler case keeps.

    Raises:
        AssertionError: what differs and how far, and the lines of `repeat`, for the simplest case
            that still differs.
        ValueError: `ulps` is no whole number, or negative.
    """
    if not isinstance(ulps, int) or ulps < 0:
        raise ValueError(f"ulps = {ulps}: must be a whole number, at least 0")

    # What a side raises goes to the caller, with lines that repeat it.
    try:
        unequal = differences(left(case), right(case), ulps)
    except Exception as error:
        error.add_note(f"to repeat it:\n{repeat(case)}")
        raise
    if not unequal:
        return

    def fails(simpler: Case) -> bool:
        """Whether the sides differ; a case that one of them cannot run shows nothing."""
        if not can_run(simpler):
            return False
        try:
            return bool(differences(left(simpler), right(simpler), ulps))
        except Exception:
            return False

    # Report the simplest case that still differs.
    case = simplest(case, fails, pinned)
    a = left(case)
    b = right(case)
    lines = [f"  {name}: {_distance(a, b, name, ulps)}" for name in differences(a, b, ulps)]
    raise AssertionError("\n".join(["not equal:", *lines, "to repeat it:", repeat(case)]))


def _distance(left: Result, right: Result, name: str, allowed: int) -> str:
    """How far apart two sides' values of one name are, in words."""
    if name not in left:
        return "missing here"
    if name not in right:
        return "missing there"
    a = left[name]
    b = right[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"

    if allowed > 0 and a.is_floating_point():
        far = results.ulps_at_largest(a, b)
        if far == math.inf:
            return "not finite"
        return f"{far:.3g} ulps at its largest magnitude, {allowed} allowed"

    far = results.ulps(a, b)
    return "not finite" if far < 0 else f"{far} ulps"


def snippet(mine: ForwardLoss, case: Case, against: Against = "plain", ulps: int = 0) -> str:
    """Lines of Python that repeat a comparison.

    A function that is defined inside another one has to be in scope where they are pasted.
    """
    name = _name(mine)
    lines = ["from eagle3fn.testing import Case, assert_case", *_import(mine, name)]

    # The other side: its own lines first, or one more import.
    if isinstance(against, Side):
        other = against.name
        lines = [*against.lines, *lines]
    elif against is mine:
        other = name
    elif callable(against):
        other = _name(against)
        if other == name:
            other = f"other_{name}"
        lines += _import(against, other)
    else:
        other = repr(against)

    allowed = f", ulps={ulps}" if ulps else ""
    return "\n".join([*lines, f"assert_case({name}, {case!r}, against={other}{allowed})"])


def _name(function: ForwardLoss) -> str:
    """The last part of a function's qualified name, as an identifier."""
    qualified = str(getattr(function, "__qualname__", "my_forward_loss"))
    return qualified.rpartition(".")[2].replace("<lambda>", "my_lambda")


def _import(function: ForwardLoss, name: str) -> list[str]:
    """The line that imports a module's function as `name`.

    No line for a method, a nested function or one of `__main__`, which cannot be imported.
    """
    module = getattr(function, "__module__", None)
    own = getattr(function, "__qualname__", "<locals>")
    if not own.isidentifier() or module in (None, "__main__"):
        return []
    renamed = "" if own == name else f" as {name}"
    return [f"from {module} import {own}{renamed}"]
