"""User errors, raised with what is wrong, where, and what to do."""

from typing import Any


class UserError(ValueError):
    """Bad input or configuration. The message names the file or value, the constraint, the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class EngineGone(UserError):
    """An engine died, was silent for too long, or cannot be reached: it may answer another time.

    What an engine says of a request, and an answer that is wrong, is a plain `UserError`.
    """


def number_of(count: int, noun: str) -> str:
    """A count and its noun.

    >>> number_of(1, "checkpoint"), number_of(0, "row"), number_of(2000, "row")
    ('1 checkpoint', '0 rows', '2,000 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed: Python's, torch's on the host, or one of a device."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "can't allocate memory" in str(error)


def one_line(text: str) -> str:
    """A text without line breaks and control codes: they are written as `\\n`, `\\x1b`."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def printable(text: Any, longest: int = 100) -> str:
    """What a file says, as part of a message: on one line, without control codes, and cut."""
    text = str(text)
    return one_line(text[:longest]) + ("…" if len(text) > longest else "")


def shown(value: Any) -> str:
    """A value of a file as part of a message: on one line, and cut."""
    return printable(repr(value))
