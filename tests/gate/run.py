"""The CUDA gate: runs its parts one after the other, each a process of its own, and keeps all they say in one file.

`scripts/cuda_gate.sh` prepares the environment and calls this with the same options. A part is a module that is called
as `python -m MODULE --device D --seconds N --out FILE`; it rewrites FILE as it goes. Nothing that a part does stops
another: at its limit its whole process group is killed, and what its file holds by then is kept.
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
GRACE = 15.0  # seconds beyond its limit until a part is asked to end
LAST_WORDS = 3.0  # seconds from then until it is killed
POLL = 0.1
KEPT_OUTPUT = 4000  # characters of what a part wrote to stderr, its end
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
    """The gate itself was told to end; no `Exception`, so that nothing on the way takes it for a fault."""


def main(arguments: list[str] | None = None) -> int:
    """The gate; exit code 0: every part passed, 1: something did not, 2: refused before anything."""
    try:
        options = gate_parser().parse_args(arguments)
        check_options(options)
    except RefusedError as refusal:
        print(f"scripts/cuda_gate.sh: {refusal}", file=sys.stderr)
        return 2
    wanted = parts_of(options)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # a part that dies leaves no image of its memory on the disk
    return run_gate(options, {name: PARTS[name] for name in wanted})


def run_gate(options: Any, parts: Mapping[str, Part]) -> int:
    """Run `parts` in their order within `options.minutes`; the result is written whole after each of them."""
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    out = options.out or default_out(options.device)
    result = start(options, parts)
    with told_to_stop(), contextlib.suppress(Stopped):
        write(out, result)
        for name, part in parts.items():
            limit = limit_of(name, parts, end - time.monotonic())
            if limit <= 0:
                break
            say(f"{name}: up to {limit:.0f} s")
            result["left_out"].remove(name)
            said = result["parts"].setdefault(name, {})
            try:
                run_part(part, options.device, limit, said, result["revision"])
            except Exception:  # of the gate's own doing: no room for a folder, no process to be had
                said |= {"state": "died", "reason": traceback.format_exc()[-KEPT_OUTPUT:]}
            write(out, result)
            say(told(name, said))
        result["complete"] = True
    result["seconds"] = round(time.monotonic() - begin, 1)
    states = [part["state"] for part in result["parts"].values()]
    passed = (
        result["complete"] and not result["left_out"] and all(state == "passed" for state in states)
    )
    for name, part in result["parts"].items():
        result["left_out"] += [f"{name}: {what}" for what in listed(part["result"], "left_out")]
    passed = write(out, result) and passed
    conclude(result, out, passed)
    return 0 if passed else 1


def default_out(device: str) -> Path:
    """The result's file, where none is named."""
    if device == "cpu":
        return ROOT / "runs" / "cuda-gate-rehearsal.json"
    folder, name = ROOT / "bench" / "results", f"{datetime.date.today()}-cuda-gate"
    number = 1
    while (
        folder / f"{name}{'' if number == 1 else f'-{number}'}.json"
    ).exists():  # an earlier call's result stays
        number += 1
    return folder / f"{name}{'' if number == 1 else f'-{number}'}.json"


def start(options: Any, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The result before the first part."""
    from eagle3fn.base.provenance import provenance
    from tests.specforge.certificate import sources

    kind, colon, earlier = options.parts.partition(":")
    words = ["--parts", kind + colon + Path(earlier).name, "--minutes", f"{options.minutes:g}"]
    words += ["--device", options.device]
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
    """A part's time: what is left, shared among it and those after it."""
    names = list(parts)
    later = [parts[other].share for other in names[names.index(name) :]]
    return left * parts[name].share / sum(later)


def run_part(
    part: Part, device: str, limit: float, said: dict[str, Any], revision: str = ""
) -> None:
    """Run one part until it ends or is killed; `said` gets what is known of it, also if the gate itself is stopped."""
    begin = time.monotonic()
    said |= {
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
        paths = folder / "result.json", folder / "stdout", folder / "stderr"
        words = ["--device", device, f"--seconds={limit:.3f}", "--out", str(paths[0])]
        try:
            with paths[1].open("ab") as stdout, paths[2].open("ab") as stderr:
                process = subprocess.Popen(
                    [sys.executable, *part.command, *words], cwd=ROOT, env=environment(device, revision),
                    stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
                )  # fmt: skip
            in_time = wait(process, begin + limit + GRACE, paths[1:])
            end_group(process)
            said["exit_code"] = process.returncode
            said["state"] = state_of(process.returncode, in_time)
        finally:
            if process is not None:
                end_group(process)
            said["seconds"] = round(time.monotonic() - begin, 1)
            said["stderr"] = tail(paths[2])
            said["result"], reason = read_result(paths[0])
            if reason:
                said["reason"] = reason
            if said["state"] == "passed" and (reason or listed(said["result"], "faults")):
                said["state"] = "failed"


def environment(device: str, revision: str) -> dict[str, str]:
    """What a part finds set: on the CPU the kernels are interpreted and dynamo is off, on CUDA neither."""
    settings = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    kept |= {"EAGLE3FN_PART_BEGAN": str(time.monotonic())}  # what the part imports is counted too
    kept |= {"EAGLE3FN_REVISION": revision} if revision else {}
    return kept | (settings if device == "cpu" else {})


def wait(process: subprocess.Popen[bytes], until: float, logs: tuple[Path, ...]) -> bool:
    """Wait until the process ends, and ask it to after its time. True: it ended by itself."""
    if ended(process, until, logs):
        return True
    signal_group(process, signal.SIGTERM)
    ended(process, time.monotonic() + LAST_WORDS, logs)
    return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is alive of a part and of all that it started."""
    if process.returncode is None:
        signal_group(process, signal.SIGKILL)
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # one that hangs in the driver cannot be killed
            process.wait(timeout=LAST_WORDS)


def ended(process: subprocess.Popen[bytes], until: float, logs: tuple[Path, ...]) -> bool:
    """Whether the process ends by then. It is not waited for in the end, so that its group's number stays its own."""
    while True:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
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
    """Keep the end of a log alone; who writes to it goes on after that."""
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
    """What a part left, or why nothing can be read."""
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
    """A list of a part's result; empty where there is none."""
    found = (result or {}).get(name)
    return found if isinstance(found, list) else []


def write(out: Path, result: dict[str, Any]) -> bool:
    """The result so far, whole; a disk that is full now may have room after the next part. False: not written."""
    from eagle3fn.base.files import write_json

    try:
        write_json(out, result)
    except OSError as error:
        print(f"{out}: not written ({error})", file=sys.stderr, flush=True)
        return False
    return True


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """While this is open, Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, once."""

    def stop(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told(name: str, part: dict[str, Any]) -> str:
    """A part's end, for people."""
    lines = [f"{name}: {part['state']} after {part['seconds']} s"]
    lines += [f"  {part['reason']}"] if "reason" in part else []
    for fault in listed(part["result"], "faults"):
        where, trace = (
            str(fault.get(key, "")) if isinstance(fault, dict) else ""
            for key in ("where", "traceback")
        )
        last = next((line for line in reversed(trace.splitlines()) if line.strip()), str(fault))
        lines.append(f"  {where}: {last[:200]}")
    return "\n".join(lines)


def conclude(result: dict[str, Any], out: Path, passed: bool) -> None:
    """Say what passed, and what time did not allow."""
    for what in result["left_out"]:
        say(f"left out: {what}")
    states = {name: part["state"] for name, part in result["parts"].items()}
    say(
        json.dumps(
            {"parts": states, "left_out": len(result["left_out"]), "seconds": result["seconds"]}
        )
    )
    say(f"{'passed' if passed else 'NOT PASSED'}: {result['kind']}; {out}")


def say(text: str) -> None:
    """A line for people; if nobody reads any more, the gate goes on."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
