"""The tests that take a device, by pytest in a process; outcomes are recorded as tests end."""

import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import eagle3fn
from eagle3fn.testing.gate_part import Report
from tests.gate.process import follow

ROOT = Path(eagle3fn.__file__).parent.parent
PROFILE = "gate"  # of Hypothesis, in tests/conftest.py
RESTARTS = 2
CONTEXT_LOST = re.compile(
    r"CUDA error: (?!out of memory)|device-side assert|illegal memory access|misaligned address"
)
KEPT_SLOW = 10  # tests
ENDED = ("passed", "failed", "skipped")


@dataclass
class Seen:
    """What is known of the tests so far."""

    collected: list[str] = field(default_factory=list)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows of tests that ended
    skip_reasons: set[str] = field(default_factory=set)

    def not_ended(self) -> list[str]:
        """Tests without an outcome, in their order."""
        return [name for name in self.collected if name not in self.outcomes]


@dataclass
class Exit:
    """How a process of pytest ended."""

    code: int | None  # None: it was killed
    log: str = ""
    context_lost: bool = False


def run_tests(report: Report, device: str, environment: dict[str, str], seconds: float) -> None:
    """Run the tests for so long; a failure, a skip, and no test at all are faults.

    A test after which the process can no longer use its card fails alone: another process runs the
    tests after it.
    """
    end = time.monotonic() + seconds
    environment = environment | {"TEST_DEVICE": device, "HYPOTHESIS_PROFILE": PROFILE}
    seen = Seen()

    last = run_once(report, seen, environment, end, [])
    for _ in range(RESTARTS):
        left = seen.not_ended()
        if not last.context_lost or not left or time.monotonic() >= end:
            break
        last = run_once(report, seen, environment, end, left)
    conclude(report, seen, last)


def run_once(
    report: Report, seen: Seen, environment: dict[str, str], end: float, names: list[str]
) -> Exit:
    """One process over these tests; an empty list means all."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "outcomes.jsonl"
        left = max(end - time.monotonic(), 0.0)
        command = [sys.executable, "-m", "pytest", "-m", "device"]
        command += ["--outcomes", str(rows), f"--seconds={left:f}", "-p", "no:cacheprovider"]
        command += names or [str(ROOT / "tests")]

        for row in follow(command, environment, rows, end):
            if "exit_code" in row:
                return Exit(row["exit_code"], row["log"])
            if "collected" in row and not seen.collected:
                seen.collected = row["collected"]
            if row.get("outcome") not in ENDED:
                continue
            record(report, seen, row)
            if row["outcome"] == "failed" and CONTEXT_LOST.search(row.get("text") or ""):
                return Exit(None, context_lost=True)
    raise AssertionError("a process that is followed ends with its exit code")


def record(report: Report, seen: Seen, row: dict[str, Any]) -> None:
    """Add one test's outcome; of tests skipped for the same reason the first alone is a fault."""
    seen.outcomes[row["test"]] = row
    report.change(lambda result: result.update(tests=counts(seen)))

    text = row.get("text") or ""
    new_reason = text not in seen.skip_reasons
    if row["outcome"] == "failed" or (row["outcome"] == "skipped" and new_reason):
        report.fault(f"{row['outcome']}: {row['test']}", text)
    if row["outcome"] == "skipped":
        seen.skip_reasons.add(text)


def counts(seen: Seen) -> dict[str, Any]:
    """How many tests passed, failed, were skipped and did not end; seconds of the slowest."""
    rows = list(seen.outcomes.values())
    found = Counter(row["outcome"] for row in rows)
    slowest = sorted(rows, key=lambda row: -row.get("seconds", 0.0))[:KEPT_SLOW]
    return {
        "collected": len(seen.collected),
        **{name: found[name] for name in ENDED},
        "left_out": len(seen.not_ended()),
        "files": by_file(seen),
        "slowest": {row["test"]: round(row.get("seconds", 0.0), 2) for row in slowest},
    }


def by_file(seen: Seen) -> dict[str, dict[str, int]]:
    """How many tests of each file were collected, ended and passed."""
    found: dict[str, dict[str, int]] = {}
    for name in seen.collected:
        row = found.setdefault(file_of(name), {"all": 0, "ended": 0, "passed": 0})
        row["all"] += 1
        if name in seen.outcomes:
            row["ended"] += 1
            row["passed"] += seen.outcomes[name]["outcome"] == "passed"
    return found


def file_of(test: str) -> str:
    """The file of a test, by pytest's name of it: `tests/a.py::test_b` → `tests/a.py`."""
    return test.partition("::")[0]


def conclude(report: Report, seen: Seen, last: Exit) -> None:
    """Add what no outcome shows: nothing ran, pytest itself failed, what time did not allow."""
    found = counts(seen)
    report.change(lambda result: result.update(tests=found))

    # Exit code 1 is that of a failed test, which is a fault already.
    explained = last.code in (0, None) or (last.code == 1 and found["failed"])
    if not found["passed"] + found["failed"]:
        collected = f"of {found['collected']} collected"
        why = f"no test ran, {collected} (exit code {last.code} of pytest)"
        report.fault("tests", f"{last.log}\n{why}")
    elif not explained:
        report.fault("tests", f"{last.log}\npytest ended with exit code {last.code}")

    for name in seen.not_ended():
        report.leave_out(f"test {name}")
