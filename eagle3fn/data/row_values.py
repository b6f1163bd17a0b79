"""Values of a row: texts that UTF-8 has bytes for, JSON in a text, and how errors show them."""

import json
from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width

from eagle3fn.base.errors import UserError, printable

_SHOWN = 48  # characters


def unicode_text(text: Any, key: str, where: str) -> str:
    """A string that UTF-8 has bytes for."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {key} {shown(text)}: must be a string; mend or delete the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {key} {shown(text)}: holds half of a surrogate pair, "
            "which UTF-8 has no bytes for; mend or delete the row"
        ) from None
    return text


def json_value(text: Any, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: it is none; `where` names its place.
    """
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{where}: {shown(text)}: must be JSON; mend or delete the row") from None


def name_of(row: Any) -> str | None:
    """A row's `id`, if it is a text or a number: on one line, without control codes, and cut."""
    value = row.get("id") if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = str(value).encode("utf-8", "replace").decode()
    return printable(" ".join(text.split())) or None


def text_of(content: str | Sequence[str]) -> str:
    """A turn's content as one text: several parts on lines of their own, as vLLM joins them."""
    return content if isinstance(content, str) else "\n".join(content)


def width(text: str) -> int:
    """A text's columns in a terminal: letters of Chinese, Japanese and Korean take two.

    >>> width("four"), width("四字")
    (4, 4)
    """
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def forms_of(text: str) -> tuple[str, ...]:
    """A text as a template may write it: as it is, without blanks around it, as JSON."""
    escaped = (json.dumps(text, ensure_ascii=each)[1:-1] for each in (False, True))
    return tuple(dict.fromkeys((text, text.strip(), *escaped)))


def shown(value: Any) -> str:
    """A value as errors show it, cut to 48 characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
