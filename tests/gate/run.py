"""The CUDA gate: runs its parts one after the other, each in a process, with one result file.

`scripts/cuda_gate.sh` prepares the environment and calls this with the same options. A part is a
module that is called as `python -m MODULE --device D --seconds N --out FILE` and rewrites FILE as
it goes. A part cannot stop another one: at its limit its whole process group is killed, and the
content of its file by then is kept.
"""

import contextlib
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.gate.check import RefusedError, check_options, gate_parser, parts_of

ROOT = Path(__file__).resolve().parents[2]
GRACE = 15.0  # seconds beyond its limit until a part gets SIGTERM
SECONDS_TO_EXIT = 3.0  # from then until SIGKILL
POLL = 0.1  # seconds
KEPT_OUTPUT = 4000  # characters: the end of a part's stderr
LARGEST_LOG = 16 << 20  # bytes of a part's output on the disk
LARGEST_RESULT = 8 << 20  # bytes of a part's result
KINDS = {"cuda": "cuda gate", "cpu": "rehearsal on a CPU, certifies nothing"}


class Part(NamedTuple):
    """A part's share of the time, in seconds of 300, and its command before the options."""

    share: float
    command: tuple[str, ...]


PARTS = {
    "smoke": Part(75, ("-m", "tests.gate.smoke")),
    "parity": Part(100, ("-m", "tests.gate.parity")),
    "bench": Part(100, ("-m", "bench.cuda_gate")),
    "profile": Part(25, ("-m", "bench.profile_step")),
    "updates": Part(120, ("-m", "bench.updates")),
}


class Stopped(BaseException):
    """The gate itself got a signal to end. No `Exception`: nothing may take it for a fault."""


def main(arguments: list[str] | None = None) -> int:
    """Run the gate.

    Returns:
        0: every part passed; 1: something did not; 2: refused, nothing was begun.
    """
    try:
        options = gate_parser().parse_args(arguments)
        check_options(options)
    except RefusedError as refusal:
        print(f"scripts/cuda_gate.sh: {refusal}", file=sys.stderr)
        return 2

    # A part that dies must not write its memory to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return run_gate(options, {name: PARTS[name] for name in parts_of(options)})


def run_gate(options: Any, parts: Mapping[str, Part]) -> int:
    """Run `parts` in order within `options.minutes`; the result is rewritten after each of them."""
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    out = options.out or default_out(options.device)
    result = first_result(options, parts)

    # Each part has its share of the time that is left.
    with stopped_by_signals(), contextlib.suppress(Stopped):
        write(out, result)
        for name, part in parts.items():
            limit = limit_of(name, parts, end - time.monotonic())
            if limit <= 0:
                break
            show(f"{name}: up to {limit:.0f} s")
            result["left_out"].remove(name)
            row = result["parts"].setdefault(name, {})
            try:
                run_part(part, options.device, limit, row, result["revision"])
            except Exception:
                # The gate's own failure: a folder or a process could not be made.
                row |= {"state": "died", "reason": traceback.format_exc()[-KEPT_OUTPUT:]}
            write(out, result)
            show(summary(name, row))
        result["complete"] = True
    result["seconds"] = round(time.monotonic() - begin, 1)

    # Passed: every part ran and passed, and the result is on the disk.
    all_passed = all(part["state"] == "passed" for part in result["parts"].values())
    passed = result["complete"] and not result["left_out"] and all_passed
    for name, part in result["parts"].items():
        result["left_out"] += [f"{name}: {what}" for what in listed(part["result"], "left_out")]
    passed = write(out, result) and passed
    conclude(result, out, passed)
    return 0 if passed else 1


def default_out(device: str) -> Path:
    """The result's file, where none is named; never that of an earlier call on a card."""
    if device == "cpu":
        return ROOT / "runs" / "cuda-gate-rehearsal.json"
    folder = ROOT / "bench" / "results"
    name = f"{datetime.date.today()}-cuda-gate"
    path = folder / f"{name}.json"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def first_result(options: Any, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The result before the first part."""
    from eagle3fn.base.provenance import provenance
    from tests.specforge.certificate import sources

    # The command without this machine's paths.
    kind, colon, earlier = options.parts.partition(":")
    words = ["--parts", kind + colon + Path(earlier).name]
    words += ["--minutes", f"{options.minutes:g}", "--device", options.device]
    found = provenance(" ".join(["scripts/cuda_gate.sh all", *words]), options.revision)
    return {
        "kind": KINDS[options.device],
        **found,
        "minutes": options.minutes,
        "sources": sources(every=True),
        "parts": {},
        "left_out": list(parts),
        "complete": False,
    }


def limit_of(name: str, parts: Mapping[str, Part], left: float) -> float:
    """A part's time in seconds: what is left, shared among it and the parts after it."""
    names = list(parts)
    later = [parts[other].share for other in names[names.index(name) :]]
    return left * parts[name].share / sum(later)


class Files(NamedTuple):
    """What a part writes."""

    result: Path
    stdout: Path
    stderr: Path

    @property
    def logs(self) -> tuple[Path, ...]:
        """The files that grow with what the part prints."""
        return self.stdout, self.stderr


def run_part(
    part: Part, device: str, limit: float, row: dict[str, Any], revision: str = ""
) -> None:
    """Run one part until it ends or is killed.

    `row` gets the outcome, also if the gate itself is stopped meanwhile.
    """
    begin = time.monotonic()
    row |= {
        "state": "died",
        "exit_code": None,
        "seconds": 0.0,
        "limit": round(limit, 1),
        "result": None,
        "stderr": "",
    }
    process = None
    with tempfile.TemporaryDirectory(prefix="cuda-gate-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        files = Files(folder / "result.json", folder / "stdout", folder / "stderr")
        words = ["--device", device, f"--seconds={limit:.3f}", "--out", str(files.result)]
        try:
            # A session of its own is a process group of its own.
            with files.stdout.open("ab") as stdout, files.stderr.open("ab") as stderr:
                process = subprocess.Popen(
                    [sys.executable, *part.command, *words],
                    cwd=ROOT,
                    env=environment(device, revision),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            in_time = wait(process, begin + limit + GRACE, files.logs)
            end_group(process)
            row["exit_code"] = process.returncode
            row["state"] = state_of(process.returncode, in_time)
        finally:
            if process is not None:
                end_group(process)
            row["seconds"] = round(time.monotonic() - begin, 1)
            row["stderr"] = tail(files.stderr)
            row["result"], reason = read_result(files.result)
            if reason:
                row["reason"] = reason
            if row["state"] == "passed" and (reason or listed(row["result"], "faults")):
                row["state"] = "failed"


def environment(device: str, revision: str) -> dict[str, str]:
    """A part's variables: on the CPU kernels are interpreted and dynamo is off, on CUDA neither."""
    from eagle3fn.testing.gate_part import BEGAN

    cpu_only = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    variables = {name: value for name, value in os.environ.items() if name not in cpu_only}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    variables[BEGAN] = str(time.monotonic())  # the part's imports count as its time
    if revision:
        variables["EAGLE3FN_REVISION"] = revision
    if device == "cpu":
        variables |= cpu_only
    return variables


def wait(process: subprocess.Popen[bytes], until: float, logs: tuple[Path, ...]) -> bool:
    """Wait until the process ends; after its time it gets SIGTERM. True: it ended by itself."""
    if ended(process, until, logs):
        return True
    signal_group(process, signal.SIGTERM)
    ended(process, time.monotonic() + SECONDS_TO_EXIT, logs)
    return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what still runs of a part and of all that it started."""
    if process.returncode is not None:
        return
    signal_group(process, signal.SIGKILL)
    # A process that hangs in the driver cannot be killed.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=SECONDS_TO_EXIT)


def ended(process: subprocess.Popen[bytes], until: float, logs: tuple[Path, ...]) -> bool:
    """Whether the process ends by then.

    Its exit status is not collected (`WNOWAIT`), so that no other process gets its group's number.
    """
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while True:
        if os.waitid(os.P_PID, process.pid, flags) is not None:
            return True
        if time.monotonic() >= until:
            return False
        for log in logs:
            if log.stat().st_size > LARGEST_LOG:
                cut(log)
        time.sleep(POLL)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a part and to all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def cut(log: Path) -> None:
    """Cut a log to its end; its writer, which appends, goes on after that."""
    text = tail(log).encode()
    os.truncate(log, 0)
    with log.open("ab") as file:
        file.write(text)


def tail(log: Path) -> str:
    """The last characters of a log."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4 * KEPT_OUTPUT))
        return file.read().decode("utf-8", "replace")[-KEPT_OUTPUT:]


def state_of(code: int, in_time: bool) -> str:
    """How a part ended."""
    if not in_time:
        return "out of time"
    return {0: "passed", 1: "failed", 2: "failed"}.get(code, "died")


def read_result(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What a part wrote, or why that cannot be used."""
    if not path.is_file():
        return None, "it left no result"
    if path.stat().st_size > LARGEST_RESULT:
        return None, f"its result has {path.stat().st_size:,} bytes, above {LARGEST_RESULT:,}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return None, f"its result is not JSON: {str(error)[:200]}"
    if not isinstance(found, dict):
        return None, f"its result is no object but a {type(found).__name__}"
    return found, None


def listed(result: dict[str, Any] | None, name: str) -> list[Any]:
    """A list in a part's result; empty if there is none."""
    found = (result or {}).get(name)
    return found if isinstance(found, list) else []


def write(out: Path, result: dict[str, Any]) -> bool:
    """Write the result so far, whole or not at all. False: not written.

    It is no reason to stop: a full disk may have room after the next part.
    """
    from eagle3fn.base.files import write_json

    try:
        write_json(out, result)
    except OSError as error:
        print(f"{out}: not written ({error})", file=sys.stderr, flush=True)
        return False
    return True


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While this is open, Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, once."""

    def stop(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(name: str, part: dict[str, Any]) -> str:
    """How a part ended, for people: a line, and one for each fault."""
    lines = [f"{name}: {part['state']} after {part['seconds']} s"]
    if "reason" in part:
        lines.append(f"  {part['reason']}")
    lines += [f"  {fault_line(fault)}" for fault in listed(part["result"], "faults")]
    return "\n".join(lines)


def fault_line(fault: Any) -> str:
    """Where a fault was, and the last line of its traceback."""
    if not isinstance(fault, dict):
        return f": {str(fault)[:200]}"
    trace = [line for line in str(fault.get("traceback", "")).splitlines() if line.strip()]
    last = trace[-1] if trace else str(fault)
    return f"{fault.get('where', '')}: {last[:200]}"


def conclude(result: dict[str, Any], out: Path, passed: bool) -> None:
    """Print what passed, and what time did not allow."""
    for what in result["left_out"]:
        show(f"left out: {what}")

    states = {name: part["state"] for name, part in result["parts"].items()}
    left_out = len(result["left_out"])
    counts = {"parts": states, "left_out": left_out, "seconds": result["seconds"]}
    show(json.dumps(counts))
    show(f"{'passed' if passed else 'NOT PASSED'}: {result['kind']}; {out}")


def show(text: str) -> None:
    """Print a line; the gate goes on if nobody reads any more."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
