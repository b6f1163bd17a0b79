"""Peak memory of one side's steps, in this process alone."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEANING = {
    "peak": "largest while stepping",
    "inputs": "before the side was made: process, frozen tensors, batch",
    "idle": "before the first step: with weights, masters and moments",
    "step": "peak - inputs: weights, masters, moments, gradients and everything in between; memory_ratio's",
}


class Measured(NamedTuple):
    """A side whose memory was measured: what makes a step, what its first one returned, bytes by `MEANING`'s names."""

    update: Callable[[], Any]
    first: Any
    used: dict[str, int]


def measure(make: Callable[[], Callable[[], Any]], steps: int, device: str) -> dict[str, Any]:
    """Bytes (see `MEANING`) of `steps` calls of what `make` returns; resident set on CPU, allocated bytes on CUDA."""
    return measured(make, steps, device).used


def measured(make: Callable[[], Callable[[], Any]], steps: int, device: str) -> Measured:
    """The same, and the side itself: where allocated bytes are counted, others may live beside it."""
    inputs = now(device)
    update = make()
    idle = now(device)
    reset(device)
    first = update()
    for _ in range(steps - 1):
        update()
    peak = largest(device)
    return Measured(
        update, first, {"peak": peak, "inputs": inputs, "idle": idle, "step": peak - inputs}
    )


def now(device: str) -> int:
    """Bytes in use, after garbage went back to the system."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return _status("VmRSS")


def reset(device: str) -> None:
    """Begin a new maximum."""
    if device == "cpu":
        CLEAR.write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def largest(device: str) -> int:
    """The maximum since `reset`."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
