"""Signals that ask a program to end: Ctrl-C, SIGTERM, and SIGHUP, which a closed terminal sends.

The first one ends what runs: a training makes its step and saves it, any other stage leaves what it
has finished. A second Ctrl-C ends the process at once; a first one after another signal does not.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from eagle3fn.base.errors import UserError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}

Stop = Callable[[], bool]
"""Whether a stop was requested."""

_Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal has come that asks this program to end.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {name_of(number)}")
        self.number = number


class StopRequested(UserError):
    """A signal asks the program to end, and what it waits for does not come."""


def name_of(number: int) -> str:
    """What a user calls a signal of `ENDING`."""
    return _NAMES[signal.Signals(number)]


# The signals that have come in the outermost block, in their order.
_received: list[int] = []


def received() -> int | None:
    """The first signal of `ENDING` that has come since the program's block began."""
    return _received[0] if _received else None


@contextmanager
def signals_raised() -> Iterator[None]:
    """Within the block the first signal raises `Interrupted`, a second Ctrl-C ends the process.

    Outside the main thread this has no effect.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_first(number):
            raise Interrupted(number)

    with _handled(handle):
        yield


@contextmanager
def signals_noted() -> Iterator[Stop]:
    """A function that returns whether a signal has come since the block began.

    A second Ctrl-C ends the process. Outside the main thread the function always returns False.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        _is_first(number)

    before = len(_received)
    with _handled(handle):
        yield lambda: len(_received) > before


@contextmanager
def children_spared() -> Iterator[None]:
    """Processes that are started within the block never get a terminal's Ctrl-C or its SIGHUP.

    It goes to all processes of a terminal: this one then ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_first(number: int) -> bool:
    """Record a signal, and tell whether it is the first; a second Ctrl-C does not return."""
    is_second = number == signal.SIGINT and signal.SIGINT in _received
    _received.append(number)
    if is_second:
        os.write(2, b"\nstopped at once by a second Ctrl-C\n")
        os._exit(128 + number)
    return len(_received) == 1


@contextmanager
def _handled(handle: _Handler) -> Iterator[None]:
    """Let `handle` take the signals within the block; those that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = {}
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            before[number] = signal.signal(number, handle)
    outermost = not any(_is_ours(handler) for handler in before.values())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if outermost:
            _received.clear()


def _is_ours(handler: object) -> bool:
    return getattr(handler, "__module__", "") == __name__
