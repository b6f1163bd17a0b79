"""Runs of 13 words, by which texts are known again (as in arXiv 2005.14165, appendix C)."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.data.rejects import rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.row_values import text_of

GRAM_SIZE = 13
Grams = set[tuple[str, ...]]
# A letter of Chinese or Japanese, which have no blanks; another word; a punctuation mark.
_LETTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_LETTERS}]|(?:(?![{_LETTERS}])\w)+|[^\w\s]")


def words(text: str) -> list[str]:
    """A text's words and punctuation marks in lower case; of Chinese and Japanese, its letters."""
    return _WORD.findall(text.lower())


def grams(text: str) -> Grams:
    """All runs of 13 words (`words`)."""
    found = words(text)
    starts = range(len(found) - GRAM_SIZE + 1)
    return {tuple(found[start : start + GRAM_SIZE]) for start in starts}


def grams_of_file(path: str | Path) -> Grams:
    """The 13-grams of every string, at any depth, in the rows of a file or folder.

    Raises:
        UserError: unreadable, a row that is broken or not an object, or there is no string in it.
    """
    found: Grams = set()
    count = 0
    with rejecting(path) as rejects:
        for row in usable(read_rows(path), _object, rejects):
            for text in _texts(row):
                found |= grams(text)
                count += 1
    if not count:
        raise UserError(f"{path}: no text in it to keep out; name a file whose rows hold texts")
    return found


def _object(row: FileRow) -> dict[str, Any]:
    if not isinstance(row.value, dict):
        raise UserError('not a JSON object, such as {"text": "hello"}; mend or delete the row')
    return row.value


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def without(rows: Iterable[dict[str, Any]], forbidden: Grams) -> list[dict[str, Any]]:
    """The conversations none of whose turns shares a 13-gram with `forbidden`."""
    kept = []
    for row in rows:
        texts = [text_of(turn["content"]) for turn in row["conversations"]]
        if not any(grams(text) & forbidden for text in texts):
            kept.append(row)
    return kept
