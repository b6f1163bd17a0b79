"""What a program prints: its result, an error, colours; printing never ends it.

Neither a reader that has enough nor a full disk nor another encoding raises.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO


class Result(NamedTuple):
    """What a command ends with."""

    values: dict[str, Any] | None
    """What it wrote and counted, as JSON values and paths; None: another process printed it."""

    exit_code: int = 0


@contextlib.contextmanager
def only_the_result(as_json: bool) -> Iterator[TextIO]:
    """Gives the stream for a result; with `as_json`, all else that is printed goes to stderr."""
    stream = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if as_json else stream):
        yield stream


def json_line(values: dict[str, Any]) -> str:
    """Values as one line of JSON; what JSON has no number for is null.

    >>> import pathlib
    >>> json_line({"out": pathlib.PurePosixPath("run"), "loss": float("nan")})
    '{"out": "run", "loss": null}'
    """
    return json.dumps(json_value(values))


def json_value(value: Any) -> Any:
    """A value as JSON has it: a number that is not finite is null, a path its text."""
    if isinstance(value, dict):
        return {str(key): json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def print_error(line: str, code: int, as_json: bool) -> None:
    """Print an error on stderr: its line, red on a terminal, or with `as_json` a JSON object."""
    if as_json:
        line = json.dumps({"error": line, "exit_code": code})
    elif has_colours(sys.stderr):
        line = f"\x1b[31m{line}\x1b[0m"
    print(line, file=sys.stderr)


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and nobody asks for none (NO_COLOR)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


class _Forgiving:
    """A text stream that drops what it is given once nobody takes it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._stream.write(text)
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        """Let the descriptor be /dev/null, for whatever else still writes there."""
        self._is_lost = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()  # what is still kept goes there, not into an error at the end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block nothing that is printed raises.

    Output that nobody reads, or that a full disk does not take, is dropped. Characters that the
    output's encoding does not have are written as `\\u` escapes.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    # A program that was started without an output has None there.
    sys.stdout, sys.stderr = (
        _Forgiving(stream if stream is not None else _nowhere())  # pyright: ignore
        for stream in before
    )
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
