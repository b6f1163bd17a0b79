"""SIGTERM as a wish: the loop finishes its step, saves, and ends well."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has come since the block began; outside the main thread never."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
