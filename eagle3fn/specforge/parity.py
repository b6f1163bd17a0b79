"""`eagle3fn parity`: our legacy numerics against the old tool on drawn cases, for anyone to check."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from eagle3fn.model.forward import forward_loss
from eagle3fn.specforge import bisect
from eagle3fn.specforge.oracle import (
    ENVIRONMENT,
    Oracle,
    OracleMissingError,
    load_oracle,
    run_oracle,
)
from eagle3fn.testing.builders import Case
from eagle3fn.testing.equivalence import snippet
from eagle3fn.testing.results import differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import drawn, for_oracle

LEVEL = "level 2: the old loss, a Triton kernel, is replaced by the equal eager expression; all else is the old tool's"
DIFFERENT, NO_ORACLE = 1, 3


class Tally(NamedTuple):
    """What was compared, and the first case that is not equal, with the names that differ in it."""

    cases: list[Case]
    nontrivial: int
    equal: int
    first: Case | None
    names: list[str]


def run(
    cases: int,
    seed: int,
    as_json: bool,
    where: bool,
    progress: Callable[[str], Callable[[int, int], None]],
) -> int:
    """Compare, print, and return the exit code: 0 equal; 1 a difference, or only trivial cases; 3 no old tool.

    Without the environment that the old tool needs before torch is loaded, this runs again in a process that has it.
    """
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        flags = [flag for flag, on in (("--json", as_json), ("--bisect", where)) if on]
        command = [
            sys.executable,
            "-m",
            "eagle3fn.cli",
            "parity",
            "--cases",
            str(cases),
            "--seed",
            str(seed),
            *flags,
        ]
        return subprocess.run(command, check=False, env=os.environ | ENVIRONMENT).returncode
    try:
        oracle = load_oracle()
    except OracleMissingError as error:
        print(f"eagle3fn parity: {error}", file=sys.stderr)
        return NO_ORACLE
    tally = compare(oracle, [for_oracle(case) for case in drawn(cases, seed)], progress("case"))
    difference = first_difference(oracle, tally, where)
    print(describe(oracle, tally, difference))
    if as_json:
        print(json.dumps(summary(oracle, tally, difference)))
    return 0 if tally.equal == len(tally.cases) and tally.nontrivial else DIFFERENT


def compare(
    oracle: Oracle, cases: list[Case], on_progress: Callable[[int, int], None] | None = None
) -> Tally:
    """Run both sides on every case."""
    tally = Tally(cases, 0, 0, None, [])
    for number, case in enumerate(cases, 1):
        old = run_oracle(oracle, case)
        names = differences(run_forward(forward_loss, case), old)
        first = (case, names) if names and tally.first is None else (tally.first, tally.names)
        tally = Tally(cases, tally.nontrivial + nontrivial(old), tally.equal + (not names), *first)
        if on_progress:
            on_progress(number, len(cases))
    return tally


def first_difference(oracle: Oracle, tally: Tally, where: bool) -> dict[str, Any] | None:
    """The first unequal case, what differs in it, and with `where` the step and operation it begins with."""
    if tally.first is None:
        return None
    case, leaf = tally.first, tally.names[0]
    if where:
        found = bisect.first_difference(case, bisect.ours(), bisect.theirs(oracle))
        return {"case": repr(case)} | (
            found._asdict() if found else {"operation": "gone when repeated"}
        )
    mine, old = run_forward(forward_loss, case), run_oracle(oracle, case)
    far = ulps(mine[leaf], old[leaf]) if leaf in mine and leaf in old else -1
    return {"case": repr(case), "leaf": leaf, "ulps": far}


def describe(oracle: Oracle, tally: Tally, difference: dict[str, Any] | None) -> str:
    """The text before the last line: who was compared, on what, and lines that repeat a difference."""
    count = len(tally.cases)
    lines = [oracle.describe(), LEVEL, f"threads: {torch.get_num_threads()}"]
    lines += describe_counts(counts(tally.cases))
    lines.append(
        f"{tally.equal} of {count} cases equal by torch.equal; {tally.nontrivial} of {count} non-trivial"
    )
    if tally.first is not None and difference is not None:
        told = ", ".join(f"{key} {value}" for key, value in difference.items() if key != "case")
        lines += [
            f"first difference: {told}; not equal in that case: {', '.join(tally.names)}",
            "to repeat it:",
        ]
        lines.append(snippet(forward_loss, tally.first, "oracle"))
    return "\n".join(lines)


def counts(cases: list[Case]) -> dict[str, dict[str, int]]:
    """How many cases have each dtype, loss and unroll length `K`."""
    fields = {"dtype": "dtype", "loss": "loss", "K": "steps"}
    found = {
        name: Counter(getattr(case, field) for case in cases) for name, field in fields.items()
    }
    return {
        name: {str(key): count for key, count in sorted(counter.items())}
        for name, counter in found.items()
    }


def describe_counts(found: dict[str, dict[str, int]]) -> list[str]:
    """One line for each kind of count."""
    return [
        f"{name}: " + ", ".join(f"{key} {count}" for key, count in kind.items())
        for name, kind in found.items()
    ]


def summary(oracle: Oracle, tally: Tally, difference: dict[str, Any] | None) -> dict[str, Any]:
    """The last line's object; the oracle by the hash of its used files."""
    return {
        "oracle": {"name": "SpecForge", "kind": oracle.kind, "sha256": oracle.digest, "level": 2},
        "cases": len(tally.cases),
        "nontrivial": tally.nontrivial,
        "equal": tally.equal,
        "first_difference": difference,
    }
