"""`assert_equivalent(my_forward_loss)`: a changed objective held against ours, or the old tool, on drawn cases."""

from collections.abc import Callable
from typing import Any

from eagle3fn.model.forward import forward_loss
from eagle3fn.specforge import oracle
from eagle3fn.testing.builders import Case
from eagle3fn.testing.results import ForwardLoss, Result, differences, run_forward, ulps
from eagle3fn.testing.strategies import drawn, for_oracle, simplest

Against = str | ForwardLoss


def assert_equivalent(
    my_forward_loss: ForwardLoss,
    against: Against = "plain",
    cases: int = 50,
    seed: int = 0,
    **fixed: Any,
) -> None:
    """Compare loss, per-step losses, acceptance, accuracy counts and every gradient leaf by `torch.equal`.

    Args:
        my_forward_loss: `(params, batch, *, config, frozen) → (loss, aux)`, as `eagle3fn.forward_loss`. Its gradients
            are taken by `eagle3fn.value_and_grad`.
        against: "legacy", our own under the legacy numerics; "oracle", the old tool; or a function like the first.
        cases: how many are drawn.
        seed: the same cases for the same seed.
        fixed: fields of `Case` to pin, as `dtype="float32"` or `loss="kl"`.

    Raises:
        AssertionError: something differs; the message names it, with the distance in representable values (ulps),
            and ends with lines that repeat the case, made as plain as it still fails, when pasted.
        OracleMissingError: `against="oracle"` and no old tool is at hand; the message says what to install.
        ValueError: fewer than one case, which would pass whatever is given; or an unknown `against`.
        Exception: whatever a side raises on a case; a note on it ends with lines that repeat that.
    """
    if cases < 1:
        raise ValueError(f"cases = {cases}: must be at least 1, or nothing is compared")
    expected = _runner(against)
    for case in drawn(cases, seed, **fixed):
        _compare(
            my_forward_loss, against, expected, for_oracle(case) if against == "oracle" else case
        )


def assert_case(my_forward_loss: ForwardLoss, case: Case, against: Against = "plain") -> None:
    """`assert_equivalent` on one case."""
    _compare(my_forward_loss, against, _runner(against), case)


def _runner(against: Against) -> Callable[[Case], Result]:
    if callable(against):
        return lambda case: run_forward(against, case)
    if against == "plain":
        return lambda case: run_forward(forward_loss, case)
    if against == "oracle":
        found = oracle.load_oracle()
        return lambda case: oracle.run_oracle(found, case)
    raise ValueError(f"against = {against!r}: must be 'plain', 'oracle' or a function")


def _compare(
    mine: ForwardLoss, against: Against, expected: Callable[[Case], Result], case: Case
) -> None:
    def known(case: Case) -> bool:
        return against != "oracle" or for_oracle(case) == case

    assert_same(
        lambda case: run_forward(mine, case),
        expected,
        case,
        lambda case: snippet(mine, case, against),
        known,
    )


def assert_same(
    left: Callable[[Case], Result],
    right: Callable[[Case], Result],
    case: Case,
    repeat: Callable[[Case], str],
    known: Callable[[Case], bool] = lambda case: True,
) -> None:
    """Compare two sides' results on a case by `torch.equal`.

    Raises:
        AssertionError: what differs and how far, and the lines of `repeat`, for the plainest case that still
            differs and is `known` to both sides.
    """
    try:
        unequal = differences(left(case), right(case))
    except Exception as error:
        error.add_note(f"to repeat it:\n{repeat(case)}")
        raise
    if unequal:
        case = simplest(case, lambda simpler: known(simpler) and _differ(left, right, simpler))
        a, b = left(case), right(case)
        lines = [f"  {name}: {_distance(a, b, name)}" for name in differences(a, b)]
        raise AssertionError("\n".join(["not equal:", *lines, "to repeat it:", repeat(case)]))


def _differ(left: Callable[[Case], Result], right: Callable[[Case], Result], case: Case) -> bool:
    """Whether two sides differ on a case; one that a side cannot run shows nothing."""
    try:
        return bool(differences(left(case), right(case)))
    except Exception:
        return False


def _distance(left: Result, right: Result, name: str) -> str:
    if name not in left or name not in right:
        return f"missing {'here' if name not in left else 'there'}"
    far = ulps(left[name], right[name])
    shape = f"{left[name].dtype} {tuple(left[name].shape)} against {right[name].dtype} {tuple(right[name].shape)}"
    return f"{far} ulps" if far >= 0 else f"not finite, or {shape}"


def snippet(mine: ForwardLoss, case: Case, against: Against = "plain") -> str:
    """Lines of Python that repeat a comparison; a function defined inside another one has to be in scope."""
    before = "import os\n\nos.environ.update(TRITON_INTERPRET='1', TORCHDYNAMO_DISABLE='1')  # before torch is loaded\n"
    lines = [before] if against == "oracle" else []
    name = _name(mine)
    lines += ["from eagle3fn.testing import Case, assert_case", *_import(mine, name)]
    other = repr(against)
    if callable(against):
        other = _name(against) if against is mine or _name(against) != name else f"other_{name}"
        lines += _import(against, other) if against is not mine else []
    return "\n".join([*lines, f"assert_case({name}, {case!r}, against={other})"])


def _name(function: ForwardLoss) -> str:
    return (
        str(getattr(function, "__qualname__", "my_forward_loss"))
        .rpartition(".")[2]
        .replace("<lambda>", "my_lambda")
    )


def _import(function: ForwardLoss, name: str) -> list[str]:
    """The line that imports a module's function as `name`; none for another, as a method or one of `__main__`."""
    module, own = (
        getattr(function, "__module__", None),
        getattr(function, "__qualname__", "<locals>"),
    )
    known = own.isidentifier() and module not in (None, "__main__")
    return [f"from {module} import {own}" + (f" as {name}" if name != own else "")] if known else []
