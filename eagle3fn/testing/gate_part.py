"""What every part of the CUDA gate shares: its options, its time, its faults, and a result file that grows."""

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

KEPT_FAULTS = 100
KEPT_CHARACTERS = 6000  # of a traceback, its end
BEGAN = (
    "EAGLE3FN_PART_BEGAN"  # a variable of the gate: the monotonic clock when it started the part
)
LONGEST_START = 120.0  # seconds; what says more was meant for another process
PAUSE = 0.5  # seconds between two writings of a result that changes often


def part_options(parser: argparse.ArgumentParser) -> None:
    """The options that the gate gives to each part."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="nothing begins later")
    parser.add_argument("--out", type=Path, required=True, help="the result, rewritten as it grows")


def parse_part(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> Any:
    """Parse; refuse a time that is none, and a device that is not there."""
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds {options.seconds}: must be above 0, or nothing is done")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is there; --device cpu rehearses on the CPU")
    return options


def began() -> float:
    """When this process was started, on the monotonic clock, where the gate says so; else now."""
    now = time.monotonic()
    try:
        said = float(os.environ[BEGAN])
    except (KeyError, ValueError):
        return now
    return said if 0 <= now - said < LONGEST_START else now


def run_part(main: Callable[[], int]) -> NoReturn:
    """Run a part as this process. One that crashes, or that hangs and gets a SIGTERM, says on stderr where it was."""
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    sys.exit(main())


class Report:
    """A part's result: `faults`, `left_out`, and what else `result` is given; written whole each time."""

    def __init__(self, out: Path, seconds: float, before: dict[str, Any] | None = None) -> None:
        self.out = out
        self.end = began() + seconds
        kept = {"faults": [], "more_faults": 0, "left_out": []}
        self.result: dict[str, Any] = kept | (before or {})
        self.written = 0.0
        self.lock = threading.RLock()

    def left(self) -> float:
        """Seconds until the part's time is over."""
        return self.end - time.monotonic()

    def write(self) -> None:
        """The result as it is now."""
        with self.lock:
            write_json(self.out, self.result)
            self.written = time.monotonic()

    def change(self, function: Callable[[dict[str, Any]], None]) -> None:
        """Change the result, from any thread; it is written if that was not done a moment ago."""
        with self.lock:
            function(self.result)
            if time.monotonic() > self.written + PAUSE:
                self.write()

    def leave_out(self, what: str) -> None:
        """Say what time did not allow."""
        self.change(lambda result: result["left_out"].append(what))

    def fault(self, where: str, text: str) -> None:
        """Keep a fault with its traceback or another account of it; of very many, count the rest."""

        def add(result: dict[str, Any]) -> None:
            if len(result["faults"]) < KEPT_FAULTS:
                result["faults"].append({"where": where, "traceback": text[-KEPT_CHARACTERS:]})
            else:
                result["more_faults"] += 1

        self.change(add)
        print(f"fault in {where}: {last_line(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def guarded(self, where: str) -> Iterator[None]:
        """An exception inside is a fault and ends nothing else."""
        try:
            yield
        except Exception:
            self.fault(where, traceback.format_exc())

    def finish(self) -> int:
        """Write, say the numbers that are short, and give the exit code: 0 without a fault, else 1."""
        self.write()
        counts = {name: len(self.result[name]) for name in ("faults", "left_out")}
        print(json.dumps(counts), flush=True)
        return 1 if self.result["faults"] else 0


def last_line(text: str) -> str:
    """The line of a traceback that names the exception."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:300]


def context_lost(device: str) -> bool:
    """Whether this process can no longer use its card: an illegal access ends every later call too."""
    if device == "cpu":
        return False
    try:
        return int(torch.ones((), device=device) + 1) != 2
    except RuntimeError:
        return True
