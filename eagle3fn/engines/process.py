"""A serving engine in a process and an environment of its own, asked line by line.

The process runs a file of `engines/programs/` with the engine's Python, which needs none of this
package's requirements. Settings and requests go to it as lines of JSON on stdin; each is answered
by one line. What the engine prints goes to a log file.

    settings →            ← {"ready": FACTS}
    request  →            ← {"answer": ANSWER}
                          ← {"error": SENTENCE}    in place of either

Several threads may ask one process: an exchange begins when the last one has ended.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eagle3fn.base.errors import EngineGone, UserError
from eagle3fn.base.temporary import UNFINISHED, clear, side_folder

PROGRAMS = Path(__file__).parent / "programs"
START_SECONDS = 1800.0  # for loading a large target
ANSWER_SECONDS = 1800.0
EXIT_SECONDS = 20.0  # after stdin is closed, and after SIGTERM
LONGEST = 200  # characters of a log's line in a message
POINTS_AT_LOG = "root cause above"  # in an error whose reason was printed
ERROR = re.compile(r"[\w.]*(Error|Exception): .*")
MEMORY_WORDS = ("out of memory", "outofmemory", "available memory", "cannot allocate")


class EngineProcess:
    """A running program of `engines/programs/`; a context manager that ends it.

    Attributes:
        facts: what the program says of itself once it is ready, such as the engine's version.
    """

    def __init__(
        self,
        engine: str,
        python: str | Path,
        program: str,
        settings: dict[str, Any],
        log: str | Path,
        *,
        environment: dict[str, str] | None = None,
        seconds: float = START_SECONDS,
        abandoned: threading.Event | None = None,
    ) -> None:
        """Start the program and wait until it is ready.

        Args:
            engine: the engine's name, for messages.
            python: the Python of the environment that has the engine.
            program: the file's name in `engines/programs/`, such as "vllm_features.py".
            settings: JSON values that the program starts with.
            log: file for what the engine prints; replaced.
            environment: variables added to this process's.
            seconds: the longest time until it is ready.
            abandoned: once it is set, nobody waits for the program any more. Who does, for an
                answer or here, gets `EngineGone` within a second, and the program is killed.

        Raises:
            EngineGone: it died, took too long or is abandoned.
            UserError: no such Python, no such engine there, or it failed.
        """
        self.engine = engine
        self.log = Path(log)
        self.remedy = ""
        found = find_python(engine, python)

        self.log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        variables.pop("PYTHONPATH", None)  # of this package's environment
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [found, str(PROGRAMS / program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=variables,
                start_new_session=True,
            )
        self._rest = b""  # of stdout, after the last line
        self._exchanging = threading.RLock()
        self._abandoned = abandoned or threading.Event()
        try:
            self.facts: dict[str, Any] = self._exchange(settings, "ready", "starting", seconds)
        except BaseException as error:
            self._end(error)
            raise

    def ask(self, request: dict[str, Any], seconds: float = ANSWER_SECONDS) -> Any:
        """The answer to a request.

        Raises:
            EngineGone: the program died, took longer than `seconds` or is abandoned.
            UserError: it reports a fault.
        """
        with self._exchanging:
            return self._exchange(request, "answer", "at work", seconds)

    def close(self) -> None:
        """End the program and all processes that it started; safe to call again.

        A thread that waits for an answer gets what comes until then, or `EngineGone`.
        """
        process = self._process
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self._signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
                break
        self._signal(signal.SIGKILL)  # what the engine left running in its group
        with self._exchanging:
            if process.stdout:
                process.stdout.close()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """End the program; after an interrupt without waiting for an answer that nobody reads."""
        if error is not None and not isinstance(error, UserError):
            self._signal(signal.SIGTERM)
        self.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _exchange(self, value: dict[str, Any], key: str, doing: str, seconds: float) -> Any:
        """Write one line and read one; the content of its `key`."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            raise EngineGone(f"{self.engine}: was closed; see {self.log}")
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError, ValueError):  # it has ended: the reader says how
            self._write(json.dumps(value).encode() + b"\n", doing, end, seconds)

        line = self._line(doing, end, seconds)
        try:
            tree = json.loads(line)
        except ValueError:
            tree = None
        if isinstance(tree, dict) and "error" in tree:
            raise UserError(f"{self.engine}: {self._reason(str(tree['error']))}; see {self.log}")
        if not isinstance(tree, dict) or key not in tree:
            raise UserError(f"{self.engine}: answered {line[:80]!r}, not JSON; see {self.log}")
        return tree[key]

    def _reason(self, error: str) -> str:
        """A program's error; where that points at what was printed, as vLLM's does, the latter."""
        if POINTS_AT_LOG not in error:
            return error
        for line in reversed(named_errors(self.log)):
            found = ERROR.search(line)
            if found and POINTS_AT_LOG not in line:
                return found.group()[:LONGEST]
        return error

    def _write(self, line: bytes, doing: str, end: float, seconds: float) -> None:
        """Write a line to its stdin, which takes a long one only as it is read."""
        assert self._process.stdin is not None
        handle = self._process.stdin.fileno()
        os.set_blocking(handle, False)
        while line:
            _, ready, _ = select.select([], [handle], [], self._left(doing, end, seconds))
            if ready:
                line = line[os.write(handle, line[: 1 << 16]) :]

    def _left(self, doing: str, end: float, seconds: float) -> float:
        """Seconds to wait, at most 1; a program that is abandoned, or out of time, is killed."""
        left = end - time.monotonic()
        if self._abandoned.is_set():
            self._signal(signal.SIGKILL)
            raise EngineGone(f"{self.engine}: was closed ({doing}); see {self.log}")
        if left <= 0:
            self._signal(signal.SIGKILL)
            raise EngineGone(
                f"{self.engine}: no answer after {seconds:.0f} s ({doing}); see {self.log}"
            )
        return min(left, 1.0)

    def _line(self, doing: str, end: float, seconds: float) -> bytes:
        """The next line of its stdout."""
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([handle], [], [], self._left(doing, end, seconds))
            if not ready:
                continue
            piece = os.read(handle, 1 << 20)
            if not piece:
                raise EngineGone(self._how_it_ended(doing))
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _how_it_ended(self, doing: str) -> str:
        """One line on a program that closed its stdout: how it ended, and its last words."""
        try:
            code = self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += ", as the system does where memory runs out"

        words = last_words(self.log)
        if any(word in words.lower() for word in MEMORY_WORDS):
            how += ", out of memory"
        return f"{self.engine}: {how} ({doing}): {words or 'it printed nothing'}; see {self.log}"


def find_python(engine: str, python: str | Path) -> str:
    """The path of a Python that is named by its path or its name.

    Raises:
        UserError: there is none; `engine` is what its environment should have.
    """
    found = shutil.which(str(python))
    if found is None:
        raise UserError(
            f"--engine-python {python}: no such program; name the Python of an environment "
            f"that has {engine}"
        )
    return found


class EngineClient:
    """What asks an engine's process; a context manager that ends it."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def close(self) -> None:
        """End the process and remove what it needed; safe to call again."""
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._process.__exit__(kind, error, trace)
        finally:
            self.close()


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder in the system's folder of temporary files, removed when the block ends.

    Those of this name that killed processes left are removed first.
    """
    place = Path(tempfile.gettempdir(), f"eagle3fn-{name}")
    clear(place)
    with side_folder(place, UNFINISHED) as folder:
        made = folder / place.name
        made.mkdir()
        yield made


def last_words(log: Path) -> str:
    """The last line of a log that names an error, else the last one; "" if it is empty."""
    for line in reversed(named_errors(log) or lines_of(log)):
        return line[-LONGEST:]
    return ""


def named_errors(log: Path) -> list[str]:
    """The lines of a log that name an error; warnings, which engines go on after, are left out."""
    lines = [line for line in lines_of(log) if "WARNING" not in line]
    return [line for line in lines if "Error" in line or "error:" in line]


def lines_of(log: Path) -> list[str]:
    """The lines of a log that are not empty; none where it cannot be read."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]
    return []


def engine_version(facts: dict[str, Any], oldest: Sequence[int], engine: str, python: str) -> str:
    """The version in a program's or server's `facts`, which must be at least `oldest`.

    `python` is the Python or the address that was named.

    Raises:
        UserError: it is older, or there is none.
    """
    option = "--engine-url" if python.startswith("http") else "--engine-python"
    if not isinstance(facts, dict) or "version" not in facts:
        raise UserError(f"{option} {python}: names no version; is this {engine}?")
    version = str(facts["version"])
    release = version.partition("+")[0].split(".")[:3]
    numbers = tuple(int(part) for part in release if part.isdigit())
    if numbers < tuple(oldest):
        least = ".".join(str(number) for number in oldest)
        raise UserError(
            f"{engine} {version} ({option} {python}): too old, {least} or later is needed; "
            "update it there"
        )
    return version
