"""One piece of work in a fork of this process, with limits, and what it printed.

This process should have imported everything and computed nothing. A fork then starts in
milliseconds, and its end ends all that it started.
"""

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

POLL_S = 0.004
_TICKS = os.sysconf("SC_CLK_TCK")


class Limits(NamedTuple):
    """What a fork may use before its end counts as a hang."""

    cpu_s: int = 20
    wall_s: float = 180.0
    idle_s: float = 12.0  # without any use of the CPU, waiting: on a pipe, a terminal, a lock
    memory: int = 4 << 30  # bytes of addresses, beyond those of this process
    file_size: int = 64 << 20


class Ended(NamedTuple):
    """How a fork ended."""

    code: int  # negative for signals
    hang: str  # "", or which limit it passed
    out: str
    err: str
    children: bool  # processes of its own were left
    imported: list[str]  # modules that it imported
    cpu_s: float


def call(work: Callable[[], int | None], log: Path, limits: Limits = Limits()) -> Ended:  # noqa: B008
    """Run `work` in a fork; stdin is empty, output goes to files that begin with `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    paths = {name: log.with_name(f"{log.name}.{name}") for name in ("out", "err", "imported")}
    pid = os.fork()
    if pid == 0:
        _be_child(work, paths, limits)

    hang, status, cpu_s = _wait(pid, limits)
    children = _end_group(pid)
    texts = {name: _read(path) for name, path in paths.items()}
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        hang = f"{limits.cpu_s} s of CPU time"
    imported = texts["imported"].split()
    return Ended(code, hang, texts["out"], texts["err"], children, imported, cpu_s)


def _read(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open(errors="backslashreplace", newline="\n") as file:
        return file.read(1 << 20)


def _wait(pid: int, limits: Limits) -> tuple[str, int, float]:
    """Wait for a process; which limit it passed ("" for none), its status, its CPU seconds."""
    start = time.monotonic()
    last_used = start
    used = 0
    hang = ""
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return hang, status, usage.ru_utime + usage.ru_stime

        # A process that uses no CPU time and is not about to run waits for something.
        now = time.monotonic()
        if now - start > 0.5:
            state, ticks = _state(pid)
            if ticks != used or state in "RD":
                used = ticks
                last_used = now
        late = now - start > limits.wall_s
        if not hang and (late or now - last_used > limits.idle_s):
            hang = f"{limits.wall_s:.0f} s" if late else f"waited for {limits.idle_s:.0f} s"
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S if now - start < 1 else 0.05)


def _state(pid: int) -> tuple[str, int]:
    """A process's state and its CPU time in ticks, all threads together."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "R", 0
    return fields[0], int(fields[11]) + int(fields[12])


def _end_group(pid: int) -> bool:
    """Kill what is left of a process's group; whether anything was."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _be_child(work: Callable[[], int | None], paths: dict[str, Path], limits: Limits) -> None:
    """What the fork does: it never returns."""
    code = 1
    before = set(sys.modules)
    try:
        os.setsid()
        torch.set_num_threads(1)  # a fork's pool is made anew, which two threads at once may not do
        _redirect(paths)
        _limit(limits)
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()

    # What an interpreter does at its end.
    try:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        paths["imported"].write_text("\n".join(set(sys.modules) - before))
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _redirect(paths: dict[str, Path]) -> None:
    """Empty input, and output to files."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(paths[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(handle, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115


def limit_memory(more: int) -> None:
    """Let this process have so many bytes of addresses more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, most))


def _limit(limits: Limits) -> None:
    limit_memory(limits.memory)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error in place of a signal, as in a shell
