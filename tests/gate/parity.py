"""Parity on a CUDA card: `python -m tests.gate.parity --seconds N --out FILE`, a part of the CUDA gate.

The tests that take a device, then three claims of parity and one distance, each in a process of its own with its own
environment: all at once, or on a single core one after the other. Every fault is kept and the next case runs. Exit code
0: everything passed; 1: a difference, an exception, a control that failed, a skip, or no case or test at all.
`--device cpu` is a rehearsal: the kernels interpreted, `sdpa` alone; it certifies nothing about CUDA.
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
TESTS_SHARE = 0.6  # of the time, where one thing is done after the other
RESTARTS = 3  # of a claim whose process lost its card
START = {
    "cases": 0,
    "undecidable": 0,
    "nontrivial": 0,
    "equal_old_kernel": 0,
    "equal_own_kernel": 0,
}
START |= {"reordering_seen": 0, "raised": 0, "first_difference": None, "error": None, "list": []}

Job = Callable[[float], None]
"""Runs until it is done, or for so many seconds."""


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
    """The part."""
    options = parse(arguments)
    report = Report(options.out, options.seconds, first_result(options))
    report.write()
    names = names_of(options)
    run_jobs({name: job_of(name, options, report) for name in names}, report, jobs_at_once())
    claims = tuple(name for name in names if name != "tests")
    for fault in failures(report.result, claims) if claims else []:
        report.fault("claims", fault)
    return report.finish()


def names_of(options: argparse.Namespace) -> list[str]:
    """What is run, in this order."""
    names = [name for name in NAMES if options.device == "cuda" or name not in NOT_ON_CPU]
    return [name for name in names if options.only in (None, name)]


def jobs_at_once() -> int:
    """Everything, as nothing here is timed and each has more time then; on a single core one job."""
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
    """What a process finds set before torch is loaded; the oracle's other variables are not there."""
    if device == "cpu":
        return dict(ENVIRONMENT)
    flags = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return flags if name == "dynamo" else flags | {"TORCHDYNAMO_DISABLE": "1"}


def whole_environment(name: str, device: str) -> dict[str, str]:
    """This process's own, with the variables of `environment` and without the oracle's others."""
    kept = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    return kept | environment(name, device)


def run_jobs(jobs: dict[str, Job], report: Report, at_once: int) -> None:
    """Run the jobs in their order, so many at a time; of the time that is left each has its share."""
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
    """The next one's share of the time that is left, where what comes after it gets the rest."""
    return TESTS_SHARE if todo[0] == "tests" and len(todo) > 1 else 1 / len(todo)


def job_of(name: str, options: argparse.Namespace, report: Report) -> Job:
    """The tests, or a claim."""
    if name == "tests":
        return lambda seconds: run_tests(
            report, options.device, whole_environment(name, options.device), seconds
        )
    return lambda seconds: run_claim(name, options, report, seconds)


def run_claim(name: str, options: argparse.Namespace, report: Report, seconds: float) -> None:
    """Fold in what a claim's processes say; another one goes on where one lost its card."""
    end = time.monotonic() + seconds
    first, restarts = 0, 0
    while first is not None:
        start, first = first, None
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            command = [sys.executable, "-m", "tests.specforge.cuda_claims", "--claim", name]
            command += [
                "--device",
                options.device,
                f"--seconds={max(end - time.monotonic(), 0.0):f}",
            ]
            command += [
                f"--first={start}",
                f"--stop={options.cases}",
                f"--seed={options.seed}",
                "--rows",
                str(rows),
            ]
            for row in follow(command, whole_environment(name, options.device), rows, end):
                if "lost" in row and restarts < RESTARTS and time.monotonic() < end:
                    first, restarts = row["lost"] + 1, restarts + 1
                report.change(lambda result, row=row: fold(result, name, row))
                if "raised" in row:
                    report.fault(f"{name}: {row['raised']}", row["traceback"])


def fold(result: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Add a line of a claim's process to the result."""
    if "oracle" in row:
        result["oracle"] = row["oracle"]
        return
    claim = result["claims"].setdefault(name, START | {"list": []})
    if "raised" in row:
        claim["raised"] += 1
    elif "lost" in row:
        claim["lost"] = [*claim.get("lost", []), row["lost"]]
    elif "exit_code" in row:
        if row["exit_code"]:
            claim["error"] = (
                claim["error"]
                or f"its process ended with exit code {row['exit_code']}: {row['log']}"
            )
    elif "error" in row:
        claim["error"] = claim["error"] or row["error"]
    else:
        _fold_case(claim, row)


def _fold_case(claim: dict[str, Any], row: dict[str, Any]) -> None:
    claim["cases"] += 1
    claim["nontrivial"] += row["nontrivial"]
    claim["list"].append(row)
    if "ulps" in row:
        before = claim.setdefault("ulps", {})
        claim["ulps"] = {key: max(far, before.get(key, 0)) for key, far in row["ulps"].items()}
        if min(row["ulps"].values()) < 0:
            claim["error"] = claim["error"] or f"not finite, so no distance: {row['case']}"
    elif not row["decided"]:
        claim["undecidable"] += 1
    else:
        claim["equal_old_kernel"] += not row["old_kernel"]
        claim["equal_own_kernel"] += not row["own_kernel"]
        claim["reordering_seen"] += row["reordering_seen"]
        if claim["first_difference"] is None and (row["old_kernel"] or row["own_kernel"]):
            claim["first_difference"] = row


if __name__ == "__main__":
    run_part(main)
