"""What a chat template may take of time and memory: it is a stranger's program.

A rendering has a budget of characters. Text that is written, values that are assigned or given to a
call, and each turn of a loop, macro or block are charged to it (`data.jinja_tree`); what would make
much out of little (`*`, `%`, `center`, `join`) is charged before it is done (`data.jinja_calls`).
The time is looked at whenever something is charged, and in a process's main thread by a timer too.

What is not charged at once is bounded by the template's own length: an expression makes at most
16 times its largest value before its parts are charged too. So a rendering holds at most a few
gigabytes. It ends some seconds after its time: a timer does not interrupt one operation of Python,
such as a sort, which takes no more values than the budget allows.
"""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

SECONDS = 10.0
"""Of processor time, of a rendering: one takes milliseconds."""
CHARACTERS = 2**26
"""Of a rendering; `_A_CHARACTER` times the conversation's where that is more."""
LONGEST_SOURCE = 2**20
"""Characters of a template; the longest in use have 30 thousand."""

_A_CHARACTER = 32  # charged for a character of the conversation, at most
_OBJECT = 8  # characters that a value counts for


class TemplateLimitError(TemplateError):
    """A template takes more time or memory than any needs."""


class Budget:
    """What a rendering may still take."""

    def __init__(self) -> None:
        self.start({})

    def start(self, variables: Mapping[str, Any]) -> None:
        """A new rendering, of these variables."""
        self._variables: Mapping[str, Any] | None = variables
        self._left = CHARACTERS
        self._begin = time.thread_time()
        self._end = time.monotonic() + SECONDS  # when the processor time is looked at

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within the block a timer looks at the time too, in what charges nothing.

        Not outside the main thread, nor where somebody else has a timer of processor time.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL:
            yield
            return

        signal.signal(signal.SIGPROF, lambda _number, _frame: self._check_time())
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS / 4)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def charge(self, count: int) -> None:
        """Charge so many characters; one more turn of a loop, macro or block is one.

        Raises:
            TemplateLimitError: there are not so many left, or no time.
        """
        self._left = left = self._left - count
        if left < 0 or time.monotonic() > self._end:
            self._check()

    def text(self, value: Any) -> str:
        """A value as it is written."""
        text = value if type(value) is str else str(value)
        self.charge(len(text))
        return text

    def checked(self, value: Any) -> Any:
        """A value that is kept, or goes into another one."""
        self.charge(len(value) if type(value) is str else self._weight(value))
        return value

    def grown(self, value: Any, before: Any) -> Any:
        """A value that takes the place of another one."""
        self.charge(1 + max(0, self._weight(value) - self._weight(before)))
        return value

    def _weight(self, value: Any) -> int:
        """A value's weight, or more than what is left."""
        found = weight(value, self._left)
        if found > self._left and self._grant():
            found = weight(value, self._left)
        return found

    def _grant(self) -> bool:
        """Give a long conversation more, once; whether it was given."""
        if self._variables is None:
            return False
        self._left += _A_CHARACTER * weight(list(self._variables.values()))
        self._variables = None
        return True

    def _check(self) -> None:
        if self._left < 0:
            self._grant()
        if self._left < 0:
            raise TemplateLimitError(f"makes more than {CHARACTERS} characters")
        self._check_time()

    def _check_time(self) -> None:
        """A process that was stopped, or waited for a processor, has more time."""
        now = time.monotonic()
        if now > self._end:
            if time.thread_time() - self._begin > SECONDS:
                raise TemplateLimitError(f"takes longer than {SECONDS:.0f} seconds")
            self._end = now + SECONDS / 4


def weight(value: Any, limit: int = 2 * CHARACTERS) -> int:
    """The size of a value in characters, with all that it holds; counted to `limit`.

    A value alone is as 8 characters: as much memory is taken by a place in a list.
    """
    stack = [value]
    total = 0
    while stack and total <= limit:
        one = stack.pop()
        total += _OBJECT
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif type(one) in (list, tuple, set, frozenset):
            stack.extend(one)
        elif type(one) is dict:
            stack.extend(one)
            stack.extend(one.values())
        elif isinstance(one, Namespace):
            stack.append(one._Namespace__attrs)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(one, int):
            total += one.bit_length() // 8
    return total
