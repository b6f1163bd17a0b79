"""Peak memory of one side's steps, in this process alone.

On the CPU that is the resident set (Linux alone), on CUDA the bytes that PyTorch's allocator has
given out.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

CLEAR = Path("/proc/self/clear_refs")
NEW_MAXIMUM = "5"  # written to CLEAR, it begins a new VmHWM
MEANING = {
    "peak": "largest while stepping",
    "inputs": "before the side was made: process, frozen tensors, batch",
    "idle": "before the first step: with weights, masters and moments",
    "step": "peak - inputs: weights, masters, moments, gradients and everything in between; "
    "memory_ratio's",
}


class Measured(NamedTuple):
    """A side whose memory was measured."""

    update: Callable[[], Any]  # makes a step
    first: Any  # what the first step returned
    used: dict[str, int]  # bytes, by the names of `MEANING`


def measure(make: Callable[[], Callable[[], Any]], steps: int, device: str) -> Measured:
    """Make a side and a few of its steps.

    Where allocated bytes are counted (CUDA), other sides may be alive in the same process.
    """
    inputs = used_now(device)
    update = make()
    idle = used_now(device)

    begin_maximum(device)
    first = update()
    for _ in range(steps - 1):
        update()
    peak = largest(device)

    used = {"peak": peak, "inputs": inputs, "idle": idle, "step": peak - inputs}
    return Measured(update, first, used)


def used_now(device: str) -> int:
    """Bytes in use, after garbage went back to the system."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()

    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return status("VmRSS")


def begin_maximum(device: str) -> None:
    """Begin a new maximum."""
    if device == "cpu":
        CLEAR.write_text(NEW_MAXIMUM)
    else:
        torch.cuda.reset_peak_memory_stats()


def largest(device: str) -> int:
    """The maximum since `begin_maximum`."""
    return status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def status(name: str, process: int | str = "self") -> int:
    """A number of kB of a process's status, in bytes."""
    path = Path(f"/proc/{process}/status")
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path}: no {name}")
