"""Keeping an evaluation's texts out of the training data: 13-gram overlap (as in arXiv 2005.14165, appendix C)."""

import re
from collections.abc import Iterable
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
    """The 13-grams of every string in a JSONL file's rows.

    Raises:
        UserError: unreadable, or a row is not an object.
    """
    found: Grams = set()
    for number, row in enumerate(read_jsonl(path), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object; mend or delete it")
        for value in row.values():
            found |= grams(value) if isinstance(value, str) else set()
    return found


def without(rows: Iterable[dict[str, Any]], forbidden: Grams) -> list[dict[str, Any]]:
    """The conversations none of whose turns shares a 13-gram with `forbidden`."""
    return [row for row in rows if not any(grams(turn["content"]) & forbidden for turn in row["conversations"])]
