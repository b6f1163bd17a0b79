"""One claim of the CUDA gate in a process of its own: `tests.gate.parity` starts it.

Each case writes one line of JSON to `--rows`. A case that raises is kept with its traceback, and
the next one runs. Only where a card's context is lost does the process end; the gate starts another
one for the cases after it.
"""

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.specforge.oracle import Oracle, OracleMissingError, load_oracle
from eagle3fn.testing.gate_part import context_lost
from eagle3fn.testing.triton_interpreter import mend_interpreter
from tests.specforge.certificate import CLAIMS

DRY_WIDTHS = (100, 1000, 2047)  # of the kernel's cases where it is interpreted


class Named(NamedTuple):
    """A case by its name, and what compares it."""

    name: str
    compare: Callable[[], dict[str, Any]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options that the gate gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claim", choices=tuple(CLAIMS), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument(
        "--seconds", type=float, required=True, help="no case but the first begins later"
    )
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument(
        "--stop", type=int, default=10**6, help="the first case that is not compared"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, required=True, help="gets one line of JSON a case")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compare case after case until the time is over."""
    options = parse(arguments)
    end = time.monotonic() + options.seconds
    torch.use_deterministic_algorithms(options.claim != "dynamo")
    if options.device == "cpu":
        mend_interpreter()
    with options.rows.open("a", encoding="utf-8") as rows:

        def write(row: dict[str, Any]) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        try:
            oracle = load_oracle(native=options.device == "cuda")
        except OracleMissingError as error:
            write({"error": f"no oracle: {error}"})
            return 0
        write({"oracle": {"kind": oracle.kind, "sha256": oracle.digest, "hashes": oracle.hashes}})
        run(claim_cases(options, oracle), options, end, write)
    return 0


def run(
    cases: Iterator[Named],
    options: argparse.Namespace,
    end: float,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Write a row for each case from `options.first` on: what was compared, or how it raised.

    The first one runs whatever the time, as a claim without a case has failed.
    """
    for index, case in enumerate(cases):
        if index < options.first:
            continue
        if index >= options.stop or (index > 0 and time.monotonic() > end):
            return
        try:
            row = case.compare()
        except Exception:
            write({"raised": case.name, "traceback": traceback.format_exc()})
            if context_lost(options.device):
                write({"lost": index})
                return
        else:
            write(row)


def claim_cases(options: argparse.Namespace, oracle: Oracle) -> Iterator[Named]:
    """The cases of a claim; without end but for the kernel's."""
    from tests.specforge.cuda_cases import WIDTHS, case_at, compare_case, compare_kernel, distance

    device = options.device
    if options.claim == "kernel":
        widths = WIDTHS if device == "cuda" else DRY_WIDTHS
        for width, dtype in itertools.product(widths, (torch.float32, torch.bfloat16)):
            compare = partial(compare_kernel, oracle, width, dtype, device)
            yield Named(f"{width} columns, {dtype}", compare)
        return

    for index in itertools.count():
        case = case_at(index, options.seed, device)
        if options.claim == "dynamo":
            compare = partial(distance, oracle, case, device)
        else:
            compare = partial(compare_case, oracle, case, options.claim, device)
        yield Named(repr(case), compare)


if __name__ == "__main__":
    sys.exit(main())
