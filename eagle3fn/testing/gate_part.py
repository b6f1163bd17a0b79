"""What all parts of the CUDA gate share: options, time, faults, and a result file that grows."""

import argparse
import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from eagle3fn.base.files import write_json

BEGAN = "EAGLE3FN_PART_BEGAN"
"""An environment variable: the monotonic clock when the gate started the part."""

KEPT_FAULTS = 100
KEPT_CHARACTERS = 6000  # the end of a traceback
LONGEST_START = 120.0  # seconds; an older `BEGAN` was meant for another process
PAUSE = 0.5  # seconds between two writes of a result that changes often


def part_options(parser: argparse.ArgumentParser) -> None:
    """The options that the gate gives to each part."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="no work begins later")
    parser.add_argument("--out", type=Path, required=True, help="the result, rewritten as it grows")


def parse_part(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> Any:
    """The options; a time that is not above 0 and a missing device end the process, with 2."""
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds {options.seconds}: must be above 0, or nothing is run")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is there; --device cpu rehearses on the CPU")
    return options


def began() -> float:
    """When the gate started this process, on the monotonic clock in seconds; now if it did not."""
    now = time.monotonic()
    try:
        start = float(os.environ[BEGAN])
    except (KeyError, ValueError):
        return now
    return start if 0 <= now - start < LONGEST_START else now


def run_part(main: Callable[[], int]) -> NoReturn:
    """Run a part as this process and exit with its code.

    A part that crashes, or gets a SIGTERM, prints its threads' stacks on stderr.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    sys.exit(main())


class Report:
    """A part's result: `faults`, `more_faults`, `left_out`, and the part's own entries.

    The file is written whole each time; threads may share a report.
    """

    def __init__(self, out: Path, seconds: float, before: dict[str, Any] | None = None) -> None:
        self.out = out
        self.end = began() + seconds
        empty = {"faults": [], "more_faults": 0, "left_out": []}
        self.result: dict[str, Any] = empty | (before or {})
        self.written = 0.0  # when, on the monotonic clock
        self.lock = threading.RLock()

    def left(self) -> float:
        """Seconds until the part's time is over."""
        return self.end - time.monotonic()

    def write(self) -> None:
        """Write the result as it is now."""
        with self.lock:
            write_json(self.out, self.result)
            self.written = time.monotonic()

    def change(self, function: Callable[[dict[str, Any]], None]) -> None:
        """Change the result, from any thread; it is written at most every `PAUSE` seconds."""
        with self.lock:
            function(self.result)
            if time.monotonic() > self.written + PAUSE:
                self.write()

    def leave_out(self, what: str) -> None:
        """Record work that time did not allow."""
        self.change(lambda result: result["left_out"].append(what))

    def fault(self, where: str, text: str) -> None:
        """Record a fault with its traceback or another text; beyond `KEPT_FAULTS` it is counted."""

        def add(result: dict[str, Any]) -> None:
            if len(result["faults"]) < KEPT_FAULTS:
                result["faults"].append({"where": where, "traceback": text[-KEPT_CHARACTERS:]})
            else:
                result["more_faults"] += 1

        self.change(add)
        print(f"fault in {where}: {last_line(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def guarded(self, where: str) -> Iterator[None]:
        """An exception inside is recorded as a fault; the code after it runs."""
        try:
            yield
        except Exception:
            self.fault(where, traceback.format_exc())

    def finish(self) -> int:
        """Write the result and print its counts.

        Returns:
            The exit code: 0 without a fault, else 1.
        """
        self.write()
        counts = {name: len(self.result[name]) for name in ("faults", "left_out")}
        print(json.dumps(counts), flush=True)
        return 1 if self.result["faults"] else 0


def last_line(text: str) -> str:
    """The line of a traceback that names the exception."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def context_lost(device: str) -> bool:
    """Whether this process can no longer use its card: after an illegal access every call fails."""
    if device == "cpu":
        return False
    try:
        return int(torch.ones((), device=device) + 1) != 2
    except RuntimeError:
        return True
