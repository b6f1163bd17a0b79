"""A result that grows stage by stage, keeps every fault with its traceback, and ends in time."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle3fn.base.files import write_json

Result = dict[str, Any]


class Stages:
    """Writes its result when it is made, after each stage and at the end, always whole.

    When time is up, a thread adds where the main one is at work to the faults, writes, and ends the
    process with exit code 1: so also a call that hangs outside Python is ended.

    Args:
        out: the result's file.
        head: what is known before the first stage.
        seconds: from now on.
        more: what else follows from the result so far; asked before each writing.
        at_the_end: called before the process is ended.
        tell: is given the result before the process is ended.
        logs: a stage's name to a file whose end is added to that stage's faults.
    """

    def __init__(
        self,
        out: Path,
        head: Result,
        seconds: float,
        more: Callable[[Result], Result],
        at_the_end: Callable[[], None],
        tell: Callable[[Result], None],
        logs: dict[str, Path],
    ) -> None:
        self.out = out
        self.more = more
        self.at_the_end = at_the_end
        self.tell = tell
        self.logs = logs
        self.now = "start"
        self.limit = seconds
        self.result: Result = head | {"complete": False, "seconds": {}, "faults": []}
        self.lock = threading.Lock()
        self.write()
        self.timer = threading.Timer(max(seconds, 0.0), self._time_is_up)
        self.timer.daemon = True
        self.timer.start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the work: what it raises becomes a fault, and the next stage can begin."""
        begin, self.now = time.perf_counter(), name
        try:
            yield
        except (Exception, SystemExit):
            self.fault(traceback.format_exc())
        self.result["seconds"][name] = round(time.perf_counter() - begin, 1)
        self.write()

    def fault(self, text: str) -> None:
        """Add a traceback to the stage at work, with the end of its log."""
        log = self.logs.get(self.now)
        if log is not None and log.is_file():
            text += f"\nits output ends:\n{log.read_text(errors='replace')[-2000:]}"
        self.result["faults"].append({"where": self.now, "traceback": text})

    def write(self) -> None:
        """The file as of now."""
        with self.lock:
            self.result |= self.more(self.result)
            write_json(self.out, self.result)

    def end(self) -> Result:
        """The whole result, written."""
        self.close()
        self.result["complete"] = True
        self.write()
        return self.result

    def close(self) -> None:
        """No limit any more."""
        self.timer.cancel()

    def _time_is_up(self) -> None:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = "".join(traceback.format_stack(frame))
        try:
            self.fault(f"{stack}not finished within {self.limit:.1f} s")
            self.write()
            self.at_the_end()
            self.tell(self.result)
        finally:
            os._exit(1)
