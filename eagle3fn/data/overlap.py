"""Keeping an evaluation's texts out of the training data: 13-gram overlap (as in arXiv 2005.14165, appendix C)."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl

SIZE = 13
Grams = set[tuple[str, ...]]
_TOKEN = re.compile(r"\w+|[^\w\s]")


def grams(text: str) -> Grams:
    """All runs of 13 words or punctuation marks, in lower case."""
    tokens = _TOKEN.findall(text.lower())
    return {tuple(tokens[i : i + SIZE]) for i in range(len(tokens) - SIZE + 1)}


def grams_of_file(path: str | Path) -> Grams:
    """The 13-grams of every string in a JSONL file's rows, at any depth.

    Raises:
        UserError: unreadable, a row is not an object, or there is no string in the file.
    """
    found: Grams = set()
    count = 0
    for number, row in enumerate(read_jsonl(path), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object; mend or delete it")
        for text in _texts(row):
            found |= grams(text)
            count += 1
    if not count:
        raise UserError(
            f"{path}: no text in it to keep out; name a JSONL file whose rows hold texts"
        )
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def without(rows: Iterable[dict[str, Any]], forbidden: Grams) -> list[dict[str, Any]]:
    """The conversations none of whose turns shares a 13-gram with `forbidden`."""
    return [
        row
        for row in rows
        if not any(grams(turn["content"]) & forbidden for turn in row["conversations"])
    ]
