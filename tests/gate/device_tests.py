"""The tests that take a device, run by pytest in a process of its own; each one's outcome is kept as it ends."""

import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import eagle3fn
from eagle3fn.testing.gate_part import Report
from tests.gate.process import follow

ROOT = Path(eagle3fn.__file__).parent.parent
PROFILE = "gate"  # of Hypothesis, in tests/conftest.py
RESTARTS = 2
LOST = re.compile(
    r"CUDA error: (?!out of memory)|device-side assert|illegal memory access|misaligned address"
)
KEPT_SLOW = 10
ENDED = ("passed", "failed", "skipped")


def run_tests(report: Report, device: str, environment: dict[str, str], seconds: float) -> None:
    """Run them for so long; a failure, a skip, and no test at all are faults.

    A test that lost its card fails alone: another process goes on with those after it.
    """
    end = time.monotonic() + seconds
    environment = environment | {"TEST_DEVICE": device, "HYPOTHESIS_PROFILE": PROFILE}
    seen = {"collected": [], "outcomes": {}}
    code, log = run_once(report, seen, environment, end, [])
    for _ in range(RESTARTS):
        left = [name for name in seen["collected"] if name not in seen["outcomes"]]
        if code != "lost" or not left or time.monotonic() >= end:
            break
        code, log = run_once(report, seen, environment, end, left)
    conclude(report, seen, code, log)


def run_once(
    report: Report, seen: dict[str, Any], environment: dict[str, str], end: float, names: list[str]
) -> tuple[int | str | None, str]:
    """One process over these tests (none: all). Its exit code, "lost", or None if it had to be ended; its log."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "outcomes.jsonl"
        left = max(end - time.monotonic(), 0.0)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "device",
            "--outcomes",
            str(rows),
            f"--seconds={left:f}",
        ]
        command += ["-p", "no:cacheprovider", *(names or [str(ROOT / "tests")])]
        reasons: set[str] = set()
        for row in follow(command, environment, rows, end):
            if "exit_code" in row:
                return row["exit_code"], row["log"]
            if "collected" in row and not seen["collected"]:
                seen["collected"] = row["collected"]
            if row.get("outcome") in ENDED:
                seen["outcomes"][row["test"]] = row
                report.change(lambda result: result.update(tests=counts(seen)))
                text = row.get("text") or ""
                if row["outcome"] == "failed" or (
                    row["outcome"] == "skipped" and text not in reasons
                ):
                    report.fault(f"{row['outcome']}: {row['test']}", text)
                    reasons.add(
                        text
                    )  # of many tests skipped for one reason the first is told, and all are counted
                if row["outcome"] == "failed" and LOST.search(text):
                    return "lost", ""
    raise AssertionError("a process that is followed ends with its exit code")


def counts(seen: dict[str, Any]) -> dict[str, Any]:
    """How many of the tests passed, failed, were skipped and did not end; the slowest."""
    rows = list(seen["outcomes"].values())
    found = Counter(row["outcome"] for row in rows)
    slowest = sorted(rows, key=lambda row: -row.get("seconds", 0.0))[:KEPT_SLOW]
    return {
        "collected": len(seen["collected"]),
        **{name: found[name] for name in ENDED},
        "left_out": len(set(seen["collected"]) - set(seen["outcomes"])),
        "files": by_file(seen),
        "slowest": {row["test"]: round(row.get("seconds", 0.0), 2) for row in slowest},
    }


def by_file(seen: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Of each file's tests how many were collected, ended and passed."""
    every = Counter(name.partition("::")[0] for name in seen["collected"])
    good = Counter(
        name.partition("::")[0]
        for name, row in seen["outcomes"].items()
        if row["outcome"] == "passed"
    )
    ended = Counter(name.partition("::")[0] for name in seen["outcomes"])
    return {
        file: {"all": every[file], "ended": ended[file], "passed": good[file]} for file in every
    }


def conclude(report: Report, seen: dict[str, Any], code: int | str | None, log: str) -> None:
    """Add what the outcomes alone do not say: nothing ran, pytest itself failed, what time did not allow."""
    report.change(lambda result: result.update(tests=counts(seen)))
    told = counts(seen)
    if not told["passed"] + told["failed"]:
        report.fault(
            "tests",
            f"{log}\nno test ran, of {told['collected']} collected (exit code {code} of pytest)",
        )
    elif code not in (0, None, "lost") and not (code == 1 and told["failed"]):
        report.fault("tests", f"{log}\npytest ended with exit code {code}")
    for name in seen["collected"]:
        if name not in seen["outcomes"]:
            report.leave_out(f"test {name}")
