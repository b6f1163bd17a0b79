"""A process that appends lines of JSON to a file, followed while it runs and ended in time."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GRACE = 8.0  # seconds beyond its time for a process's last case, before it is killed
POLL = 0.2  # seconds
KEPT_LOG = 3000  # characters: the end of what a process printed


def follow(
    command: list[str], environment: dict[str, str], rows: Path, end: float
) -> Iterator[dict[str, Any]]:
    """Yield the process's rows as they come, and `{"exit_code", "log"}` at last.

    The exit code is None if the process was killed. What it prints goes to a file next to `rows`: a
    pipe would stay open as long as any process that inherited it. A line that is not a JSON object
    is left out. Closing the iterator kills the process.
    """
    log = rows.with_suffix(".log")
    with log.open("ab") as stream:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )

    place = 0
    code = None
    try:
        while True:
            # The exit code first: rows written before the end are read after it.
            code = child.poll()
            lines, place = new_lines(rows, place)
            yield from lines
            if code is not None or time.monotonic() > end + GRACE:
                break
            time.sleep(POLL)
    finally:
        child.kill()
        child.wait()
    yield {"exit_code": code, "log": printed(log)}


def new_lines(rows: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from the byte `place` on, and the place after them."""
    if not rows.is_file():
        return [], place
    with rows.open("rb") as file:
        file.seek(place)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]

    found = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                found.append(row)
    return found, place + len(whole)


def printed(log: Path) -> str:
    """The end of what a process printed."""
    return log.read_bytes()[-4 * KEPT_LOG :].decode("utf-8", "replace")[-KEPT_LOG:]
