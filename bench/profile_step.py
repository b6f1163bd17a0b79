"""One fast step under the profiler, a part of the CUDA gate.

    python -m bench.profile_step --seconds 25 --out FILE

`FILE` gets the kernels with most time, launches, the share of the step in which the card is idle,
and every wait of the host for the card: there must be none. Waits are found in two ways: by
PyTorch's own warnings, with the Python stack, and among the CUDA runtime's calls in the trace. On
the CPU operators are counted in place of kernels, and reads of values are counted but not judged:
there the fast numerics cut their blocks on the host.
"""

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

STEP = "eagle3fn step"  # the span of the step in the trace
SHOWN = 20  # kernels in the result
WARM = 3  # steps before the timed ones
TIMED = 5
STACK_FRAMES = 14  # of a synchronizing call
NAME_CHARACTERS = 160  # of a kernel
SYNC_WARNING = "called a synchronizing CUDA operation"

# The trace's categories of device work, and of calls of the CUDA runtime.
WORK = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
CALLS = ("cuda_runtime", "cuda_driver")
# Calls that wait for the device.
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cudaFree",
    "cuMemFree_v2",
)
# Operators whose result depends on the host reading a tensor's values.
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")


class Event(NamedTuple):
    """A span of a trace, in microseconds."""

    name: str
    kind: str  # the trace's category
    start: float
    stop: float
    place: str = ""  # thread or stream


class Wait(NamedTuple):
    """A wait of the host."""

    what: str  # the call
    inside: tuple[str, ...]  # the operators around it, the outermost first


def read_trace(path: Path) -> list[Event]:
    """The spans of a trace that the profiler exported."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    events = []
    for one in tree["traceEvents"]:
        if one.get("ph") == "X" and "cat" in one and "dur" in one:
            place = f"{one['pid']} {one['tid']}"
            event = Event(one["name"], one["cat"], one["ts"], one["ts"] + one["dur"], place)
            events.append(event)
    return events


def step_of(events: Sequence[Event]) -> Event:
    """The host's span of the step."""
    return next(event for event in events if event.name == STEP and event.kind == "user_annotation")


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of some intervals."""
    total = 0.0
    reached = float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def is_wait(event: Event) -> bool:
    """Whether the host waits for the card in it: in a call, or in a copy of pageable memory."""
    if event.kind in CALLS:
        return event.name in WAITS
    return event.kind == "gpu_memcpy" and "Pageable" in event.name


def is_read(event: Event) -> bool:
    """Whether the host reads a tensor's values in it, on whichever device the tensor is."""
    return event.kind == "cpu_op" and event.name in READS


def found_in(events: Sequence[Event], counts: Callable[[Event], bool]) -> list[Wait]:
    """The events of the step that count, each with the operators around it, in order of time."""
    step = step_of(events)
    found = []
    for event in events:
        on_host = event.kind in (*CALLS, "cpu_op")
        after = on_host and event.start > step.stop  # the profiler's own
        if counts(event) and event.start >= step.start and not after:
            found.append(event)
    found.sort(key=lambda event: event.start)
    return [Wait(event.name, around(event, events)) for event in found]


def around(inner: Event, events: Sequence[Event]) -> tuple[str, ...]:
    """Operators and Python functions of the same thread that hold an event, the outermost first."""
    holding = []
    for event in events:
        is_function = event.kind in ("cpu_op", "python_function") and event is not inner
        holds = event.start <= inner.start and inner.stop <= event.stop
        if is_function and holds and event.place == inner.place:
            holding.append(event)
    return tuple(event.name for event in sorted(holding, key=lambda event: event.start))


def summary(events: Sequence[Event], device: str) -> dict[str, Any]:
    """Of one step: kernels by time, launches, idle share and waits; times in milliseconds."""
    # The device's work may end after the host's span; on the CPU both are the same.
    step = step_of(events)
    work = []
    for event in events:
        within = event.start >= step.start and (device != "cpu" or event.start <= step.stop)
        if event.kind in WORK[device] and within:
            work.append(event)
    end = max([step.stop, *(event.stop for event in work)])
    span = end - step.start
    busy = covered([(event.start, event.stop) for event in work])

    took: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in work:
        took[event.name] += event.stop - event.start
        launches[event.name] += 1
    kernels = []
    for name in sorted(took, key=lambda name: -took[name])[:SHOWN]:
        kernels.append(
            {
                "name": name[:NAME_CHARACTERS],
                "ms": took[name] / 1e3,
                "launches": launches[name],
                "of_span": took[name] / span,
            }
        )
    return {
        "span_ms": span / 1e3,
        "host_ms": (step.stop - step.start) / 1e3,
        "busy_ms": busy / 1e3,
        "idle_share": 1 - busy / span,
        "launches": len(work),
        "kernels": kernels,
        "copies": dict(Counter(event.name for event in work if event.kind == "gpu_memcpy")),
        "waits": [wait._asdict() for wait in found_in(events, is_wait)],
        "value_reads": dict(Counter(read.what for read in found_in(events, is_read))),
    }


def traced(update: Callable[[], object], device: str, stack: bool = False) -> list[Event]:
    """The events of one call; `stack`: with the Python functions around them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

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
    """While open, synchronizing calls are collected as Python stacks, by PyTorch's warnings.

    None on the CPU.
    """
    found: list[str] = []
    if device == "cpu":
        yield found
        return

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if SYNC_WARNING in str(message):
            found.append("".join(traceback.format_stack(limit=STACK_FRAMES)[:-1]))

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
    where = "host synchronisation"
    for stack, times in Counter(stacks).items():
        report.fault(where, f"{stack}{times} times in a step: {SYNC_WARNING}")
    for wait, times in Counter(waits).items():
        operators = "\n".join(wait.inside) or "no operator"
        report.fault(where, f"inside of\n{operators}\n{times} times in a step: {wait.what}")


def problem_on(device: str) -> tuple[dict[str, Any], Callable[[], torch.Tensor]]:
    """What is profiled, and a call that makes a step of it."""
    chosen = {"shape": "tiny", "seq": 96}
    if device != "cpu":
        chosen = chosen_shape("qwen2.5-7b", device)
    draft = draft_of(chosen["shape"], None, chosen["seq"])
    problem = make_problem(
        draft,
        batch=1,
        seq=chosen["seq"],
        masked=0.5,
        k=K,
        seed=0,
        dtype=torch.bfloat16,
        device=device,
    )
    params = draw_params(draft, 0, torch.bfloat16, device)
    return chosen, sides.make_side("fast", problem, params, None, K)


def run(report: Report, device: str) -> None:
    """Warm up, time, look for waits in both ways, profile."""
    chosen, update = problem_on(device)
    report.result |= {"chosen": chosen, "device": device}
    for _ in range(WARM):
        update()
    report.result["step_ms"] = 1e3 * median(common.seconds(update, device) for _ in range(TIMED))
    report.write()

    # Waits by PyTorch's warnings.
    with sync_stacks(device) as stacks:
        update()
    common.synchronize(device)
    report.result["sync_warnings"] = len(stacks)
    report.write()

    # The profile. The first trace has the tracer's own start in it.
    traced(update, device)
    events = traced(update, device)
    found = summary(events, device)
    report.result["profile"] = found
    report.result["idle_share_untraced"] = 1 - found["busy_ms"] / report.result["step_ms"]
    report.write()
    if not found["launches"]:
        report.fault("profile", "the profiler saw no kernel, so nothing is known of waits")

    # Waits in the trace; where there are any, once more with the Python functions around them.
    waits = found_in(events, is_wait)
    if waits and report.left() > 0:
        waits = found_in(traced(update, device, stack=True), is_wait) or waits
    judge(report, stacks, waits)


def main(arguments: list[str] | None = None) -> int:
    """The part."""
    parser = common.parser_of(__doc__)
    part_options(parser)
    options = parse_part(parser, arguments)
    report = Report(options.out, options.seconds)
    report.write()
    with report.guarded("profile"):
        run(report, options.device)
    return report.finish()


if __name__ == "__main__":
    run_part(main)
