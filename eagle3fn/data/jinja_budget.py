"""What a chat template may take of time and memory: it is a stranger's program.

A rendering has a budget of characters. Text that is written, values that are assigned or given to a
call, and each turn of a loop, macro or block are charged to it (`data.jinja_tree`); what would make
much out of little (`*`, `%`, `center`, `join`) is charged before it is done (`data.jinja_calls`).
At turns the time is looked at.

What is not charged at once is bounded by the template's own length: an expression makes at most
16 times its largest value before its parts are charged too. So a rendering holds at most a few
gigabytes, and ends some seconds after its time at the latest, however it is written.
"""

import time
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

SECONDS = 10.0
"""Of a rendering: one takes milliseconds."""
CHARACTERS = 2**26
"""Of a rendering; `_A_CHARACTER` times the conversation's where that is more."""
LONGEST_SOURCE = 2**20
"""Characters of a template; the longest in use have 30 thousand."""

_STEP = 2**12  # characters between two looks at the time
_LARGE = 2**16  # characters of a value after which the time is looked at always
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
        self._step = _STEP
        self._look = CHARACTERS - _STEP  # what is left when the time is looked at again
        self._end = time.monotonic() + SECONDS
        self._used: float | None = None  # processor time when the end was reached

    def charge(self, count: int) -> None:
        """Charge so many characters; one more turn of a loop, macro or block is one.

        Raises:
            TemplateLimitError: there are not so many left, or no time.
        """
        self._left = left = self._left - count
        if left < self._look:
            self._check(count)

    def text(self, value: Any) -> str:
        """A value as it is written."""
        text = value if type(value) is str else str(value)
        self._left = left = self._left - len(text)
        if left < self._look:
            self._check(len(text))
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

    def _check(self, count: int) -> None:
        if self._left < 0:
            self._grant()
        if self._left < 0:
            raise TemplateLimitError(f"makes more than {CHARACTERS} characters")

        # A process that was stopped, or waited for a processor, has more time.
        now = time.monotonic()
        if now > self._end:
            used = time.thread_time()
            if self._used is not None and used - self._used > SECONDS / 4:
                raise TemplateLimitError(f"takes longer than {SECONDS:.0f} seconds")
            self._used = used if self._used is None else self._used
            self._end = now + SECONDS / 4

        # Where values are large, each turn may take long.
        self._step = 0 if count > _LARGE else self._step
        self._look = self._left - self._step


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
