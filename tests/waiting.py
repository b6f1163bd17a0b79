"""Waiting in tests of threads and processes: for what must happen, with an end."""

import time
from collections.abc import Callable

PATIENCE_S = 20.0


def await_that(holds: Callable[[], object]) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: it does not within `PATIENCE_S`.
    """
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.005)
