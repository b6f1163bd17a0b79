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

_REMOVE = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True); sys.exit(1)"


class Stages:
    """Writes its result when it is made, after each stage and at the end, always whole.

    When time is up, a thread adds the main thread's stack to the faults, writes, and ends the
    process with exit code 1. So a call that hangs outside Python is ended too.

    Args:
        out: the result's file.
        head: what is known before the first stage.
        seconds: the limit, of which `spent` have gone by.
        more: what else follows from the result so far; called before each writing.
        report: gets the result before the process is ended.
        remove: a folder that goes with the process.
        logs: a stage's name to a file whose end is added to that stage's faults.
    """

    def __init__(
        self,
        out: Path,
        head: Result,
        seconds: float,
        more: Callable[[Result], Result],
        report: Callable[[Result], None],
        remove: Path,
        logs: dict[str, Path],
        spent: float = 0.0,
    ) -> None:
        self.out = out
        self.more = more
        self.report = report
        self.remove = remove
        self.logs = logs
        self.now = "start"
        self.limit = seconds
        self.result: Result = head | {"complete": False, "seconds": {}, "faults": []}
        self.lock = threading.Lock()
        self.write()
        self.timer = threading.Timer(max(seconds - spent, 0.0), self._time_is_up)
        self.timer.daemon = True
        self.timer.start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the work: what it raises becomes a fault, and the next stage can begin."""
        begin = time.perf_counter()
        self.now = name
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

    def write(self, wait: float = -1) -> None:
        """Write the file as of now.

        Another thread's writing is waited for, `wait` seconds at most (below 0: without a limit).
        """
        held = self.lock.acquire(timeout=wait)
        try:
            try:
                self.result |= self.more(self.result)
            except Exception:
                if wait < 0:
                    raise
                self.fault(traceback.format_exc())
            write_json(self.out, self.result)
        finally:
            if held:
                self.lock.release()

    def end(self) -> Result:
        """The whole result, written."""
        self.close()
        self.result["complete"] = True
        self.write()
        return self.result

    def close(self) -> None:
        """End the limit of time."""
        self.timer.cancel()

    def _time_is_up(self) -> None:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = "".join(traceback.format_stack(frame))
        try:
            self.fault(f"{stack}not finished within {self.limit:g} s")
            self.write(wait=2)
            self.report(self.result)
        finally:
            try:
                # Other threads would still write there: the process is replaced first.
                os.execv(sys.executable, [sys.executable, "-S", "-c", _REMOVE, str(self.remove)])
            finally:
                os._exit(1)
