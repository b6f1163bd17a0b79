"""Parity on a card, a part of the CUDA gate.

`python -m tests.gate.parity --seconds N --out FILE` runs the tests that take a device, and the
claims of `certificate.CLAIMS`: three bit-parity checks and one drift measurement. Each has a
process with its own environment: all at once, or on a single core one after the other. Every fault
is recorded and the next case runs.

Exit code 0: everything passed; 1: a difference, an exception, a control that failed, a skip, or no
case or test at all. `--device cpu` is a rehearsal, with interpreted kernels and `sdpa` alone; it
certifies nothing about CUDA.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eagle3fn.specforge.oracle import ENVIRONMENT
from eagle3fn.testing.gate_part import Report, parse_part, part_options, run_part
from tests.gate.device_tests import run_tests
from tests.gate.process import follow
from tests.specforge.certificate import CLAIMS, failures

NOT_ON_CPU = {
    "flex_attention": "flex_attention has no backward on the CPU",
    "dynamo": "SpecForge's kernels are interpreted on the CPU",
}
NAMES = ("tests", *CLAIMS)
TESTS_SHARE = 0.6  # of the time, where the jobs run one after the other
RESTARTS = 3  # of a claim whose process could no longer use its card
EMPTY_CLAIM = {
    "cases": 0,
    "undecidable": 0,
    "nontrivial": 0,
    "equal_old_kernel": 0,
    "equal_own_kernel": 0,
    "reordering_seen": 0,
    "raised": 0,
    "first_difference": None,
    "error": None,
}

Job = Callable[[float], None]
"""Runs until it is done, or for so many seconds at most."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part_options(parser)
    parser.add_argument("--only", choices=NAMES, help="the tests, or one claim")
    parser.add_argument("--cases", type=int, default=10**6, help="cases of a claim at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_part(parser, arguments)
    if options.cases < 1:
        parser.error(f"--cases {options.cases}: must be above 0, or nothing is compared")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the part."""
    options = parse(arguments)
    report = Report(options.out, options.seconds, first_result(options))
    report.write()

    names = names_of(options)
    jobs = {name: job_of(name, options, report) for name in names}
    run_jobs(jobs, report, jobs_at_once())

    # A claim that compared nothing, or too little, has not passed either.
    claims = tuple(name for name in names if name != "tests")
    for fault in failures(report.result, claims) if claims else []:
        report.fault("claims", fault)
    return report.finish()


def names_of(options: argparse.Namespace) -> list[str]:
    """The names of what is run, in this order."""
    names = [name for name in NAMES if options.device == "cuda" or name not in NOT_ON_CPU]
    return [name for name in names if options.only in (None, name)]


def jobs_at_once() -> int:
    """How many jobs run at once: all, since nothing here is timed; on a single core one."""
    return len(NAMES) if (os.cpu_count() or 1) > 1 else 1


def first_result(options: argparse.Namespace) -> dict[str, Any]:
    """The result before the first case."""
    return {
        "device": options.device,
        "seed": options.seed,
        "flags": {name: environment(name, options.device) for name in NAMES},
        "oracle": None,
        "tests": None,
        "claims": {},
        "not_run": {} if options.device == "cuda" else NOT_ON_CPU,
    }


def environment(name: str, device: str) -> dict[str, str]:
    """The variables of a job's process that matter to torch and Triton."""
    if device == "cpu":
        return dict(ENVIRONMENT)
    flags = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return flags if name == "dynamo" else flags | {"TORCHDYNAMO_DISABLE": "1"}


def whole_environment(name: str, device: str) -> dict[str, str]:
    """This process's variables, with those of `environment` and without the oracle's others."""
    kept = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    return kept | environment(name, device)


def run_jobs(jobs: dict[str, Job], report: Report, at_once: int) -> None:
    """Run the jobs in their order, so many at a time, each with its share of the time left."""
    todo = list(jobs)
    lock = threading.Lock()

    def run(name: str) -> None:
        with lock:
            share = 1.0 if at_once > 1 else share_of(todo)
            todo.remove(name)
        seconds = report.left() * share
        if seconds <= 0:
            report.leave_out(name)
            return
        with report.guarded(name):
            jobs[name](seconds)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, jobs))


def share_of(todo: list[str]) -> float:
    """The next job's share of the time that is left; the jobs after it get the rest."""
    return TESTS_SHARE if todo[0] == "tests" and len(todo) > 1 else 1 / len(todo)


def job_of(name: str, options: argparse.Namespace, report: Report) -> Job:
    """The tests, or a claim."""
    if name != "tests":
        return lambda seconds: run_claim(name, options, report, seconds)
    variables = whole_environment(name, options.device)
    return lambda seconds: run_tests(report, options.device, variables, seconds)


def run_claim(name: str, options: argparse.Namespace, report: Report, seconds: float) -> None:
    """Add the rows of a claim's process to the report.

    If a case leaves the process without a usable card, another process goes on after that case.
    """
    end = time.monotonic() + seconds
    next_case: int | None = 0
    restarts = 0
    while next_case is not None:
        first, next_case = next_case, None
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            command = claim_command(name, options, first, rows, max(end - time.monotonic(), 0.0))
            for row in follow(command, whole_environment(name, options.device), rows, end):
                if "lost" in row and restarts < RESTARTS and time.monotonic() < end:
                    next_case = row["lost"] + 1
                    restarts += 1
                report.change(lambda result, row=row: fold(result, name, row))
                if "raised" in row:
                    report.fault(f"{name}: {row['raised']}", row["traceback"])


def claim_command(
    name: str, options: argparse.Namespace, first: int, rows: Path, seconds: float
) -> list[str]:
    """The command of a claim's process, from the case `first` on."""
    words = [f"--claim={name}", f"--device={options.device}", f"--seconds={seconds:f}"]
    words += [f"--first={first}", f"--stop={options.cases}", f"--seed={options.seed}"]
    return [sys.executable, "-m", "tests.specforge.cuda_claims", *words, f"--rows={rows}"]


def fold(result: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Add a row of a claim's process to the result."""
    if "oracle" in row:
        result["oracle"] = row["oracle"]
        return
    claim = result["claims"].setdefault(name, EMPTY_CLAIM | {"list": []})
    if "raised" in row:
        claim["raised"] += 1
    elif "lost" in row:
        claim["lost"] = [*claim.get("lost", []), row["lost"]]
    elif "error" in row:
        _first_error(claim, row["error"])
    elif "exit_code" not in row:
        _fold_case(claim, row)
    elif row["exit_code"]:
        code = row["exit_code"]
        _first_error(claim, f"its process ended with exit code {code}: {row['log']}")


def _first_error(claim: dict[str, Any], text: str) -> None:
    """Record what is wrong with a claim, unless something is recorded already."""
    claim["error"] = claim["error"] or text


def _fold_case(claim: dict[str, Any], row: dict[str, Any]) -> None:
    """Add one compared case to the claim's counts."""
    claim["cases"] += 1
    claim["nontrivial"] += row["nontrivial"]
    claim["list"].append(row)

    # A drift measurement: the largest distance of each kind.
    if "ulps" in row:
        largest = claim.setdefault("ulps", {})
        for kind, distance in row["ulps"].items():
            largest[kind] = max(distance, largest.get(kind, 0))
        if min(row["ulps"].values()) < 0:
            _first_error(claim, f"not finite, so no distance: {row['case']}")
        return

    # A parity check; undecidable where SpecForge differs from itself.
    if not row["decided"]:
        claim["undecidable"] += 1
        return
    claim["equal_old_kernel"] += not row["old_kernel"]
    claim["equal_own_kernel"] += not row["own_kernel"]
    claim["reordering_seen"] += row["reordering_seen"]
    differs = row["old_kernel"] or row["own_kernel"]
    if differs and claim["first_difference"] is None:
        claim["first_difference"] = row


if __name__ == "__main__":
    run_part(main)
