"""The CUDA gate: `python -m eagle3fn.testing.cuda_gate --out FILE`, three claims of parity and a certificate.

Each claim runs in a process of its own, with its own environment, for its share of the time. The result grows case by
case. Exit code 0: every claim of parity passed; 1: a difference, a control that failed, a skip or no case at all; 3: no
old tool. `--device cpu` is a dry run: the kernels interpreted, `sdpa` alone; it certifies nothing about CUDA.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.files import write_json
from eagle3fn.testing.certificate import CLAIMS, failures, sources
from eagle3fn.testing.oracle import ENVIRONMENT, Oracle, OracleMissingError, load_oracle

NOT_ON_CPU = {
    "flex_attention": "flex_attention has no backward on the CPU",
    "dynamo": "the old tool's kernels are interpreted on the CPU",
}
DRY_WIDTHS = (100, 1000, 2047)
GRACE = 45.0  # seconds beyond its time for a claim's last case, before its process is ended
NO_ORACLE = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; `--claim` is for the processes that the gate starts itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the certificate, a JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case begins later (default 7)")
    parser.add_argument("--cases", type=int, default=10**6, help="cases of a claim at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--claim", choices=tuple(CLAIMS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.claim or (0 < options.minutes < math.inf and options.cases > 0)):
        parser.error(f"--minutes {options.minutes}, --cases {options.cases}: must be above 0, or nothing is compared")
    if options.claim is None and options.out is None:
        parser.error("--out is missing: name the certificate's file")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The gate, or one claim of it."""
    options = parse(arguments)
    if options.claim:
        return run_claim(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("cuda_gate: no CUDA device here, so nothing is verified; --device cpu is a dry run", file=sys.stderr)
        return 1
    return run_gate(options)


def run_gate(options: argparse.Namespace) -> int:
    """Every claim in turn; the certificate is written whenever a case is done."""
    result, end = certificate(options), time.monotonic() + 60 * options.minutes
    names = [name for name in CLAIMS if options.device == "cuda" or name not in NOT_ON_CPU]
    for index, name in enumerate(names):
        share = (end - time.monotonic()) / (len(names) - index)
        for row in claim_rows(name, share, options):
            fold(result, name, row)
            write_json(options.out, result)
    faults = failures(result, tuple(names))
    write_json(options.out, result | {"complete": True, "failures": faults})
    for name, claim in result["claims"].items():
        print(json.dumps({name: {key: value for key, value in claim.items() if key != "list"}}))
    print("\n".join(f"failed: {fault}" for fault in faults) or f"passed: {', '.join(names)} on {options.device}")
    return 0 if not faults else NO_ORACLE if result["oracle"] is None else 1


def certificate(options: argparse.Namespace) -> dict[str, Any]:
    """The result before the first case: what runs where, bound to the hashes of both sides."""
    cuda = options.device == "cuda"
    return {
        "device": options.device,
        "card": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _said(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "flags": {name: environment(name, options.device) for name in CLAIMS},
        "seed": options.seed,
        "minutes": options.minutes,
        "sources": sources(),
        "oracle": None,
        "claims": {},
        "not_run": {} if cuda else NOT_ON_CPU,
        "complete": False,
    }


def environment(claim: str, device: str) -> dict[str, str]:
    """What a claim's process finds set before torch is loaded; the oracle's other variables are not there."""
    if device == "cpu":
        return ENVIRONMENT
    flags = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return flags if claim == "dynamo" else flags | {"TORCHDYNAMO_DISABLE": "1"}


def claim_rows(name: str, seconds: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a claim's process says, line by line; its end if that was not a good one."""
    command = [sys.executable, "-m", "eagle3fn.testing.cuda_gate", "--claim", name, "--device", options.device]
    command += [f"--minutes={max(seconds, 0) / 60}", f"--seed={options.seed}", f"--cases={options.cases}"]
    kept = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept | environment(name, options.device))
    assert child.stdout is not None
    timer = threading.Timer(max(seconds, 0) + GRACE, child.kill)
    timer.start()
    for line in child.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    timer.cancel()
    if child.wait():
        yield {"error": f"its process ended with exit code {child.returncode}"}


def fold(result: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Add a line of a claim's process to the certificate."""
    if "oracle" in row:
        result["oracle"] = row["oracle"]
        return
    start = {"cases": 0, "undecidable": 0, "nontrivial": 0, "equal_old_kernel": 0, "equal_own_kernel": 0}
    start |= {"reordering_seen": 0, "first_difference": None, "error": None, "list": []}
    claim = result["claims"].setdefault(name, start)
    if "error" in row:
        claim["error"] = claim["error"] or row["error"]
        return
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


def run_claim(options: argparse.Namespace) -> int:
    """One claim, one line of JSON a case on stdout. An exception in a case is that claim's error."""
    end = time.monotonic() + 60 * options.minutes
    torch.use_deterministic_algorithms(options.claim != "dynamo")
    try:
        oracle = load_oracle(native=options.device == "cuda")
    except OracleMissingError as error:
        say({"error": f"no oracle: {error}"})
        return 0
    say({"oracle": {"kind": oracle.kind, "sha256": oracle.digest, "hashes": oracle.hashes}})
    for case in itertools.islice(claim_cases(options, oracle), options.cases):
        if time.monotonic() > end:
            break
        try:
            say(case())
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            return 0
    return 0


def claim_cases(options: argparse.Namespace, oracle: Oracle) -> Iterator[Callable[[], dict[str, Any]]]:
    """The cases of a claim, each as a function of nothing; without end but for the kernel's."""
    from eagle3fn.testing.cuda_cases import WIDTHS, case_at, compare_case, compare_kernel, distance

    device = options.device
    if options.claim == "kernel":
        pairs = itertools.product(WIDTHS if device == "cuda" else DRY_WIDTHS, (torch.float32, torch.bfloat16))
        yield from (partial(compare_kernel, oracle, width, dtype, device) for width, dtype in pairs)
        return
    for index in itertools.count():
        case = case_at(index, options.seed, device)
        if options.claim == "dynamo":
            yield partial(distance, oracle, case, device)
        else:
            yield partial(compare_case, oracle, case, options.claim, device)


def say(row: dict[str, Any]) -> None:
    """One line for the gate."""
    print(json.dumps(row), flush=True)


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
