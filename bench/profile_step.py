"""One fast step under the profiler, a part of the CUDA gate: `python -m bench.profile_step --seconds 25 --out FILE`.

The kernels with most time, launches, the share of the step in which the card is idle, and every wait of the host for
the card: there must be none. They are found in two ways: PyTorch's own warnings, with the Python stack, and the CUDA
runtime's calls. On the CPU operators stand for kernels, and reads of values are counted but not judged: that path cuts
its blocks on the host.
"""

import argparse
import contextlib
import json
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import common, sides
from bench.cuda_gate import K, chosen_shape
from bench.problem import draft_of, draw_params, make_problem
from eagle3fn.testing.gate_part import Report, parse_part, part_options, run_part

STEP = "eagle3fn step"
WORK = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
CALLS = ("cuda_runtime", "cuda_driver")
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
)
WAITS += (
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cudaFree",
    "cuMemFree_v2",
)
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
SHOWN, WARM, TIMED = 20, 3, 5
SYNC_WARNING = "called a synchronizing CUDA operation"


class Event(NamedTuple):
    """A span of a trace, in microseconds: `kind` is the trace's category, `place` the thread or stream."""

    name: str
    kind: str
    start: float
    stop: float
    place: str = ""


class Wait(NamedTuple):
    """A wait of the host: which call, and the operators around it, the outermost first."""

    what: str
    inside: tuple[str, ...]


def read_trace(path: Path) -> list[Event]:
    """The spans of a trace that the profiler exported."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return [
        Event(
            one["name"], one["cat"], one["ts"], one["ts"] + one["dur"], f"{one['pid']} {one['tid']}"
        )
        for one in tree["traceEvents"]
        if one.get("ph") == "X" and "cat" in one and "dur" in one
    ]


def step_of(events: Sequence[Event]) -> Event:
    """The host's span of the step."""
    return next(event for event in events if event.name == STEP and event.kind == "user_annotation")


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of some intervals."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def is_wait(event: Event) -> bool:
    """Whether the host waits for the card in it: a call that says so, or a copy with memory that is not pinned."""
    if event.kind in CALLS:
        return event.name in WAITS
    return event.kind == "gpu_memcpy" and "Pageable" in event.name


def is_read(event: Event) -> bool:
    """Whether a tensor's values decide something on the host in it, wherever the tensor lies."""
    return event.kind == "cpu_op" and event.name in READS


def found_in(events: Sequence[Event], counts: Callable[[Event], bool]) -> list[Wait]:
    """The events of the step that count, each with the operators around it."""
    step = step_of(events)
    wanted = [event for event in events if counts(event) and event.start >= step.start]
    wanted = [
        event
        for event in wanted
        if event.kind not in (*CALLS, "cpu_op") or event.start <= step.stop
    ]
    return [
        Wait(event.name, around(event, events))
        for event in sorted(wanted, key=lambda event: event.start)
    ]


def around(inner: Event, events: Sequence[Event]) -> tuple[str, ...]:
    """Operators and Python functions of the same thread that hold an event, the outermost first."""
    kinds = ("cpu_op", "python_function")
    holding = [
        event
        for event in events
        if event.kind in kinds and event.place == inner.place and event is not inner
        if event.start <= inner.start and inner.stop <= event.stop
    ]
    return tuple(event.name for event in sorted(holding, key=lambda event: event.start))


def summary(events: Sequence[Event], device: str) -> dict[str, Any]:
    """Of one step: kernels by time, launches, idle share and waits; times in milliseconds."""
    step = step_of(events)
    work = [event for event in events if event.kind in WORK[device] and event.start >= step.start]
    work = [event for event in work if device != "cpu" or event.start <= step.stop]
    end = max([step.stop, *(event.stop for event in work)])
    span = end - step.start
    took: dict[str, float] = defaultdict(float)
    for event in work:
        took[event.name] += event.stop - event.start
    times = Counter(event.name for event in work)
    most = sorted(took, key=lambda name: -took[name])[:SHOWN]
    return {
        "span_ms": span / 1e3,
        "host_ms": (step.stop - step.start) / 1e3,
        "busy_ms": covered([(event.start, event.stop) for event in work]) / 1e3,
        "idle_share": 1 - covered([(event.start, event.stop) for event in work]) / span,
        "launches": len(work),
        "kernels": [
            {
                "name": name[:160],
                "ms": took[name] / 1e3,
                "launches": times[name],
                "of_span": took[name] / span,
            }
            for name in most
        ],
        "copies": dict(Counter(event.name for event in work if event.kind == "gpu_memcpy")),
        "waits": [wait._asdict() for wait in found_in(events, is_wait)],
        "value_reads": dict(Counter(read.what for read in found_in(events, is_read))),
    }


def traced(update: Callable[[], object], device: str, stack: bool = False) -> list[Event]:
    """The events of one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    common.synchronize(device)
    with torch.profiler.profile(activities=activities, with_stack=stack) as profiler:
        with torch.profiler.record_function(STEP):
            update()
        common.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path)


@contextlib.contextmanager
def sync_stacks(device: str) -> Iterator[list[str]]:
    """While this is open, PyTorch's warnings of synchronising calls are collected as Python stacks; none on the CPU."""
    found: list[str] = []
    if device == "cpu":
        yield found
        return

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if SYNC_WARNING in str(message):
            found.append("".join(traceback.format_stack(limit=14)[:-1]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def judge(report: Report, stacks: Sequence[str], waits: Sequence[Wait]) -> None:
    """Every place where the host waits is a fault, with how often."""
    for stack, times in Counter(stacks).items():
        report.fault("host synchronisation", f"{stack}{times} times in a step: {SYNC_WARNING}")
    for wait, times in Counter(waits).items():
        place = "\n".join(wait.inside) or "no operator"
        report.fault(
            "host synchronisation", f"inside of\n{place}\n{times} times in a step: {wait.what}"
        )


def problem_on(device: str) -> tuple[dict[str, Any], Callable[[], torch.Tensor]]:
    """What is profiled, and a call that makes a step of it."""
    chosen = {"shape": "tiny", "seq": 96} if device == "cpu" else chosen_shape("qwen2.5-7b", device)
    draft = draft_of(chosen["shape"], None, chosen["seq"])
    kind = {"dtype": torch.bfloat16, "device": device}
    problem = make_problem(draft, batch=1, seq=chosen["seq"], masked=0.5, k=K, seed=0, **kind)
    params = draw_params(draft, 0, **kind)
    return chosen, sides.make_side("fast", problem, params, None, K)


def run(report: Report, device: str) -> None:
    """Warm up, time, look for waits in both ways, profile."""
    chosen, update = problem_on(device)
    report.result |= {"chosen": chosen, "device": device}
    for _ in range(WARM):
        update()
    report.result["step_ms"] = 1e3 * median(common.seconds(update, device) for _ in range(TIMED))
    report.write()

    with sync_stacks(device) as stacks:
        update()
    common.synchronize(device)
    report.result["sync_warnings"] = len(stacks)
    report.write()

    traced(update, device)  # the first trace holds the tracer's own start
    events = traced(update, device)
    report.result["profile"] = found = summary(events, device)
    report.result["idle_share_untraced"] = 1 - found["busy_ms"] / report.result["step_ms"]
    report.write()
    if not found["launches"]:
        report.fault("profile", "the profiler saw no kernel, so nothing is known of waits")
    waits = found_in(events, is_wait)
    if waits and report.left() > 0:  # once more, for the Python functions around them
        waits = found_in(traced(update, device, stack=True), is_wait) or waits
    judge(report, stacks, waits)


def main(arguments: list[str] | None = None) -> int:
    """The part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part_options(parser)
    options = parse_part(parser, arguments)
    report = Report(options.out, options.seconds)
    report.write()
    with report.guarded("profile"):
        run(report, options.device)
    return report.finish()


if __name__ == "__main__":
    run_part(main)
