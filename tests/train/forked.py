"""Starts ranks as forks of this process.

The process should have imported everything and computed nothing: a start then costs no import.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POLL_S = 0.005


class Ranks:
    """The processes of one job, and the exit codes of those that ended: negative for signals."""

    def __init__(self, work: Callable[[int], Any], count: int, log: Path) -> None:
        """Fork `count` ranks that call `work(rank)` with torchrun's variables set.

        A rank prints to `log` with its number appended; it exits with what `work` returns, or 1.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()

        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                _be_rank(work, rank, count, port, log.with_name(f"{log.name}{rank}"))
            self.pids.append(pid)

    def running(self) -> bool:
        """True while any rank lives."""
        for rank in self._alive():
            done, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def send(self, rank: int, number: int) -> None:
        """Send a rank a signal, if it has not ended."""
        if self.running() and rank not in self.codes:
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float) -> list[int | None]:
        """The ranks' exit codes once all have ended; None for those killed for being late."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(POLL_S)

        late = self._alive()
        for rank in late:
            self.send(rank, signal.SIGKILL)
        while self.running():
            time.sleep(POLL_S)
        return [None if rank in late else self.codes[rank] for rank in range(len(self.pids))]

    def _alive(self) -> set[int]:
        """The ranks that have not ended, as far as is known."""
        return set(range(len(self.pids))) - set(self.codes)


def _be_rank(work: Callable[[int], Any], rank: int, count: int, port: int, log: Path) -> None:
    """What the fork does: it never returns."""
    code = 1
    try:
        torch.set_num_threads(1)  # a fork's pool is made anew, which two threads at once may not do

        # Print to the log.
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)

        # One rank alone has no ranks to join.
        if count > 1:
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in variables.items()})
        code = work(rank) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
