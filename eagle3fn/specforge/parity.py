"""`eagle3fn parity`: our arithmetic against SpecForge's on drawn cases, for anyone to check."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from eagle3fn.base.output import Result, print_error
from eagle3fn.specforge import bisect
from eagle3fn.specforge.arithmetic import forward_loss
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import (
    ENVIRONMENT,
    Oracle,
    OracleMissingError,
    load_oracle,
    run_oracle,
    side,
)
from eagle3fn.testing.builders import Case
from eagle3fn.testing.equivalence import snippet
from eagle3fn.testing.results import differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import drawn

LEVEL = (
    "level 2: SpecForge's loss, a Triton kernel, is replaced by the equal eager expression; "
    "all else is SpecForge's"
)
DIFFERENT = 1
NO_ORACLE = 3


class Tally(NamedTuple):
    """What was compared."""

    cases: list[Case]

    nontrivial: int
    """Cases whose loss and gradients are not all zero."""

    equal: int

    first: Case | None
    """The first case that is not equal."""

    names: list[str]
    """What differs in it."""


def run(
    cases: int,
    seed: int,
    as_json: bool,
    where: bool,
    progress: Callable[[str], Callable[[int, int], None]],
) -> Result:
    """Compare and print.

    SpecForge needs an environment before torch is loaded. Without it, this runs again in a process
    that has it.

    Args:
        cases: how many are drawn.
        seed: the same cases for the same seed.
        as_json: the result and an error are printed as JSON.
        where: name the unroll step and the operation where the first difference begins.
        progress: makes, of a word for what is counted, a function of `(done, total)`.

    Returns:
        The summary, and the exit code: 0, all cases equal; 1, a difference, or only trivial cases;
        3, no SpecForge.
    """
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "eagle3fn.cli", "parity"]
        command += ["--cases", str(cases), "--seed", str(seed)]
        if as_json:
            command.append("--json")
        if where:
            command.append("--bisect")
        done = subprocess.run(command, check=False, env=os.environ | ENVIRONMENT)
        return Result(None, done.returncode)

    try:
        oracle = load_oracle()
    except OracleMissingError as error:
        print_error(f"eagle3fn parity: {error}", NO_ORACLE, as_json)
        return Result(None, NO_ORACLE)

    tally = compare(oracle, [for_specforge(case) for case in drawn(cases, seed)], progress("case"))
    difference = first_difference(oracle, tally, where)
    print(describe(oracle, tally, difference))

    all_equal = tally.equal == len(tally.cases)
    code = 0 if all_equal and tally.nontrivial else DIFFERENT
    return Result(summary(oracle, tally, difference), code)


def compare(
    oracle: Oracle, cases: list[Case], on_progress: Callable[[int, int], None] | None = None
) -> Tally:
    """Run both sides on every case; `on_progress(done, total)` after each."""
    tally = Tally(cases, nontrivial=0, equal=0, first=None, names=[])
    for number, case in enumerate(cases, 1):
        theirs = run_oracle(oracle, case)
        names = differences(run_forward(forward_loss, case), theirs)

        tally = tally._replace(nontrivial=tally.nontrivial + nontrivial(theirs))
        if not names:
            tally = tally._replace(equal=tally.equal + 1)
        elif tally.first is None:
            tally = tally._replace(first=case, names=names)

        if on_progress:
            on_progress(number, len(cases))
    return tally


def first_difference(oracle: Oracle, tally: Tally, where: bool) -> dict[str, Any] | None:
    """The first unequal case and the first leaf that differs in it, with its distance in ulps.

    With `where`, the unroll step and operation at which the difference begins. None if all cases
    are equal.
    """
    if tally.first is None:
        return None
    case = tally.first

    if where:
        found = bisect.first_difference(case, bisect.ours(), bisect.theirs(oracle))
        if found is None:
            return {"case": repr(case), "operation": "gone when repeated"}
        return {"case": repr(case), **found._asdict()}

    leaf = tally.names[0]
    mine = run_forward(forward_loss, case)
    theirs = run_oracle(oracle, case)
    far = ulps(mine[leaf], theirs[leaf]) if leaf in mine and leaf in theirs else -1
    return {"case": repr(case), "leaf": leaf, "ulps": far}


def describe(oracle: Oracle, tally: Tally, difference: dict[str, Any] | None) -> str:
    """The text before the last line: who was compared, on what, how to repeat a difference."""
    lines = [oracle.describe(), LEVEL, f"threads: {torch.get_num_threads()}"]
    lines += describe_counts(counts(tally.cases))
    count = len(tally.cases)
    lines.append(
        f"{tally.equal} of {count} cases equal by torch.equal; "
        f"{tally.nontrivial} of {count} non-trivial"
    )

    if tally.first is not None and difference is not None:
        place = ", ".join(f"{key} {value}" for key, value in difference.items() if key != "case")
        names = ", ".join(tally.names)
        lines += [
            f"first difference: {place}; not equal in that case: {names}",
            "to repeat it:",
            snippet(forward_loss, tally.first, side()),
        ]
    return "\n".join(lines)


def counts(cases: list[Case]) -> dict[str, dict[str, int]]:
    """How many cases have each dtype, loss and unroll length `K`."""
    found = {
        "dtype": Counter(case.dtype for case in cases),
        "loss": Counter(str(case.loss) for case in cases),
        "K": Counter(case.steps for case in cases),
    }
    return {
        name: {str(key): count for key, count in sorted(counter.items())}
        for name, counter in found.items()
    }


def describe_counts(found: dict[str, dict[str, int]]) -> list[str]:
    """One line for each kind of count."""
    lines = []
    for name, kind in found.items():
        numbers = ", ".join(f"{key} {count}" for key, count in kind.items())
        lines.append(f"{name}: {numbers}")
    return lines


def summary(oracle: Oracle, tally: Tally, difference: dict[str, Any] | None) -> dict[str, Any]:
    """The result as JSON values; the oracle by the hash of its used files."""
    return {
        "oracle": {"name": "SpecForge", "kind": oracle.kind, "sha256": oracle.digest, "level": 2},
        "cases": len(tally.cases),
        "nontrivial": tally.nontrivial,
        "equal": tally.equal,
        "first_difference": difference,
    }
